"""Keys and values in 8 bits: within half a step, in both forms of the cache.

Shapes: B batch, T new tokens, S slots, G key-value heads, K head size.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from same import normal
from tiny import HERE

from jaxgpt.config import GPT
from jaxgpt.layers.cache import StackedCache, init_cache, reorder, slots_of
from jaxgpt.layers.int8 import Int8, like, to_int8
from jaxgpt.target import Target

MODEL = GPT(vocab_size=8, context=12, layers=3, width=12, heads=4, kv_heads=2, head_width=6)
B, S, G, K, T = 3, 12, 2, 6, 4
GPU = Target("gpu", "NVIDIA H100 80GB HBM3")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_vectors_are_within_half_a_step(dtype) -> None:
    x = (normal(0, 5, 7) * jnp.geomspace(1e-3, 1e3, 5)[:, None]).astype(dtype)
    held = Int8.of(x, jnp.dtype(dtype))
    assert held.steps.dtype == jnp.int8
    step = jnp.abs(x.astype(jnp.float32)).max(-1, keepdims=True) / 127
    loss = 0.5001 if dtype == "float32" else 1.0
    assert bool((jnp.abs(held.whole().astype(jnp.float32) - x.astype(jnp.float32)) <= loss * step).all())
    assert held.whole().dtype == dtype
    steps, scale = to_int8(jnp.zeros((2, 3)))
    assert not steps.any()
    assert not scale.any()


@pytest.mark.parametrize("target", [HERE, GPU], ids=["apart", "stacked"])
def test_a_cache_holds_what_a_float_one_does_but_for_the_rounding(target: Target) -> None:
    new, start_B = (normal(1, B, T, G, K), normal(2, B, T, G, K)), jnp.asarray([0, 3, 8])

    @jax.jit
    def filled(cache):
        if isinstance(cache, StackedCache):
            layer = cache.layer(jnp.int32(1)).append(*new, start_B)
            return cache.keep(layer), layer.k_BSGK, layer.v_BSGK
        layer = cache[1].append(*new, start_B)
        return (cache[0], layer, cache[2]), layer.k_BSGK, layer.v_BSGK

    how = (MODEL, target, B, S, jnp.dtype("bfloat16"))
    exact, few = init_cache(*how), init_cache(*how, int8=True)
    assert slots_of(few) == slots_of(exact) == S
    size = {name: sum(x.nbytes for x in jax.tree.leaves(c)) for name, c in (("few", few), ("all", exact))}
    assert size["few"] == size["all"] * (K + 4) // (2 * K)  # a byte each, and a float32 for each head
    for got, want, x in zip(filled(few)[1:], filled(exact)[1:], new, strict=True):
        step = float(jnp.abs(x).max()) / 127
        np.testing.assert_allclose(got.astype("float32"), want.astype("float32"), atol=step)
        assert got.dtype == jnp.bfloat16
    # Rows change places with their scales.
    parent_BW = jnp.asarray([[2, 0, 1]])
    moved = reorder(filled(few)[0], parent_BW)
    for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(filled(few)[0]), strict=True):
        rows = list(a.shape).index(B) if target is HERE else 1
        np.testing.assert_array_equal(a, jnp.take(b, parent_BW[0], rows))


def test_new_vectors_take_the_form_of_those_held() -> None:
    x = normal(0, 2, 3)
    assert like(x, jnp.zeros((2, 3), jnp.bfloat16)).dtype == jnp.bfloat16
    assert isinstance(like(x, Int8.of(x, jnp.dtype("bfloat16"))), Int8)
