"""Attention against its definition; every kernel that runs here against plain attention; the choice.

Shapes: B batch, T queries, S keys, P extra keys, H heads, G key-value heads, K head size, M documents.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import HERE, MIXED, mesh

from jaxgpt.config import GPT, Compute
from jaxgpt.errors import UserError
from jaxgpt.layers.kernels import attend, base, gpu, pick_kernel
from jaxgpt.layers.kernels.base import Scores
from jaxgpt.layers.kernels.gpu import Documents, packed_attention
from jaxgpt.layers.mask import Mask
from jaxgpt.target import Target

B, T, K = 2, 6, 4
SCORES = Scores(K**-0.5, HERE)
ATTEND = jax.jit(attend, static_argnames=("scores", "kernel"))
TPU = Target("tpu", "TPU v5p", interpret=True)
H100 = "NVIDIA H100 80GB HBM3"


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.float32(np.random.default_rng(seed).standard_normal(shape))


def definition(
    q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, sees: Callable[[int, int, int], bool]
) -> np.ndarray:
    """Softmax attention, one query of one head at a time, in float64 and without jax.

    The H / G neighbouring heads of a group share one key-value head.
    """
    q, k, v = (np.asarray(a, np.float64) for a in (q_BTHK, k_BSGK, v_BSGK))
    y = np.zeros(q.shape)
    for b, t, h in np.ndindex(q.shape[:3]):
        g = h // (q.shape[2] // k.shape[2])
        keys = [s for s in range(k.shape[1]) if sees(b, t, s)]
        powers = [np.exp(sum(q[b, t, h] * k[b, s, g]) / q.shape[-1] ** 0.5) for s in keys]
        y[b, t, h] = sum(p * v[b, s, g] for s, p in zip(keys, powers, strict=True)) / sum(powers)
    return y


SEGMENTS = [[1, 1, 1, 1, 1, 1], [1, 1, 2, 2, 2, 0]]
ROWS = Mask.of_rows(jnp.asarray(SEGMENTS))


def everyone(queries: int, keys: int) -> Mask:
    """Every query sees every key."""
    q, k = jnp.zeros((1, queries), jnp.int32), jnp.zeros((1, keys), jnp.int32)
    return Mask(q, k, q, k, causal=False)


# -------------------------------------------------------------------------------- the plain one


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (6, 2), (4, 1)])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both ways"])
def test_attention_is_its_definition(heads: int, groups: int, causal: bool) -> None:
    q, k, v = 3 * normal(0, B, T, heads, K), normal(1, B, T, groups, K), normal(2, B, T, groups, K)
    y = ATTEND(q, k, v, replace(ROWS, causal=causal), SCORES)

    def sees(b: int, t: int, s: int) -> bool:
        return SEGMENTS[b][t] == SEGMENTS[b][s] and (s <= t or not causal)

    np.testing.assert_allclose(y, definition(q, k, v, sees), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [1, 3, 99])
def test_a_window_counts_the_token_itself(window: int) -> None:
    q, k, v = (normal(seed, B, T, 2, K) for seed in range(3))
    y = ATTEND(q, k, v, replace(ROWS, window=window), SCORES)

    def sees(b: int, t: int, s: int) -> bool:
        return SEGMENTS[b][t] == SEGMENTS[b][s] and t - window < s <= t

    np.testing.assert_allclose(y, definition(q, k, v, sees), rtol=1e-5, atol=1e-5)
    if window == 1:
        np.testing.assert_allclose(y, v, rtol=1e-6)


def test_large_scores_neither_overflow_nor_hide_their_gradient() -> None:
    q, k, v = 1e4 * normal(0, B, T, 2, K), 1e4 * normal(1, B, T, 2, K), normal(2, B, T, 2, K)
    y, back = jax.vjp(lambda q, k, v: attend(q, k, v, ROWS, SCORES), q, k, v)
    assert np.isfinite(y).all()
    assert all(np.isfinite(g).all() for g in back(jnp.ones_like(y)))


def test_scores_and_softmax_stay_float32_in_half_precision() -> None:
    """Many keys of nearly equal weight: probabilities summed in bfloat16 would not reach 1."""
    q, k = jnp.zeros((1, 1, 1, K), jnp.bfloat16), jnp.zeros((1, 3000, 1, K), jnp.bfloat16)
    v = jnp.ones((1, 3000, 1, K), jnp.bfloat16)
    y = ATTEND(q, k, v, everyone(1, 3000), SCORES)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(y, np.float32), 1, rtol=1e-2)
    # Scores of 256 and 257 are one number in bfloat16.
    q = jnp.full((1, 1, 1, 4), 16.0, jnp.bfloat16)
    k = jnp.asarray([[[[8.0] * 4], [[8.0] * 3 + [8.0625]]]], jnp.bfloat16)
    v = jnp.asarray([[[[0.0] * 4], [[1.0] * 4]]], jnp.bfloat16)
    y = ATTEND(q, k, v, everyone(1, 2), SCORES)
    expected = 1 / (1 + np.exp(-16 * 0.0625 / 2))
    np.testing.assert_allclose(np.asarray(y, np.float32)[0, 0, 0], expected, rtol=1e-2)


# -------------------------------------------------------------------------------- every kernel


def both(
    mask: Mask, scores: Scores, kernel: str, arrays: Any, sizes: dict[str, int] | None = None
) -> tuple[jax.Array, Any]:
    """Values and gradients by queries, keys, values and extra keys and values, if there are any."""
    *given, dy = arrays

    @jax.jit
    def run(mask: Mask, dy: jax.Array, *given: jax.Array) -> tuple[jax.Array, Any]:
        def one(q: jax.Array, k: jax.Array, v: jax.Array, *extra: jax.Array) -> jax.Array:
            return attend(q, k, v, mask, scores, kernel, tuple(extra) or None)

        y, back = jax.vjp(one, *given)
        return y, back(dy)

    with jax.set_mesh(mesh(sizes)) if sizes else nullcontext():
        return run(mask, dy, *given)


def documents(rows: int, length: int, causal: bool = True) -> Mask:
    """Rows of a few documents."""
    random = np.random.default_rng(0)
    return Mask.of_rows(jnp.asarray(np.sort(random.integers(1, 4, (rows, length)), axis=1)), causal=causal)


def assert_near(found: Any, expected: Any) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("causal", "window", "cap", "width"),
    [(True, 0, None, 16), (True, 33, 2.0, 16), (False, 0, None, 16), (True, 0, 2.0, 256)],
    ids=["causal", "window and cap", "both ways", "wide and cap"],
)
@pytest.mark.parametrize("sizes", [{}, MIXED], ids=["one device", "eight"])
def test_splash_attention_equals_the_plain_one(
    causal: bool, window: int, cap: float | None, width: int, sizes: dict[str, int]
) -> None:
    """The TPU kernel itself in interpret mode: values and gradients, a length that is not a multiple of its
    tiles, documents, grouped queries, rows and heads sharded over a mesh.
    """
    long = 150
    mask = replace(documents(4, long, causal), window=window)
    arrays = [normal(i, 4, long, heads, width) for i, heads in enumerate((4, 2, 2, 4))]
    scores = Scores(width**-0.5, TPU, cap)
    assert_near(both(mask, scores, "splash", arrays, sizes), both(mask, scores, "xla", arrays))


def slopes(back_BTS: jax.Array) -> jax.Array:
    return -0.1 * jnp.arange(4)[:, None, None] * jnp.abs(back_BTS)[:, None]


@pytest.mark.parametrize("window", [0, 50, 200])
@pytest.mark.parametrize("bias", [None, slopes], ids=["", "bias"])
def test_a_cpu_leaves_out_keys_that_no_query_sees(
    window: int, bias: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and gradients are those of whole rows, and no score of all queries and keys is held."""
    mask = replace(documents(2, 420), window=window)
    arrays = [normal(i, 2, 420, heads, K) for i, heads in enumerate((4, 2, 2, 4))]
    scores = Scores(K**-0.5, HERE, 2.0, bias)
    found = both(mask, scores, "xla", arrays)
    held = jax.jit(lambda q, k, v: attend(q, k, v, mask, scores)).lower(*arrays[:3]).as_text()
    assert "x420x420x" not in held
    monkeypatch.setattr(base, "BLOCKS", 1)
    assert_near(found, both(mask, scores, "xla", arrays))


def test_leaving_out_keys_keeps_log_sum_exps_and_float32_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """With extra keys, which the log-sum-exps merge; and gradients of bfloat16 keys, which blocks add up."""
    mask, scores = documents(2, 420), Scores(K**-0.5, HERE)
    arrays = [normal(i, 2, 420, heads, K) for i, heads in enumerate((4, 2, 2))]
    extra, dy = [normal(i, 1, 3, 2, K) for i in (3, 4)], normal(5, 2, 420, 4, K)
    half = [x.astype(jnp.bfloat16) for x in (*arrays, dy)]
    found, rounded = both(mask, scores, "xla", [*arrays, *extra, dy]), both(mask, scores, "xla", half)
    exact = both(mask, scores, "xla", [x.astype(jnp.float32) for x in half])
    monkeypatch.setattr(base, "BLOCKS", 1)
    assert_near(found, both(mask, scores, "xla", [*arrays, *extra, dy]))
    whole = both(mask, scores, "xla", half)

    def error(made: Any) -> list[float]:
        pairs = zip(jax.tree.leaves(made), jax.tree.leaves(exact), strict=True)
        return [float(jnp.linalg.norm(a.astype(jnp.float32) - b) / jnp.linalg.norm(b)) for a, b in pairs]

    assert np.all(np.array(error(rounded)) <= 1.2 * np.array(error(whole)))


@pytest.mark.parametrize("bias", [None, slopes], ids=["", "bias"])
def test_attention_by_chunks_of_queries_is_attention(bias: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As accelerators compute `xla`; the last chunk is incomplete."""
    monkeypatch.setattr(base, "PAIRS", 1)
    mask = replace(documents(2, 300), window=50)
    arrays = [normal(i, 2, 300, heads, K) for i, heads in enumerate((4, 2, 2, 4))]
    plain, chunked = (Scores(1.0, t, 3.0, bias) for t in (HERE, Target("gpu", H100)))
    assert_near(both(mask, chunked, "xla", arrays), both(mask, plain, "xla", arrays))
    held = jax.jit(lambda q, k, v: attend(q, k, v, mask, chunked)).lower(*arrays[:3]).as_text()
    assert "x128x300x" in held
    assert "x300x300x" not in held


@pytest.mark.parametrize("kernel", ["xla", "splash"])
@pytest.mark.parametrize("sizes", [{}, MIXED], ids=["one device", "eight"])
def test_extra_keys_are_keys_that_every_query_sees(kernel: str, sizes: dict[str, int]) -> None:
    """Attended to separately and merged: values and all gradients as if they preceded the other keys."""
    long, P = 140, 3
    mask = documents(4, long)
    q, k, v, dy = (normal(i, 4, long, heads, 16) for i, heads in enumerate((4, 2, 2, 4)))
    more = [2 * normal(9 + i, 1, P, 2, 16) for i in range(2)]
    found = both(mask, Scores(0.3, TPU), kernel, (q, k, v, *more, dy), sizes)

    def joined(q: jax.Array, k: jax.Array, v: jax.Array, *more: jax.Array) -> jax.Array:
        k, v = (jnp.concatenate([jnp.tile(m, (4, 1, 1, 1)), x], 1) for m, x in zip(more, (k, v), strict=True))
        s = jnp.einsum("bthk,bshk->bhts", q, jnp.repeat(k, 2, 2)) * 0.3
        seen = jnp.pad(mask.dense(), ((0, 0), (0, 0), (P, 0)), constant_values=True)[:, None]
        probs = jax.nn.softmax(jnp.where(seen, s, -1e30), axis=-1)
        return jnp.einsum("bhts,bshk->bthk", probs, jnp.repeat(v, 2, 2))

    y, back = jax.vjp(joined, q, k, v, *more)
    assert_near(found, (y, back(dy)))


# -------------------------------------------------------------------------------- cuDNN's packed layout


def test_cudnns_packed_layout_is_where_we_look_for_it() -> None:
    """A private function: this test shows, at both ends of the version range, which jax moves it."""
    module, problem = packed_attention()
    assert not problem
    assert module.MaskType.PADDING_CAUSAL.name == "PADDING_CAUSAL"


@pytest.mark.parametrize("most", [2, 5])
def test_documents_as_cudnn_reads_them(most: int) -> None:
    """By JAX's own function: the tokens of each document and no others, with all rows in one list."""
    segments = jnp.asarray([[1, 1, 2, 3, 3, 3, 0, 0], [1] * 8, [4, 4, 4, 4, 5, 6, 7, 7]])
    rows, length = segments.shape
    found = Documents.of(segments, most)
    module, _ = packed_attention()
    q = jnp.zeros((rows, length, 1, 1))
    how = (found.tokens_BM, found.tokens_BM, found.starts_BM, found.starts_BM, q, q)
    tokens, _, starts, _ = (np.asarray(x).ravel() for x in module._fix_seqlen_offsets(*how))
    expected = []
    for b, row in enumerate(np.asarray(segments)):
        cuts = [0, *(np.flatnonzero(np.diff(row)) + 1), length]
        expected += [(b * length + s, e - s) for s, e in pairwise(cuts)][:most]
    assert list(zip(starts, tokens, strict=False))[: len(expected)] == expected
    assert not tokens[len(expected) :].any()
    if most == 5:
        lse_NHT = np.full((rows * most, 1, length), np.nan, np.float32)
        for n, (start, count) in enumerate(expected):
            lse_NHT[n, 0, :count] = np.arange(start, start + count)
        np.testing.assert_array_equal(found.unpack(jnp.asarray(lse_NHT)).ravel(), np.arange(rows * length))


class Cudnn:
    """JAX's cuDNN function with offsets as documented, on a CPU; NaN where cuDNN writes nothing."""

    MaskType = packed_attention()[0].MaskType

    @staticmethod
    def dot_product_attention(
        *given: jax.Array, q_seqlen: jax.Array, q_offsets: jax.Array, mask_type: Any, **how: Any
    ) -> Any:
        place_T, starts_BM = jnp.arange(given[0].shape[1]), q_offsets[:, :-1]
        inside_BMT = (place_T >= starts_BM[..., None]) & (place_T < (starts_BM + q_seqlen)[..., None])
        inside_BMT &= starts_BM[..., None] >= 0
        segments_BT = jnp.max(inside_BMT * jnp.arange(1, starts_BM.shape[1] + 1)[:, None], axis=1)
        causal, window = mask_type == Cudnn.MaskType.PADDING_CAUSAL, how["sliding_window_length"] or 0
        scores = Scores(how["scale"], HERE, residual=how["return_residual"])

        def listed(segments_BT: jax.Array, x: jax.Array) -> jax.Array:
            return jnp.where((segments_BT > 0).reshape(*segments_BT.shape, *(1,) * (x.ndim - 2)), x, jnp.nan)

        def plain(segments_BT: jax.Array, *given: jax.Array) -> Any:
            mask = replace(Mask.of_rows(segments_BT, causal=causal), window=window)
            return jax.tree.map(partial(listed, segments_BT), attend(*given, mask, scores))

        def forward(*given: jax.Array) -> Any:
            return plain(*given), given

        def backward(given: tuple[jax.Array, ...], dy: Any) -> Any:
            segments_BT, *given = given
            dy = jax.tree.map(lambda dy: jnp.nan_to_num(listed(segments_BT, dy)), dy)
            grads = jax.vjp(partial(plain, segments_BT), *given)[1](dy)
            return (None, *(listed(segments_BT, g) for g in grads))

        run = jax.custom_vjp(plain)
        run.defvjp(forward, backward)
        return run(segments_BT, *given)


@pytest.mark.parametrize(("causal", "window"), [(True, 0), (True, 3), (False, 0)])
@pytest.mark.parametrize("sizes", [{}, MIXED], ids=["one device", "eight"])
def test_rows_of_any_number_of_documents_are_exact(
    causal: bool, window: int, sizes: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two documents at a time: values and gradients as in plain attention, with one or twelve per row."""
    monkeypatch.setattr(gpu, "DOCUMENTS", 2)
    monkeypatch.setattr(gpu, "packed_attention", lambda: (Cudnn, ""))
    segments = [[1] * 12, [1] * 5 + [2] * 7, [1, 1, 2, 3, 3, 3, 4, 4, 4, 5, 0, 0], list(range(1, 13))]
    mask = replace(Mask.of_rows(jnp.asarray(segments), causal=causal), window=window)
    arrays = [normal(i, 4, 12, heads, K) for i, heads in enumerate((4, 2, 2, 4))]
    assert_near(both(mask, SCORES, "cudnn_packed", arrays, sizes), both(mask, SCORES, "xla", arrays))


# -------------------------------------------------------------------------------- the choice

MODEL = GPT(vocab_size=8, context=T, layers=2, width=12, heads=4, kv_heads=2, head_width=6)


@pytest.fixture
def _fresh():
    """The choice is made and logged once per process."""
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
def test_the_kernel_is_picked_and_logged_once(
    asked: str, level: int | None, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "jaxgpt")
    for _ in range(2):
        assert pick_kernel(MODEL, Compute(attention=asked), HERE) == "xla"
    assert [r.levelno for r in caplog.records] == [level] * (level is not None)
    assert caplog.text.count(words or "attention kernel") == (level is not None)


A100, V5P = Target("gpu", "NVIDIA A100-SXM4-80GB"), Target("tpu", "TPU v5p")
GH200 = Target("gpu", "NVIDIA GH200 480GB")


@pytest.mark.usefixtures("_fresh")
@pytest.mark.parametrize(
    ("target", "model", "compute", "kernel"),
    [
        (GH200, GPT(), Compute(), "cudnn_packed"),
        (GH200, GPT(windows=(64, 0)), Compute(), "cudnn_packed"),
        (GH200, GPT(head_width=256), Compute(), "cudnn_packed"),
        (GH200, GPT(), Compute(attention="cudnn"), "cudnn"),
        (V5P, GPT(windows=(64,)), Compute(dtype="float32"), "splash"),
        (V5P, GPT(windows=(64, 0), attention_softcap=50.0, head_width=256), Compute(), "splash"),
        (V5P, GPT(windows=(64, 0)), Compute(attention="xla"), "xla"),
    ],
)
def test_a_platform_takes_its_fastest(target: Target, model: GPT, compute: Compute, kernel: str) -> None:
    assert pick_kernel(model, replace(compute, strict=True), target) == kernel


@pytest.mark.usefixtures("_fresh")
@pytest.mark.parametrize(
    ("target", "model", "compute", "kernel", "problem"),
    [
        (GH200, GPT(), Compute(dtype="float32"), "xla", "needs compute.dtype bfloat16, not float32"),
        (GH200, GPT(head_width=100), Compute(), "xla", "multiple of 8 up to 256 here, not 100"),
        (GH200, GPT(attention_softcap=50.0), Compute(), "xla", "model.attention_softcap, which is 50.0"),
        (GH200, GPT(), Compute(attention="splash"), "xla", "a TPU, not a GPU"),
        (A100, GPT(), Compute(), "cudnn", "a Hopper or newer GPU, not NVIDIA A100"),
        (A100, GPT(head_width=256), Compute(), "xla", "multiple of 8 up to 128 here, not 256"),
        (GH200, GPT(prefix=True), Compute(), "cudnn", "it does not support model.prefix"),
        (V5P, GPT(prefix=True), Compute(), "xla", "it does not support model.prefix"),
        (V5P, GPT(position="alibi"), Compute(), "xla", "supports no bias, which model.position 'alibi'"),
        (A100, GPT(), Compute(attention="tokamax"), "cudnn", "a Hopper or newer GPU"),
    ],
)
def test_or_says_why_not_and_raises_under_strict(
    target: Target, model: GPT, compute: Compute, kernel: str, problem: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert pick_kernel(model, compute, target) == kernel
    assert caplog.records[0].levelno == logging.WARNING
    with pytest.raises(UserError, match=f"cannot run here: .*{problem}.*; use 'xla'"):
        pick_kernel(model, replace(compute, strict=True), target)


@pytest.mark.usefixtures("_fresh")
def test_extra_keys_need_a_log_sum_exp_that_has_a_gradient(caplog: pytest.LogCaptureFixture) -> None:
    assert pick_kernel(GPT(), Compute(), GH200, extra=True) == "cudnn_packed"
    assert pick_kernel(GPT(), Compute(), V5P, extra=True) == "splash"
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert pick_kernel(GPT(attention_softcap=50.0), Compute(), V5P, extra=True) == "xla"
    assert pick_kernel(GPT(), Compute(), A100, extra=True) == "xla"
    assert "log-sum-exp of capped scores" in caplog.text


@pytest.mark.usefixtures("_fresh")
def test_a_jax_without_the_packed_layout_takes_the_dense_mask(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "jax._src.cudnn", None)
    packed_attention.cache_clear()
    try:
        assert pick_kernel(GPT(), Compute(), GH200) == "cudnn"
    finally:
        packed_attention.cache_clear()
    assert "cudnn (packed rows need a length x length mask) instead of cudnn_packed" in caplog.text
