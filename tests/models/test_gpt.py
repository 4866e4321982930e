"""The decoder: which tokens see which, by gradient; packing; sizes. Golden numbers: tests/convert."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import (
    FLOAT32,
    GPT2,
    HERE,
    MIXED,
    MODELS,
    MODERN,
    ONE,
    VOCABULARY,
    T,
    V,
    assert_close,
    model_of,
    packed,
    place,
    sharp_params,
)

from jaxgpt.batch import Batch
from jaxgpt.config import GPT, CausalLM, Compute
from jaxgpt.models import abstract_model, decoding_params, flops_per_token, parameter_counts
from jaxgpt.objectives import causal_lm
from jaxgpt.target import Target

OBJECTIVE = causal_lm(CausalLM(), VOCABULARY)
forms = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
meshes = pytest.mark.parametrize("sizes", [ONE, MIXED], ids=["one device", "eight devices"])


def reach(model: GPT, sizes: dict[str, int], segments: list[int]) -> np.ndarray:
    """[T, T]: magnitude of the gradient of the loss at position t by the input vector at position s."""
    on, gradients = _reach(model, tuple(sizes.items()))
    with jax.set_mesh(on):
        return np.abs(np.asarray(gradients(jnp.asarray([segments])))).max(-1)


@cache
def _reach(model: GPT, sizes: tuple) -> tuple[jax.sharding.Mesh, Callable[[jax.Array], jax.Array]]:
    # Every token occurs once, so a row of the embedding corresponds to one input position. Positions are
    # 0, 1, ... through the whole row, so the same holds for the position table, if there is one. The targets
    # are different ids than the inputs, so no gradient comes through the output projection.
    tokens, positions = jnp.arange(1, T + 1)[None], jnp.arange(T)[None]
    table, rows = ("position", slice(T)) if model.position == "learned" else ("embed", slice(1, T + 1))
    on, params = place(model, sharp_params(model), dict(sizes))
    build = model_of(model)

    def loss(inputs: jax.Array, weights_T: jax.Array, segments_BT: jax.Array) -> jax.Array:
        batch = Batch(tokens, tokens + T, weights_T[None], segments_BT, positions)
        return OBJECTIVE(build(params | {table: {"weight": inputs}}), batch, None)[0]

    @jax.jit
    def gradients(segments_BT: jax.Array) -> jax.Array:
        by_place = jax.vmap(jax.grad(loss), (None, 0, None))
        return by_place(params[table]["weight"], jnp.eye(T, dtype=jnp.float32), segments_BT)[:, rows]

    return on, gradients


@meshes
@forms
def test_a_token_sees_itself_and_what_came_before(model: GPT, sizes: dict[str, int]) -> None:
    size_TT = reach(model, sizes, [1] * 16)
    before = np.tri(16, dtype=bool)
    assert (size_TT[~before] == 0).all()
    assert (size_TT[before] > 1e-6).all()


@meshes
@forms
def test_a_token_sees_only_its_own_document(model: GPT, sizes: dict[str, int]) -> None:
    segments = np.array([1] * 6 + [2] * 5 + [3] * 5)
    size_TT = reach(model, sizes, segments.tolist())
    seen = np.tri(16, dtype=bool) & (segments[:, None] == segments)
    assert (size_TT[~seen] == 0).all()
    assert (size_TT[seen] > 1e-6).all()


@forms
def test_a_window_hides_tokens_further_back(model: GPT) -> None:
    size_TT = reach(replace(model, layers=1, windows=(4,)), ONE, [1] * 16)
    back_TT = np.arange(16)[:, None] - np.arange(16)
    assert (size_TT[(back_TT < 0) | (back_TT >= 4)] == 0).all()
    assert (size_TT[(back_TT >= 0) & (back_TT < 4)] > 1e-6).all()


def test_windows_differ_by_layer() -> None:
    # Two layers with window 4 reach 7 tokens, including the token itself; (4, 0) reaches all.
    size_TT = reach(replace(MODERN, windows=(4,)), ONE, [1] * 16)
    back_TT = np.arange(16)[:, None] - np.arange(16)
    assert (size_TT[back_TT >= 7] == 0).all()
    assert (size_TT[(back_TT >= 0) & (back_TT < 7)] > 0).all()


@meshes
@forms
def test_documents_of_a_row_do_not_leak(model: GPT, sizes: dict[str, int]) -> None:
    rows = 8
    batch = packed([(7, 9)] * rows)
    on, params = place(model, sharp_params(model), sizes)
    build = model_of(model)

    @jax.jit
    def logits(tokens_BT: jax.Array) -> jax.Array:
        decoder = build(params)
        return decoder.logits(decoder.hidden(replace(batch, tokens_BT=tokens_BT)).x_BTD)

    with jax.set_mesh(on):
        before = np.asarray(logits(batch.tokens_BT))
        first = np.asarray(logits(batch.tokens_BT.at[:, :7].add(1) % V))
        second = np.asarray(logits(batch.tokens_BT.at[:, 7:].add(1) % V))
    np.testing.assert_array_equal(first[:, 7:], before[:, 7:])
    np.testing.assert_array_equal(second[:, :7], before[:, :7])
    assert (first[:, :7] != before[:, :7]).any(-1).all()
    assert (second[:, 7:] != before[:, 7:]).any(-1).all()


@meshes
@forms
def test_packed_equals_unpacked(model: GPT, sizes: dict[str, int]) -> None:
    together = packed([(7, 4, 5)] * 4 + [(3, 12)] * 4)
    apart = unpacked(together)
    on, params = place(model, sharp_params(model), sizes)
    build = model_of(model)

    @jax.jit
    def loss(params: dict, batch: Batch) -> tuple[jax.Array, dict]:
        def of(params: dict) -> jax.Array:
            return OBJECTIVE(build(params), batch, None)[0]

        return jax.value_and_grad(of)(params)

    with jax.set_mesh(on):
        (loss_a, grads_a), (loss_b, grads_b) = loss(params, together), loss(params, apart)
    assert_close(loss_a, loss_b, 1e-5)
    assert_close(grads_a, grads_b, 1e-5)


def unpacked(batch: Batch) -> Batch:
    """Every document in its own row, with rows of padding up to a multiple of eight."""
    rows: list[dict[str, np.ndarray]] = []
    names = ("tokens_BT", "targets_BT", "weights_BT", "segments_BT", "positions_BT")
    columns = {name: np.asarray(getattr(batch, name)) for name in names}
    for row, segments in enumerate(columns["segments_BT"]):
        for number in range(1, segments.max() + 1):
            places = np.flatnonzero(segments == number)
            new = {name: np.zeros_like(values[row]) for name, values in columns.items()}
            for name, values in columns.items():
                new[name][: len(places)] = values[row, places]
            rows.append(new)
    while len(rows) % 8:
        rows.append({name: np.zeros_like(values) for name, values in rows[0].items()})
    return Batch(**{name: jnp.asarray(np.stack([r[name] for r in rows])) for name in columns})


@forms
def test_scanned_and_unstacked_layers_agree(model: GPT) -> None:
    batch, params = packed([(9, 7)] * 2), sharp_params(model)
    apart = nnx.merge(abstract_model(model, FLOAT32, HERE, scanned=False)[0], decoding_params(model, params))
    whole = model_of(model)(params)
    a, b = jax.jit(lambda batch: (whole.hidden(batch), apart.hidden(batch)))(batch)
    assert_close(a, b, 1e-5)


def test_dropout_needs_a_key_and_differs_by_layer_and_key() -> None:
    model = replace(GPT2, dropout=0.5)
    batch, params = packed([(9, 7)] * 2), sharp_params(model)

    @jax.jit
    def hidden(key: jax.Array | None) -> jax.Array:
        return model_of(model)(params).hidden(batch, key).x_BTD

    calm, a, b = (np.asarray(hidden(key)) for key in (None, jax.random.key(0), jax.random.key(1)))
    assert np.abs(a - b).max() > 0.1
    assert np.abs(a - calm).max() > 0.1
    np.testing.assert_array_equal(a, np.asarray(hidden(jax.random.key(0))))


@forms
@pytest.mark.parametrize("windows", [(), (5,), (4, 0)], ids=["full", "window", "alternating"])
def test_the_tpu_kernel_changes_nothing(model: GPT, windows: tuple[int, ...]) -> None:
    """Three scanned layers: with alternating windows, one period and a remainder."""
    model = replace(model, windows=windows, layers=3)
    batch, params = packed([(9, 7)] * 2), sharp_params(model)
    tpu, compute = Target("tpu", "TPU v5p", interpret=True), replace(FLOAT32, attention="splash", strict=True)

    def hidden(compute: Compute, target: Target) -> jax.Array:
        graphdef = abstract_model(model, compute, target)[0]
        return jax.jit(lambda params: nnx.merge(graphdef, params).hidden(batch).x_BTD)(params)

    assert_close(hidden(compute, tpu), hidden(FLOAT32, HERE), 1e-5)


@forms
def test_half_precision_runs_and_is_close(model: GPT) -> None:
    batch, params = packed([(9, 7)] * 2), sharp_params(model)

    def logits(compute: Compute) -> np.ndarray:
        decoder = model_of(model, compute)(params)
        x_BTD = jax.jit(decoder.hidden)(batch).x_BTD
        assert x_BTD.dtype == compute.dtype
        return np.asarray(decoder.logits(x_BTD))

    a, b = logits(FLOAT32), logits(replace(FLOAT32, dtype="bfloat16"))
    assert b.dtype == np.float32
    assert np.abs(a - b).max() < 0.1 * np.abs(a).max()


def test_gpt2_has_its_published_size() -> None:
    counts = parameter_counts(GPT(vocab_size=50257))
    assert counts["total"] == 124_439_808
    assert counts["non_embedding"] == 124_439_808 - (50257 + 1024) * 768
    assert parameter_counts(GPT(vocab_size=50257, layers=48, width=1600, heads=25))["total"] == 1_557_611_200


def test_the_current_form_has_llamas_published_size() -> None:
    llama3 = GPT(
        vocab_size=128_256, context=8192, layers=32, width=4096, heads=32, kv_heads=8,
        mlp_width=14_336, position="rope", norm="rmsnorm", mlp="swiglu", bias=False, tied=False,
    )  # fmt: skip
    assert parameter_counts(llama3)["total"] == 8_030_261_248


def test_flops_count_the_output_projection_once_and_windows_by_their_span() -> None:
    model = GPT(vocab_size=50257)
    products = 124_439_808 - 1024 * 768
    assert flops_per_token(model, 1024) == 6 * products + 12 * 12 * 768 * 1024
    narrow = replace(model, windows=(128, 0))
    assert flops_per_token(narrow, 1024) == 6 * products + 12 * 6 * 768 * (1024 + 128)
