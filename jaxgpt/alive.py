"""A sign of life from work that may take long."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator

log = logging.getLogger(__name__)


@contextlib.contextmanager
def alive(what: str, every: float = 10.0) -> Iterator[None]:
    """Log `still WHAT (N s)` every so many seconds while the block runs."""
    done, began = threading.Event(), time.monotonic()

    def say() -> None:
        while not done.wait(every):
            log.info("still %s (%.0f s)", what, time.monotonic() - began)

    thread = threading.Thread(target=say, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
