"""Stopping on a signal: saved once there is something to save, at once before that or when asked twice."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

STOPPED_BY_SIGNAL = 75
"""Exit code after a signal: the run is saved and the same command goes on (EX_TEMPFAIL)."""

ONE_PRESS = 1.0
"""Seconds in which signals count as one: `uv run`, `timeout` and `srun` send on what we had already."""

GRACE = 1.0
"""Seconds that Python has to end by itself; it cannot while it waits for a compiler, or for a file server."""

_NUMBERS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]


class Interrupted(KeyboardInterrupt):
    """A signal came before there was anything to save."""


class StopSignal:
    """SIGTERM, SIGINT and SIGHUP ask the loop to save and leave; a later one ends the process at once.

    Before `begin` there is nothing to save: they raise `Interrupted`, and where Python waits for a
    compiler they end the process. A SIGHUP that was ignored, as by nohup, stays so.

    Attributes:
      name: of the signal that came, empty before.
      clean_up: called before the process is ended from a thread.
    """

    def __init__(self) -> None:
        self.name, self._since, self._begun = "", 0.0, False
        self.clean_up: Callable[[], None] = lambda: None
        self._before: dict[int, Any] = {}
        self._left = threading.Event()

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is not threading.main_thread():
            self._left.set()  # only the main thread can handle signals: whoever started this one does
            return self
        for number in _NUMBERS:
            if number != getattr(signal, "SIGHUP", None) or signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._on_signal)
        # Signals are written here at once, also while the main thread is not in Python.
        self._source, self._sink = os.pipe()
        os.set_blocking(self._sink, False)
        self._wakeup = signal.set_wakeup_fd(self._sink, warn_on_full_buffer=False)
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._left.is_set():
            return
        self._left.set()
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.write(self._sink, b"\0")
        self._watcher.join()
        os.close(self._source)
        os.close(self._sink)

    def begin(self) -> None:
        """From now on a signal lets the loop save first."""
        self._begun = True

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if not self.name:
            self.name, self._since = signal.Signals(number).name, time.monotonic()
            if not self._begun:
                raise Interrupted(self.name)
        elif time.monotonic() - self._since >= ONE_PRESS:
            if self._before[number] == signal.default_int_handler:  # what it raises may wait for a save
                threading.Thread(target=self._end_soon, args=(number,), daemon=True).start()
            self.__exit__()
            os.kill(os.getpid(), number)

    def _watch(self) -> None:
        """End the process where the main thread cannot."""
        first = 0.0
        while number := os.read(self._source, 1)[0]:
            if number not in self._before:
                continue
            again = bool(first) and time.monotonic() - first >= ONE_PRESS
            first = first or time.monotonic()
            if (again or not self._begun) and not self._left.wait(GRACE) and self._is_last(number):
                self._end(number)

    def _is_last(self, number: int) -> bool:
        """Whether nobody around this one has a use for the signal."""
        return self._before[number] in (signal.SIG_DFL, signal.default_int_handler)

    def _end_soon(self, number: int) -> None:
        time.sleep(GRACE)
        self._end(number)

    def _end(self, number: int) -> None:
        code = 128 + number
        if not self._begun:
            self.clean_up()
            code = STOPPED_BY_SIGNAL
            cursor = "\x1b[?25h" if sys.stderr is not None and sys.stderr.isatty() else ""
            words = f"{cursor}jaxgpt: {signal.Signals(number).name} before the first step"
            print(f"{words}; run the same command to start again.", file=sys.stderr, flush=True)
        os._exit(code)

    def seen(self, step: int, every: int) -> bool:
        """Whether any process was asked to stop; a cluster agrees on it every few steps."""
        if jax.process_count() == 1:
            return bool(self.name)
        if step % every:
            return False
        return bool(multihost_utils.process_allgather(np.array(bool(self.name))).any())
