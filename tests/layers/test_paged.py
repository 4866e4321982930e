"""The paged cache: what rows write and see is what rows of their own memory would hold."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import HERE

from jaxgpt.config import GPT, Compute
from jaxgpt.layers.kernels import attend
from jaxgpt.layers.kernels.base import Scores
from jaxgpt.layers.kernels.paged import BLOCK, Held, attend_pages, pick_paged
from jaxgpt.layers.mask import Mask
from jaxgpt.layers.paged import PagedStack
from jaxgpt.layers.position import slopes
from jaxgpt.target import Target

B, G, H, K, P, M = 3, 2, 4, 8, 4, 40
"""Rows, key-value heads, heads, head size, tokens of a page, pages of a row: more than one block of keys."""
LENGTHS = np.array([3, 70, 153])


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def filled(*, int8: bool = False, layers: int = 1, layer: int = 0) -> tuple[Any, jax.Array, jax.Array]:
    """A pool whose rows hold random keys and values in scattered pages, and these."""
    assert BLOCK["cpu"] < M * P
    pages = 1 + B * M
    table = np.random.default_rng(0).permutation(np.arange(1, pages)).reshape(B, M).astype(np.int32)
    held = Held.empty((layers * pages, P, 2 * G, K), jnp.dtype("float32"), "xla", int8=int8)
    k_BSGK, v_BSGK = normal(1, B, M * P, G, K), normal(2, B, M * P, G, K)
    stack = PagedStack(held, jnp.asarray(table), layers=layers)
    one = stack.layer(jnp.int32(layer)).append(k_BSGK, v_BSGK, jnp.zeros(B, jnp.int32))
    return one, k_BSGK, v_BSGK


def mask_of(T: int, window: int = 0) -> Mask:
    """Of the last T tokens of each row."""
    at_BT = jnp.asarray(LENGTHS[:, None] - T + np.arange(T))
    at_1S = jnp.arange(M * P)[None]
    return Mask(at_BT, at_1S, jnp.ones_like(at_BT), jnp.ones_like(at_1S), window=window)


def alibi(distance_BTS: jax.Array) -> jax.Array:
    return -jnp.asarray(slopes(H))[:, None, None] * distance_BTS[:, None]


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize(
    ("change", "window", "extra"),
    [({}, 0, False), ({"cap": 2.0}, 0, False), ({}, 9, False), ({"bias": alibi}, 0, False), ({}, 0, True)],
)
def test_attention_over_pages_is_attention_over_rows(change, window, extra, T):
    one, k_BSGK, v_BSGK = filled()
    scores = Scores(0.4, HERE, **change)
    q_BTHK, more = normal(3, B, T, H, K), None
    if extra:
        more = (normal(4, 1, 2, G, K), normal(5, 1, 2, G, K))
    mask = mask_of(T, window)
    got = (
        jax.jit(attend_pages, static_argnames=())(q_BTHK, one.held, one.table_BM, mask, scores, more)
        if False
        else attend_pages(q_BTHK, one.held, one.table_BM, mask, scores, more)
    )
    want = attend(q_BTHK, k_BSGK, v_BSGK, mask, scores, "xla", more)
    np.testing.assert_allclose(got, want, atol=2e-6)


def test_other_rows_change_no_bit():
    """Neither their lengths, which decide how many blocks are read, nor what they hold."""
    one, *_ = filled()
    mask = mask_of(1)
    scores, q_BTHK = Scores(0.4, HERE), normal(3, B, 1, H, K)
    run = jax.jit(lambda q, table, at: attend_pages(q, one.held, table, replace(mask, q_index_BT=at), scores))
    together = run(q_BTHK, one.table_BM, mask.q_index_BT)
    for row in range(B):
        only = np.arange(B) == row
        alone = run(
            jnp.where(only[:, None, None, None], q_BTHK, 7.0),
            jnp.where(only[:, None], one.table_BM, 0),
            jnp.where(only[:, None], mask.q_index_BT, 0),
        )
        np.testing.assert_array_equal(alone[row], together[row])


def test_layers_of_one_pool_keep_apart():
    one, k_BSGK, v_BSGK = filled(layers=3, layer=1)
    np.testing.assert_array_equal(one.k_BSGK, k_BSGK)
    np.testing.assert_array_equal(one.v_BSGK, v_BSGK)
    pages = len(one.held.kv_NPCK) // 3
    assert not np.any(one.held.kv_NPCK[:pages]) and not np.any(one.held.kv_NPCK[2 * pages :])


def test_what_has_no_place_is_written_to_page_0():
    one, k_BSGK, v_BSGK = filled()
    more = replace(one, real_B=jnp.asarray([2, 0, 4]))
    start_B = jnp.asarray([5, 9, M * P - 2])  # the last row would leave its pages
    new_BTGK = normal(6, B, 4, G, K)
    new, want = more.append(new_BTGK, new_BTGK, start_B), np.stack([k_BSGK, v_BSGK])
    for row, (start, count) in enumerate([(5, 2), (9, 0), (M * P - 2, 2)]):
        want[:, row, start : start + count] = new_BTGK[row, :count]
    np.testing.assert_array_equal(np.stack([new.k_BSGK, new.v_BSGK]), want)


def test_eight_bits_are_within_half_a_step():
    one, k_BSGK, v_BSGK = filled(int8=True)
    assert one.held.kv_NPCK.dtype == jnp.int8
    for got, want in ((one.k_BSGK, k_BSGK), (one.v_BSGK, v_BSGK)):
        step = np.abs(np.asarray(want)).max(axis=-1, keepdims=True) / 127
        assert np.all(np.abs(got - want) <= 0.5001 * step)


V5E = Target("tpu", "TPU v5 lite")
LARGE = GPT(vocab_size=64, context=64, layers=1, width=1024, heads=8, kv_heads=4)


@pytest.mark.parametrize(
    ("model", "dtype", "target", "name"),
    [
        (LARGE, "bfloat16", V5E, "ragged"),
        (LARGE, "bfloat16", Target("gpu", "NVIDIA H100 80GB HBM3"), "xla"),
        (replace(LARGE, width=512), "bfloat16", V5E, "xla"),
        (replace(LARGE, position="alibi"), "bfloat16", V5E, "xla"),
        (replace(LARGE, kv_heads=1), "float32", V5E, "ragged"),
    ],
)
def test_the_kernel_of_a_target(model, dtype, target, name):
    assert pick_paged(model, Compute(dtype=dtype), target) == name
    assert pick_paged(model, Compute(dtype=dtype), target, int8=True) == "xla"


@pytest.mark.parametrize(("T", "window", "cap"), [(1, 0, None), (3, 0, None), (3, 9, 2.0)])
def test_the_tpu_kernel_is_told_the_same(T, window, cap, monkeypatch):
    """JAX's own reference of its kernel runs in the kernel's place, which no interpreter runs."""
    import jax.experimental.pallas.ops.tpu.ragged_paged_attention as package
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention.kernel import ref_ragged_paged_attention

    def reference(*args: Any, num_kv_pages_per_block: int, num_queries_per_block: int, **how: Any) -> Any:
        assert num_kv_pages_per_block <= M and num_queries_per_block <= B * T
        return ref_ragged_paged_attention(*args, **how)

    monkeypatch.setattr(package, "ragged_paged_attention", reference)
    one, *_ = filled()
    mask, scores, q_BTHK = mask_of(T, window), Scores(0.4, HERE, cap), normal(3, B, T, H, K)
    want = attend_pages(q_BTHK, one.held, one.table_BM, mask, scores)
    got = attend_pages(q_BTHK, replace(one.held, kernel="ragged"), one.table_BM, mask, scores)
    np.testing.assert_allclose(got, want, atol=2e-6)
