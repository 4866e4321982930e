"""The key-value cache: every row is appended to at its own slot.

Shapes: B batch, T new tokens, S slots, G key-value heads, K head size.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import HERE

from jaxgpt.config import GPT
from jaxgpt.layers.cache import LayerCache, StackedCache, StackedLayer, init_cache

MODEL = GPT(vocab_size=8, context=12, layers=3, width=12, heads=4, kv_heads=2, head_width=5)
B, S, G, K = 3, 12, 2, 5
APPEND = jax.jit(LayerCache.append)


@jax.jit
def append_to_stack(
    stack: StackedCache, layer: jax.Array, *new: jax.Array
) -> tuple[StackedCache, LayerCache]:
    held = StackedLayer(stack, layer).append(*new)
    return held.stack, LayerCache(held.k_BSGK, held.v_BSGK)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 6), min_size=B, max_size=B), st.sampled_from([1, 3]), st.integers(0, 99))
def test_appending_at_each_rows_own_slot_is_concatenation(starts: list[int], new: int, seed: int) -> None:
    old_k, old_v = normal(seed, B, S, G, K), normal(seed + 1, B, S, G, K)
    cache, rows = LayerCache(jnp.asarray(old_k), jnp.asarray(old_v)), [list(a) for a in (old_k, old_v)]
    rows = [[row[:start] for row, start in zip(part, starts, strict=True)] for part in rows]
    lengths = np.asarray(starts)
    for turn in range(2):
        k, v = normal(seed + 2 + turn, B, new, G, K), normal(seed + 4 + turn, B, new, G, K)
        cache = APPEND(cache, jnp.asarray(k), jnp.asarray(v), jnp.asarray(lengths))
        rows = [
            [np.concatenate([row, more]) for row, more in zip(part, parts, strict=True)]
            for part, parts in zip(rows, (k, v), strict=True)
        ]
        lengths = lengths + new
    for slots, part, old in zip(cache, rows, (old_k, old_v), strict=True):
        for b, row in enumerate(part):
            np.testing.assert_array_equal(slots[b, : len(row)], row)
            np.testing.assert_array_equal(slots[b, len(row) :], old[b, len(row) :])  # nothing else changed


def test_a_new_cache_is_separate_for_each_layer_and_keeps_its_type() -> None:
    cache = init_cache(MODEL, HERE, B, S, jnp.dtype("bfloat16"))
    assert len(cache) == MODEL.layers
    assert all(a.shape == (B, S, G, K) and a.dtype == jnp.bfloat16 for layer in cache for a in layer)
    assert not any(a.any() for layer in cache for a in layer)
    new = jnp.full((B, 1, G, K), 1 + 2**-12)  # float32, like projections on a CPU
    layer = APPEND(cache[0], new, new, jnp.zeros(B, jnp.int32))
    assert layer.k_BSGK.dtype == layer.v_BSGK.dtype == jnp.bfloat16
    assert (layer.k_BSGK[:, 0] == 1).all()


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(0, S), min_size=B, max_size=B), st.sampled_from([1, 3]), st.integers(0, 2))
def test_appending_to_a_stacked_layer_is_like_an_unstacked_one_and_changes_no_other(
    starts: list[int], new: int, layer: int
) -> None:
    stack = StackedCache(normal(0, 3, B, G, S, K), normal(1, 3, B, G, S, K))
    tokens = (normal(2, B, new, G, K), normal(3, B, new, G, K), np.asarray(starts))
    before = LayerCache(*(old_LBGSK[layer].swapaxes(1, 2) for old_LBGSK in stack))
    expected = APPEND(before, *tokens)
    after, found = append_to_stack(stack, np.int32(layer), *tokens)
    for old_LBGSK, new_LBGSK, mine, wanted in zip(stack, after, found, expected, strict=True):
        np.testing.assert_array_equal(mine, wanted)
        old_LBGSK[layer] = wanted.swapaxes(1, 2)
        np.testing.assert_array_equal(new_LBGSK, old_LBGSK)
