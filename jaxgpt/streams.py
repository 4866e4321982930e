"""Standard streams that no work depends on: a terminal that is gone or a full disk stops no training."""

from __future__ import annotations

import io
import logging
import os
import sys
from typing import Any, TextIO


def steady_streams() -> None:
    """Open the standard streams that are closed, and make standard error one that never fails.

    A file opened later would take the number of a closed one, and get what libraries write to it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):  # an ASCII terminal shows what it lacks as escapes
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.stderr = steady_text(2, sys.stderr)


def steady_text(number: int, like: TextIO | None) -> TextIO:
    """A text stream of a file descriptor that drops what cannot be written."""
    encoding = like.encoding if like is not None else "utf-8"
    raw: Any = _Steady(number, "w", closefd=False)
    return io.TextIOWrapper(raw, encoding, errors="backslashreplace", write_through=True)


def quiet_libraries() -> None:
    """Keep to themselves Orbax and grain, and the tasks they leave: what they raise we say ourselves."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


class _Steady(io.FileIO):
    def write(self, data: Any) -> int:
        try:
            return super().write(data) or len(data)
        except OSError:
            return len(data)
