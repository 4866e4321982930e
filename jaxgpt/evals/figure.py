"""A measured value."""

from __future__ import annotations

from typing import NamedTuple


class Figure(NamedTuple):
    """A measured value; its standard error, or its 95 % interval, where one is known."""

    value: float | None
    stderr: float | None = None
    low: float | None = None
    high: float | None = None
