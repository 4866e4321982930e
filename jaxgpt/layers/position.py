"""Positions: rotary embedding of queries and keys, or a bias on their scores.

Shapes: B batch, T queries, S keys, H heads, K head size, N buckets.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxgpt.config import GPT


def rotate(x_BTHK: jax.Array, positions_BT: jax.Array, frequency_K: jax.Array | np.ndarray) -> jax.Array:
    """Rotate pairs of features by position (RoFormer, section 3.2), in float32.

    Feature i is paired with i + K/2, the layout of Llama's published weights in Hugging Face format.

    Args:
      x_BTHK: queries or keys.
      positions_BT: position of each token.
      frequency_K: radians per position, for each of the K/2 pairs; see `frequencies`.
    """
    angle_BT1K = positions_BT[:, :, None, None] * frequency_K
    sin, cos = jnp.sin(angle_BT1K), jnp.cos(angle_BT1K)
    a, b = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTHK.dtype)


def frequencies(model: GPT, layer: int) -> np.ndarray:
    """Rotation per position of each pair of a layer's features, in radians, float32 [K/2].

    `llama3` divides low frequencies by the factor, keeps high ones, and interpolates in between (Llama 3.1;
    Grattafiori et al. 2024, section 3.4, with the constants of its released code).
    """
    theta, scaling = model.frequency(layer)
    half = model.head // 2
    frequency_K = (theta ** (-np.arange(half, dtype=np.float32) / half)).astype(np.float32)
    if scaling is None:
        return frequency_K
    slow_K = frequency_K / np.float32(scaling.factor)
    if scaling.form == "linear":
        return slow_K
    turns_K = scaling.original_context * frequency_K / (2 * math.pi)
    low, high = scaling.low_frequency, scaling.high_frequency
    fast_K = np.clip((turns_K - low) / (high - low), 0, 1)
    return ((1 - fast_K) * slow_K + fast_K * frequency_K).astype(np.float32)


def slopes(heads: int) -> np.ndarray:
    """ALiBi's slope of each head, float32 [H] (Press et al. 2022, section 3).

    A geometric sequence from 2^(-8/H). Heads beyond a power of two use every other slope of the next power of
    two, as in the paper's code.
    """
    power = 1 << (heads.bit_length() - 1)

    def of(count: int) -> np.ndarray:
        return 2.0 ** (-8 / count * np.arange(1, count + 1))

    return np.concatenate([of(power), of(2 * power)[::2][: heads - power]]).astype(np.float32)


def bucket(distance_BTS: jax.Array, buckets: int, farthest: int, *, causal: bool) -> jax.Array:
    """The bucket of each distance back from query to key (T5; Raffel et al. 2020, section 2.1).

    The first half of the buckets hold one distance each; the others grow on a logarithmic scale up to
    `farthest`, beyond which all distances share a bucket. Without causality, half of the buckets are for
    later keys.
    """
    base_BTS = jnp.zeros_like(distance_BTS)
    if not causal:
        buckets //= 2
        base_BTS = jnp.where(distance_BTS < 0, buckets, 0)
        distance_BTS = jnp.abs(distance_BTS)
    distance_BTS = jnp.maximum(distance_BTS, 0)
    exact = buckets // 2
    ratio_BTS = jnp.maximum(distance_BTS, exact).astype(jnp.float32) / exact
    far_BTS = exact + (jnp.log(ratio_BTS) / math.log(farthest / exact) * (buckets - exact)).astype(jnp.int32)
    return base_BTS + jnp.where(distance_BTS < exact, distance_BTS, jnp.minimum(far_BTS, buckets - 1))


class Bias(nnx.Module):
    """What a layer adds to attention scores, by the distance between query and key.

    `alibi`: one slope per head, nothing learned (without causality, the absolute distance counts).
    `relative`: a learned number for each head and bucket of distances, one table per layer (T5 shares one
    table among its layers).
    """

    BUCKETS, FARTHEST = 32, 128

    def __init__(self, key: jax.Array, model: GPT) -> None:
        self.kind, self.causal, self.heads = model.position, model.causal, model.heads
        table_NH = 0.02 * jax.random.normal(key, (self.BUCKETS, model.heads))
        learned = model.position == "relative"
        self.table = nnx.Param(table_NH, axes=("position", "heads"), role="bias") if learned else None

    def __call__(self, distance_BTS: jax.Array) -> jax.Array:
        """The bias [B, H, T, S], float32, of distances back from query to key."""
        if self.table is None:
            slope_H11 = jnp.asarray(slopes(self.heads))[:, None, None]
            return -slope_H11 * jnp.abs(distance_BTS)[:, None].astype(jnp.float32)
        index_BTS = bucket(distance_BTS, self.BUCKETS, self.FARTHEST, causal=self.causal)
        return jnp.moveaxis(self.table[...][index_BTS], -1, 1)
