"""What a number may be, said where its field is declared: `steps: Annotated[int, Bounds(1, 100)]`.

Upper bounds keep a slip of the finger from becoming a hang or an overflow: counters are 32 bits wide,
seeds too, and a size beyond what any machine holds is a mistake. Floats stay where float32 tells them
from 0 and from infinity.
"""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ParamSpec, TypeVar

from jaxgpt.errors import UserError

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Bounds:
    """The least and the most that a number may be, both included."""

    least: float
    most: float

    def check(self, value: float, name: str) -> None:
        """Raise `UserError` naming the field, its value and what it may be (NaN is outside too)."""
        if not self.least <= value <= self.most:
            raise UserError(f"{name} is {_number(value)}; it must be {self}.")

    def __str__(self) -> str:
        return f"between {_number(self.least)} and {_number(self.most)}"


def check_bounds(hint: Any, value: Any, name: str) -> None:
    """Check a value against the bounds in its annotation, if there are any and it is a number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    for part in typing.get_args(hint):  # of `Annotated[int, Bounds(...)]`, of `Width | None`
        if isinstance(part, Bounds):
            part.check(value, name)
        check_bounds(part, value, name)


def bounded(command: Callable[P, T]) -> Callable[P, T]:
    """A command that checks its numbers against the bounds in its annotations, by the names of its flags."""

    @functools.wraps(command)
    def checked(*args: P.args, **options: P.kwargs) -> T:
        given = inspect.signature(command).bind(*args, **options).arguments
        for name, hint in typing.get_type_hints(command, include_extras=True).items():
            check_bounds(hint, given.get(name), f"--{name.replace('_', '-')}")
        return command(*args, **options)

    return checked


def _number(value: float) -> str:
    if isinstance(value, float):
        return f"{value:g}" if value == float(f"{value:g}") else str(value)
    return f"{value:,}" if abs(value) < 10**18 else f"an integer of {value.bit_length()} bits"


Steps = Annotated[int, Bounds(1, 2**31 - 1)]
"""Steps of training, which an int32 counts."""
StepsOr0 = Annotated[int, Bounds(0, 2**31 - 1)]
Seed = Annotated[int, Bounds(0, 2**32 - 1)]
Rows = Annotated[int, Bounds(1, 2**20)]
"""Rows of a batch, completions of a prompt."""
Tokens = Annotated[int, Bounds(1, 2**24)]
"""Of a row, a document or a vocabulary."""
TokensOr0 = Annotated[int, Bounds(0, 2**24)]
Width = Annotated[int, Bounds(1, 2**20)]
"""Features of a token, in any part of a model."""
Layers = Annotated[int, Bounds(1, 4096)]
Parts = Annotated[int, Bounds(-1, 2**20)]
"""Devices along an axis of the mesh; -1 means what is left."""
Workers = Annotated[int, Bounds(0, 1024)]
"""Processes."""
Limit = Annotated[int, Bounds(0, 2**53)]
"""The first so many of something; 0 means all."""
Positive = Annotated[float, Bounds(1e-30, 1e30)]
"""What is divided by, or whose logarithm is taken."""
Weight = Annotated[float, Bounds(0, 1e6)]
"""Of a term in a loss, or a rate of learning or decay."""
Share = Annotated[float, Bounds(0, 1)]
Part = Annotated[float, Bounds(1e-6, 1 - 1e-6)]
"""Neither nothing nor all."""
Decay = Annotated[float, Bounds(0, 1 - 1e-6)]
"""A running mean's, or a rate of dropout; in float32 still below 1."""
