"""Attention against its definition; who sees whom; which kernel computes it.

Shapes: B batch, T queries, S keys, H heads, G key-value heads, K head width, D width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import HERE, MIXED, mesh

from jaxgpt.config import GPT, Compute, UserError
from jaxgpt.layers.attention import Attention, Mask, Seen, attend, pick_kernel
from jaxgpt.layers.position import frequencies
from jaxgpt.target import Target

FLOAT32 = Compute(dtype="float32", attention="xla")
B, T, K = 2, 6, 4
ATTEND = jax.jit(attend)


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.float32(np.random.default_rng(seed).standard_normal(shape))


def definition(
    q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, sees: Callable[[int, int, int], bool]
) -> np.ndarray:
    """Softmax attention, one query of one head at a time, in float64 and without jax.

    The query heads h of a group, H / G neighbours, share one key-value head.
    """
    q, k, v = (np.asarray(a, np.float64) for a in (q_BTHK, k_BSGK, v_BSGK))
    y = np.zeros(q.shape)
    for b, t, h in np.ndindex(q.shape[:3]):
        g = h // (q.shape[2] // k.shape[2])
        keys = [s for s in range(k.shape[1]) if sees(b, t, s)]
        powers = [np.exp(sum(q[b, t, h] * k[b, s, g]) / q.shape[-1] ** 0.5) for s in keys]
        y[b, t, h] = sum(p * v[b, s, g] for s, p in zip(keys, powers, strict=True)) / sum(powers)
    return y


def square_mask(segments: list[list[int]], *, causal: bool = True) -> Mask:
    """The mask of packed rows, as training makes it."""
    segments_BT = jnp.asarray(segments)
    index_BT = jnp.broadcast_to(jnp.arange(segments_BT.shape[1]), segments_BT.shape)
    return Mask(index_BT, index_BT, segments_BT, segments_BT, causal=causal)


SEGMENTS = [[1, 1, 1, 1, 1, 1], [1, 1, 2, 2, 2, 0]]


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (6, 2), (4, 1)])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both ways"])
def test_attention_is_its_definition(heads: int, groups: int, causal: bool) -> None:
    q, k, v = 3 * normal(0, B, T, heads, K), normal(1, B, T, groups, K), normal(2, B, T, groups, K)
    mask_BTT = square_mask(SEGMENTS, causal=causal).dense()
    y = ATTEND(q, k, v, mask_BTT)

    def sees(b: int, t: int, s: int) -> bool:
        return SEGMENTS[b][t] == SEGMENTS[b][s] and (s <= t or not causal)

    np.testing.assert_allclose(y, definition(q, k, v, sees), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [1, 3, 99])
def test_a_window_counts_the_token_itself(window: int) -> None:
    q, k, v = (normal(seed, B, T, 2, K) for seed in range(3))
    dense = jax.jit(lambda mask, window: mask.dense(window))  # a window is scanned beside its layer
    y = ATTEND(q, k, v, dense(square_mask(SEGMENTS), window))

    def sees(b: int, t: int, s: int) -> bool:
        return SEGMENTS[b][t] == SEGMENTS[b][s] and t - window < s <= t

    np.testing.assert_allclose(y, definition(q, k, v, sees), rtol=1e-5, atol=1e-5)
    if window == 1:
        np.testing.assert_allclose(y, v, rtol=1e-6)


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.integers(0, 3), min_size=5, max_size=5),
    st.lists(st.integers(0, 9), min_size=5, max_size=5),
    st.none() | st.integers(1, 10),
    st.booleans(),
)
def test_a_mask_says_who_sees_whom(
    segments: list[int], index: list[int], window: int | None, causal: bool
) -> None:
    """Of queries and keys that are not the same tokens, as in decoding with a cache."""
    q_index, k_index, q_segments, k_segments = index[:2], index[2:], segments[:2], segments[2:]
    arrays = (jnp.asarray([a]) for a in (q_index, k_index, q_segments, k_segments))
    mask = Mask(*arrays, causal=causal)
    if window is not None and not causal:
        with pytest.raises(UserError, match=r"set model\.causal=True or model\.windows="):
            mask.dense(window)
        return
    seen = np.asarray(mask.dense(window))[0]
    for t, s in np.ndindex(2, 3):
        back = q_index[t] - k_index[s]
        expected = q_segments[t] == k_segments[s] and (not causal or back >= 0)
        assert seen[t, s] == (expected and (window is None or back < window))


def test_large_scores_neither_overflow_nor_hide_their_gradient() -> None:
    q, k, v = 1e4 * normal(0, B, T, 2, K), 1e4 * normal(1, B, T, 2, K), normal(2, B, T, 2, K)
    mask_BTT = square_mask(SEGMENTS).dense()
    y, back = jax.vjp(lambda q, k, v: attend(q, k, v, mask_BTT), q, k, v)
    assert np.isfinite(y).all()
    assert all(np.isfinite(g).all() for g in back(jnp.ones_like(y)))


def test_scores_and_softmax_stay_float32_in_half_precision() -> None:
    """Many keys of nearly equal weight: probabilities summed in bfloat16 would not reach 1."""
    q, k = jnp.zeros((1, 1, 1, K), jnp.bfloat16), jnp.zeros((1, 3000, 1, K), jnp.bfloat16)
    v = jnp.ones((1, 3000, 1, K), jnp.bfloat16)
    y = ATTEND(q, k, v, jnp.ones((1, 1, 3000), bool))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(y, np.float32), 1, rtol=1e-2)
    # Scores of 256 and 257 are one number in bfloat16.
    q = jnp.full((1, 1, 1, 4), 16.0, jnp.bfloat16)
    k = jnp.asarray([[[[8.0] * 4], [[8.0] * 3 + [8.0625]]]], jnp.bfloat16)
    v = jnp.asarray([[[[0.0] * 4], [[1.0] * 4]]], jnp.bfloat16)
    y = ATTEND(q, k, v, jnp.ones((1, 1, 2), bool))
    expected = 1 / (1 + np.exp(-16 * 0.0625 / 2))
    np.testing.assert_allclose(np.asarray(y, np.float32)[0, 0, 0], expected, rtol=1e-2)


# -------------------------------------------------------------------------------- the module

MODEL = GPT(vocab_size=8, context=T, layers=2, width=12, heads=4, kv_heads=2, head_width=6)


def build(model: GPT) -> Attention:
    """An attention layer whose parameters are all random: biases and scales too."""
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
    mask = square_mask(SEGMENTS)
    frequency_K = frequencies(model, 0) if model.position == "rope" else None
    y_BTD, cache = jax.jit(lambda x: layer(x, positions_BT, Seen(mask.dense()), frequency_K))(x_BTD)
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
    seen = np.asarray(mask.dense())
    y = definition(q, k, v, lambda b, t, s: seen[b, t, s])
    y = np.tensordot(y, np.asarray(layer.out.weight[...]), 2)
    y = y if layer.out.bias is None else y + np.asarray(layer.out.bias[...])
    np.testing.assert_allclose(y_BTD, y, rtol=1e-4, atol=1e-4)


# -------------------------------------------------------------------------------- the kernel


@pytest.fixture
def _fresh():
    """The choice is made, and said, once a process."""
    pick_kernel.cache_clear()
    yield
    pick_kernel.cache_clear()


@pytest.mark.usefixtures("_fresh")
@pytest.mark.parametrize(
    ("asked", "level", "words"),
    [
        ("auto", logging.INFO, "attention kernel: xla"),
        (
            "cudnn",
            logging.WARNING,
            "attention kernel: xla instead of cudnn, because it needs a GPU, not a CPU",
        ),
        (
            "splash",
            logging.WARNING,
            "attention kernel: xla instead of splash, because it needs a TPU, not a CPU",
        ),
        ("xla", None, ""),
    ],
)
def test_the_kernel_is_picked_once_and_said(
    asked: str, level: int | None, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "jaxgpt")
    for _ in range(2):
        assert pick_kernel(MODEL, Compute(attention=asked), HERE) == "xla"
    assert [r.levelno for r in caplog.records] == [level] * (level is not None)
    assert caplog.text.count(words or "attention kernel") == (level is not None)


@pytest.mark.usefixtures("_fresh")
@pytest.mark.parametrize(
    ("platform", "model", "compute", "kernel"),
    [
        ("gpu", GPT(), Compute(), "cudnn"),
        ("gpu", GPT(), Compute(dtype="float32"), "compute.dtype bfloat16, not float32"),
        ("gpu", GPT(head_width=100), Compute(), "multiple of 8 up to 128, not 100"),
        ("gpu", GPT(), Compute(attention="splash"), "a TPU, not a GPU"),
        ("tpu", GPT(windows=(64,)), Compute(dtype="float32"), "splash"),
        ("tpu", GPT(windows=(64, 0)), Compute(), r"same window in every layer, not model.windows \(64, 0\)"),
        ("tpu", GPT(windows=(64, 0)), Compute(attention="xla"), "xla"),
    ],
)
def test_a_platform_takes_its_fastest_or_says_why_not(
    platform: str,
    model: GPT,
    compute: Compute,
    kernel: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    target = Target(platform, platform)
    if " " not in kernel:
        assert pick_kernel(model, replace(compute, strict=True), target) == kernel
        return
    assert pick_kernel(model, compute, target) == "xla"
    assert caplog.records[0].levelno == logging.WARNING
    with pytest.raises(UserError, match=f"cannot run here: it needs a?.*{kernel}; use 'xla'"):
        pick_kernel(model, replace(compute, strict=True), target)


@pytest.mark.usefixtures("_fresh")
def test_strict_raises_instead_of_falling_back() -> None:
    message = "compute.attention is 'cudnn' but cudnn cannot run here: it needs a GPU, not a CPU; use 'xla'"
    with pytest.raises(UserError, match=message):
        pick_kernel(MODEL, Compute(attention="cudnn", strict=True), HERE)
    assert pick_kernel(MODEL, Compute(attention="auto", strict=True), HERE) == "xla"  # nothing faster is here


@pytest.mark.parametrize(
    ("causal", "window"),
    [(True, 0), (True, 33), (False, 0)],
    ids=["causal", "window", "both ways"],
)
@pytest.mark.parametrize("sizes", [{}, MIXED], ids=["one device", "eight"])
def test_splash_attention_equals_the_plain_one(causal: bool, window: int, sizes: dict[str, int]) -> None:
    """The TPU kernel itself, interpreted: values and gradients, a length that is no multiple of its
    tiles, documents, grouped queries, rows and heads spread over a mesh.
    """
    rng = np.random.default_rng(0)
    long = 150
    segments = np.sort(rng.integers(1, 4, (4, long)), axis=1)
    mask = replace(square_mask(segments.tolist(), causal=causal), window=window)
    q, k, v, cotangent = (normal(i, 4, long, heads, 16) for i, heads in enumerate((4, 2, 2, 4)))

    @jax.jit
    def both(seen: Mask | jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        y, back = jax.vjp(lambda q, k, v: attend(q, k, v, seen, interpret=True), q, k, v)
        return y, back(cotangent)

    plain = both(mask.dense())
    with jax.set_mesh(mesh(sizes)) if sizes else nullcontext():
        found = both(mask)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
