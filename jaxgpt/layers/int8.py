"""Activations in 8 bits: each vector along the last axis has a scale of its own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

STEPS = 127
"""Of an int8 number on either side of 0."""


def to_int8(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Steps [..., K] of int8 and the float32 size of a step [..., 1]: x is about their product."""
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / STEPS
    return jnp.round(x / jnp.maximum(scale, jnp.finfo(jnp.float32).tiny)).astype(jnp.int8), scale


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int8:
    """Vectors in 8 bits, whose arrays have equal axes.

    Attributes:
      steps: [..., K].
      scale: [..., 1].
      dtype: of the vectors when they are read.
    """

    steps: Any
    scale: Any
    dtype: Any = field(default=jnp.float32, metadata={"static": True})

    @classmethod
    def of(cls, x: jax.Array, dtype: Any) -> Int8:
        """Vectors rounded to 8 bits."""
        return cls(*to_int8(x), dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the vectors."""
        return self.steps.shape

    def whole(self) -> jax.Array:
        """The vectors as an array."""
        return (self.steps * self.scale).astype(self.dtype)


def like(x: jax.Array, held: Any) -> Any:
    """New vectors in the form of those that are held, an array or `Int8`."""
    return Int8.of(x, held.dtype) if isinstance(held, Int8) else x.astype(held.dtype)


def whole(held: Any) -> jax.Array:
    """Vectors as an array."""
    return held.whole() if isinstance(held, Int8) else held
