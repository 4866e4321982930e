"""What a forward pass shows of its inside: hidden states and attention maps of chosen layers.

A tape is open while a program is traced. Then `run_layers` runs the layers one after another and `attend`
computes the maps; with no tape the program is the same as if there were none.

Shapes: B batch, T queries, S keys, H heads, D hidden size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import jax


@dataclass
class Tape:
    """Arrays of chosen layers, as they are computed.

    Attributes:
      states: numbers of the hidden states wanted: 0 is the input of the first layer, i the output of the
        i-th.
      maps: numbers of the layers (from 0) whose attention probabilities are wanted.
      hidden_BTD: states found, by number.
      attention_BHTS: maps found, by layer, float32.
      layers: how many layers have run: the number of the one that is running.
    """

    states: Collection[int] = ()
    maps: Collection[int] = ()
    hidden_BTD: dict[int, jax.Array] = field(default_factory=dict)
    attention_BHTS: dict[int, jax.Array] = field(default_factory=dict)
    layers: int = 0

    def note_state(self, x_BTD: jax.Array) -> None:
        """Keep the residual stream before the first or after another layer."""
        if self.layers in self.states:
            self.hidden_BTD[self.layers] = x_BTD

    @property
    def wants_map(self) -> bool:
        """Whether the layer that is running shall show its attention."""
        return self.layers in self.maps


_OPEN: ContextVar[Tape | None] = ContextVar("tape", default=None)


def tape() -> Tape | None:
    """The open tape."""
    return _OPEN.get()


@contextlib.contextmanager
def recording(to: Tape | None) -> Iterator[Any]:
    """Open a tape for what is traced inside; None leaves it out of the one that is open."""
    token = _OPEN.set(to)
    try:
        yield to
    finally:
        _OPEN.reset(token)
