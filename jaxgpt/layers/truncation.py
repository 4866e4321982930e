"""Sets of the most likely tokens: what truncation keeps of a distribution, in the sampler and in the trainer.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def upper_set(x_BV: jax.Array, weights_BV: jax.Array, goal_B: ArrayLike) -> jax.Array:
    """Where x >= t, for the largest t such that {x >= t} weighs at least `goal_B`; else all.

    t is found bit by bit among the float32 numbers: 32 sums instead of a sort, 20 times faster on a
    CPU and without gathering where the vocabulary is sharded. A tie is kept whole or not at all.
    """
    bits_BV = jax.lax.bitcast_convert_type(jnp.where(x_BV == 0, 0.0, x_BV), jnp.uint32)
    top = jnp.uint32(1 << 31)
    order_BV = jnp.where(bits_BV >= top, ~bits_BV, bits_BV | top)  # unsigned, in the order of x

    def narrow(i: jax.Array, found_B: jax.Array) -> jax.Array:
        tried_B = found_B | (top >> i.astype(jnp.uint32))
        weight_B = jnp.sum(jnp.where(order_BV >= tried_B[:, None], weights_BV, 0), axis=-1)
        return jnp.where(weight_B >= goal_B, tried_B, found_B)

    found_B = jax.lax.fori_loop(0, 32, narrow, jnp.zeros(x_BV.shape[0], jnp.uint32))
    return order_BV >= found_B[:, None]
