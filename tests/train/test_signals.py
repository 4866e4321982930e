"""Stopping on a signal: one press asks, however often it arrives; a later one is not held back."""

from __future__ import annotations

import os
import signal

import pytest

from jaxgpt.train import signals
from jaxgpt.train.signals import StopSignal


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_arrives_twice_at_once_is_one(number, monkeypatch) -> None:
    clock, outer = [100.0], []
    monkeypatch.setattr(signals.time, "monotonic", lambda: clock[0])
    before = signal.signal(number, lambda *_: outer.append(number))
    try:
        with StopSignal() as stop:
            stop.begin()
            assert not stop.seen(1, 1)
            for _ in range(3):  # as from `timeout -s INT uv run jaxgpt train`
                os.kill(os.getpid(), number)
            assert stop.seen(1, 1) and stop.name == number.name and not outer
            clock[0] += signals.ONE_PRESS
            os.kill(os.getpid(), number)
            assert outer == [number]
        os.kill(os.getpid(), number)
        assert outer == [number, number]
    finally:
        signal.signal(number, before)
