"""Rotary position embedding.

Shapes: B batch, T length, H heads, K head width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rotate(x_BTHK: jax.Array, positions_BT: jax.Array, theta: float) -> jax.Array:
    """Rotate pairs of features by position (RoFormer, section 3.2), in float32.

    Feature i is paired with i + K/2, the layout of Llama's published weights in Hugging Face form.
    """
    half = x_BTHK.shape[-1] // 2
    frequency_K = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle_BT1K = positions_BT[:, :, None, None] * frequency_K
    sin, cos = jnp.sin(angle_BT1K), jnp.cos(angle_BT1K)
    a, b = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTHK.dtype)
