"""Rotary embedding: scores depend only on the distance.

Shapes: B batch, T length, H heads, K head size.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.config import GPT
from jaxgpt.layers.position import frequencies, rotate

T, K, THETA = 64, 8, 10_000.0
TURN = jax.jit(rotate)


def ROTATE(x_BTHK: jax.Array, positions_BT: jax.Array, theta: float) -> jax.Array:
    model = GPT(width=K, heads=1, position="rope", rope_theta=theta)
    return TURN(x_BTHK, positions_BT, frequencies(model, 0))


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.float32(np.random.default_rng(seed).standard_normal(shape))


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
def test_rotation_is_multiplication_by_a_complex_number(theta: float) -> None:
    """Features i and i + K/2 are the parts of one number, rotated by position / theta^(2i/K)."""
    x_BTHK = normal(0, 2, T, 3, K)
    positions_BT = jnp.stack([jnp.arange(T), jnp.arange(T)[::-1] % 7])
    y = np.asarray(ROTATE(x_BTHK, positions_BT, theta))
    x, positions = np.asarray(x_BTHK, np.float64), np.asarray(positions_BT)
    for i in range(K // 2):
        turned = (x[..., i] + 1j * x[..., i + K // 2]) * np.exp(
            1j * positions[..., None] / theta ** (2 * i / K)
        )
        np.testing.assert_allclose(y[..., i], turned.real, atol=1e-4)
        np.testing.assert_allclose(y[..., i + K // 2], turned.imag, atol=1e-4)


def test_scores_depend_only_on_the_distance() -> None:
    q, k = (jnp.broadcast_to(normal(seed, K), (1, T, 1, K)) for seed in (0, 1))
    places = jnp.arange(T)[None]
    scores_TS = np.asarray(jnp.einsum("bthk,bshk->ts", ROTATE(q, places, THETA), ROTATE(k, places, THETA)))
    for distance in range(1 - T, T):
        diagonal = np.diagonal(scores_TS, distance)
        np.testing.assert_allclose(diagonal, diagonal[0], atol=1e-4)
    assert len(np.unique(scores_TS[0].round(3))) > T // 2  # and they do depend on it
    far = np.asarray(
        jnp.einsum("bthk,bshk->ts", ROTATE(q, places + 900, THETA), ROTATE(k, places + 900, THETA))
    )
    np.testing.assert_allclose(far, scores_TS, atol=1e-3)


def test_rotation_keeps_lengths_and_leaves_position_zero() -> None:
    x = normal(0, 1, T, 2, K)
    y = ROTATE(x, jnp.arange(T)[None], THETA)
    np.testing.assert_allclose(jnp.linalg.norm(y, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5)
    np.testing.assert_array_equal(y[:, 0], x[:, 0])


def test_half_precision_rotates_in_float32() -> None:
    """In bfloat16 itself, position 1001 would be position 1000."""
    x, places = normal(0, 1, 2, 1, K), jnp.asarray([[1000, 1001]])
    half = ROTATE(x.astype(jnp.bfloat16), places, THETA)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(half, np.float32), ROTATE(x, places, THETA), atol=0.03)
