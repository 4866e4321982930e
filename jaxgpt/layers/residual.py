"""Adding a branch to the residual stream.

Shapes: B batch, T length, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxgpt.target import Target


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zero a fraction `rate` of x and scale up the rest; the identity without a key."""
    if key is None or rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0).astype(x.dtype)


def residual(
    x_BTD: jax.Array,
    y_BTD: jax.Array,
    target: Target,
    adapter: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """The residual stream with a branch added.

    Args:
      x_BTD: the residual stream.
      y_BTD: output of the branch.
      target: what the program is built for.
      adapter: applied to the branch first (bottleneck adapters; Houlsby et al. 2019, figure 2).
    """
    return target.pin(x_BTD + (y_BTD if adapter is None else adapter(y_BTD)))
