"""What joins a branch to the residual stream.

Shapes: B batch, T length, D width.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxgpt.target import Target


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zero a share `rate` of x and scale the rest up; the identity without a key."""
    if key is None or rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0).astype(x.dtype)


def residual(
    x_BTD: jax.Array,
    y_BTD: jax.Array,
    target: Target,
    adapter: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """The stream with a branch added.

    Args:
      x_BTD: the stream.
      y_BTD: what the branch made of it.
      target: what the program is built for.
      adapter: changes the branch first (bottleneck adapters; Houlsby et al. 2019, figure 2).
    """
    return target.pin(x_BTD + (y_BTD if adapter is None else adapter(y_BTD)))
