"""The layer: projections around a kernel; an empty cache; extra keys.

Shapes: B batch, T queries, P extra keys, D hidden size, G key-value heads, K head size.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_kernels import ROWS, B, T, definition, normal
from tiny import HERE

from jaxgpt.config import GPT, Compute
from jaxgpt.layers.attention import Attention
from jaxgpt.layers.cache import LayerCache
from jaxgpt.layers.mask import LayerFacts, Mask, RowFacts
from jaxgpt.layers.position import frequencies

FLOAT32 = Compute(dtype="float32", attention="xla")

MODEL = GPT(vocab_size=8, context=T, layers=2, width=12, heads=4, kv_heads=2, head_width=6)


def build(model: GPT) -> Attention:
    """An attention layer whose parameters are all random, including biases and scales."""
    layer = Attention(jax.random.key(0), model, FLOAT32, HERE)
    graphdef, state = nnx.split(layer)
    leaves, tree = jax.tree.flatten(state)
    leaves = [0.5 * normal(10 + i, *leaf.shape) for i, leaf in enumerate(leaves)]
    return nnx.merge(graphdef, jax.tree.unflatten(tree, leaves))


@pytest.mark.parametrize(
    "model",
    [MODEL, replace(MODEL, position="rope", bias=False, qk_norm=True)],
    ids=["plain", "rotated and normalised"],
)
def test_the_module_is_projections_around_attention(model: GPT) -> None:
    layer, x_BTD = build(model), normal(1, B, T, 12)
    positions_BT = jnp.asarray([[0, 1, 2, 3, 4, 5], [0, 1, 0, 1, 2, 0]])
    rows = RowFacts(positions_BT, ROWS)
    own = LayerFacts(jnp.asarray(frequencies(model, 0)) if model.position == "rope" else None)
    y_BTD, cache = jax.jit(lambda x: layer(x, rows, own))(x_BTD)
    assert cache is None

    def project(part: nnx.Module, scale: np.ndarray | None = None) -> np.ndarray:
        weight = np.asarray(part.weight[...], np.float64)
        y = np.tensordot(np.asarray(x_BTD, np.float64), weight, 1)
        y = y if part.bias is None else y + np.asarray(part.bias[...])
        if scale is None:
            return y
        y = y / np.sqrt((y**2).mean(-1, keepdims=True) + model.norm_eps) * scale
        # Rotation as multiplication by a complex number of size 1.
        turn = np.asarray(positions_BT)[:, :, None, None] * 1e4 ** (-np.arange(3) / 3)
        z = (y[..., :3] + 1j * y[..., 3:]) * np.exp(1j * turn)
        return np.concatenate([z.real, z.imag], -1)

    norms = [np.asarray(n.scale[...]) if n else None for n in (layer.q_norm, layer.k_norm)]
    assert (norms[0] is not None) == model.qk_norm
    q, k, v = project(layer.q, norms[0]), project(layer.k, norms[1]), project(layer.v)
    seen = np.asarray(ROWS.dense())
    y = definition(q, k, v, lambda b, t, s: seen[b, t, s])
    y = np.tensordot(y, np.asarray(layer.out.weight[...]), 2)
    y = y if layer.out.bias is None else y + np.asarray(layer.out.bias[...])
    np.testing.assert_allclose(y_BTD, y, rtol=1e-4, atol=1e-4)


def test_an_empty_cache_is_filled_and_not_read() -> None:
    """As prefill requires: the result equals that of whole rows, and that of reading the cache."""
    layer, x_BTD = build(MODEL), normal(1, B, T, 12)
    index_BT, slot_1S = jnp.broadcast_to(jnp.arange(T), (B, T)), jnp.arange(T + 3)[None]
    ones_BT, ones_1S = jnp.ones_like(index_BT), jnp.ones_like(slot_1S)
    blank = LayerCache(*(jnp.full((B, T + 3, 2, 6), 7.0) for _ in range(2)))
    whole = RowFacts(index_BT, Mask.of_rows(ones_BT, one=True))
    read = RowFacts(index_BT, Mask(index_BT, slot_1S, ones_BT, ones_1S), start_B=jnp.zeros(B, jnp.int32))
    run = jax.jit(lambda rows, cache: layer(x_BTD, rows, LayerFacts(window=4), cache))
    (y, filled), (expected, same), (plain, _) = run(whole, blank), run(read, blank), run(whole, None)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(y, plain)
    for a, b in zip(filled, same, strict=True):
        np.testing.assert_array_equal(a, b)


def test_extra_keys_count_in_a_cache_too_and_their_absence_changes_nothing() -> None:
    """A query in a cache sees them like the last query of whole rows."""
    layer, x_BTD, ones_BT = build(MODEL), normal(1, B, T, 12), jnp.ones((B, T), jnp.int32)
    prefix = (normal(2, 3, 2, 6), normal(3, 3, 2, 6))
    index_BT = jnp.broadcast_to(jnp.arange(T), (B, T))

    @jax.jit
    def run(x: jax.Array, rows: RowFacts, cache: Any = None, prefix: Any = None) -> Any:
        return layer(x, rows, LayerFacts(prefix=prefix), cache)

    rows = RowFacts(index_BT, Mask.of_rows(ones_BT, one=True))
    blank = LayerCache(*(jnp.zeros((B, T, 2, 6)) for _ in range(2)))
    (whole, cache), (without, _) = run(x_BTD, rows, blank, prefix), run(x_BTD, rows)
    assert np.abs(whole - without).max() > 0.1
    mask = Mask(index_BT[:, -1:], index_BT, ones_BT[:, :1], ones_BT)
    last = RowFacts(index_BT[:, -1:], mask, start_B=index_BT[:, -1])
    y_B1D, _ = run(x_BTD[:, -1:], last, cache, prefix)
    np.testing.assert_allclose(y_B1D[:, 0], whole[:, -1], rtol=1e-5, atol=1e-5)

    def products(prefix: Any = None) -> int:
        lowered = jax.jit(lambda x: layer(x, rows, LayerFacts(prefix=prefix))[0]).lower(x_BTD)
        return lowered.as_text().count("dot_general")

    assert products() == products(prefix) - 2
