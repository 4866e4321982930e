"""A sign of life comes at its time, and ends with the work."""

from __future__ import annotations

import threading
import time

import pytest

from jaxgpt.alive import alive


def test_long_work_says_that_it_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    before = threading.active_count()
    with alive("counting", every=0.01):
        deadline = time.monotonic() + 10
        while len(caplog.records) < 2 and time.monotonic() < deadline:
            time.sleep(0.005)
    assert caplog.records[0].message.startswith("still counting (")
    assert threading.active_count() == before
    with pytest.raises(ValueError, match="kept"), alive("failing", every=0.01):
        raise ValueError("kept")
