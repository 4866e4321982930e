"""Transformer-XL: golden numbers, the memory from segment to segment, what tokens see.

Shapes: B batch, T length, M memory, S positions, D hidden size, H heads, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import (
    FLOAT32,
    HERE,
    MESHES,
    ONE,
    VOCABULARY,
    V,
    assert_close,
    compile_step,
    make_run,
    mesh,
    model_of,
    plain,
    sharp_params,
)

from jaxgpt.batch import Batch
from jaxgpt.config import CausalLM, Compute, Optim, Text, Train, TransformerXL
from jaxgpt.errors import UserError
from jaxgpt.layers.cache import init_cache
from jaxgpt.models import abstract_model, decoding_params, flops_per_token, init_memory, parameter_counts
from jaxgpt.models.transformer_xl import Memory, Recurrent, relative_shift, sinusoids
from jaxgpt.objectives import causal_lm
from jaxgpt.sample.generate import Generator
from jaxgpt.sample.settings import Sampling
from jaxgpt.sharding import batch_sharding
from jaxgpt.text.tokenizer import ByteTokenizer
from jaxgpt.train.state import State, init_state, make_program

GOLDENS = Path(__file__).parents[1] / "goldens"
T = 8
COMPUTE = replace(FLOAT32, unroll=1)  # compiles in half the time
XL = TransformerXL(
    vocab_size=V, context=32, segment=T, memory=T, layers=2, width=16, heads=4, mlp_width=32, dropout=0.0
)
# Without ReLU: at its kink, rounding changes the gradient.
ADAPTIVE = replace(XL, cutoffs=(16,), mlp="gelu", div=2, shared_biases=True, norm_at="pre", width=32)
OBJECTIVE = causal_lm(CausalLM(), VOCABULARY)


@cache
def forward(model: TransformerXL) -> Callable[[dict, Batch], tuple[jax.Array, Memory | None]]:
    """A compiled function from parameters and a batch to logits and the memory."""

    def run(params: dict, batch: Batch) -> tuple[jax.Array, Memory | None]:
        decoder = model_of(model, COMPUTE)(params)
        features = decoder.hidden(batch)
        return decoder.logits(features.x_BTD), features.memory

    return jax.jit(run)


def in_turn(model: TransformerXL, params: dict, batch: Batch, length: int, memory: int) -> np.ndarray:
    """Logits of a long batch, in segments of this length with a memory of this many tokens."""
    kept = init_memory(replace(model, memory=memory), COMPUTE, HERE, len(batch.tokens_BT))
    logits = []
    for start in range(0, batch.tokens_BT.shape[1], length):
        part = jax.tree.map(lambda a, s=start: a[:, s : s + length], batch)
        out, kept = forward(model)(params, replace(part, memory=kept))
        logits.append(np.asarray(out))
    return np.concatenate(logits, axis=1)


def streams(rows: int, length: int, seed: int = 0, sizes: tuple[int, ...] = (5, 11, 3)) -> Batch:
    """Rows of documents with these sizes in alternation, numbered along the row, cut differently per row."""
    random = np.random.default_rng(seed)
    tokens = random.integers(1, V, (rows, length + 1))
    ends = np.cumsum(np.resize(sizes, length))
    documents = np.stack([1 + np.searchsorted(ends, r + np.arange(length + 1), "right") for r in range(rows)])
    starts = np.diff(documents, axis=1, prepend=-1) != 0
    positions = np.arange(length + 1) - np.maximum.accumulate(starts * np.arange(length + 1), axis=1)
    same = documents[:, 1:] == documents[:, :-1]
    columns = (tokens[:, :-1], tokens[:, 1:], same, documents[:, :-1], positions[:, :-1])
    types = (np.int32, np.int32, np.float32, np.int32, np.int32)
    return Batch(*(jnp.asarray(c.astype(t)) for c, t in zip(columns, types, strict=True)))


def cut(batch: Batch, length: int = T) -> list[Batch]:
    """Split a long batch into consecutive batches."""
    starts = range(0, batch.tokens_BT.shape[1], length)
    return [jax.tree.map(lambda a, s=s: a[:, s : s + length], batch) for s in starts]


# ---------------------------------------------------------------------------- golden numbers


def golden_params(w: dict[str, np.ndarray], model: TransformerXL) -> dict:
    """The authors' weights in our format."""
    L, D, H, K = model.layers, model.width, model.heads, model.head

    def stack(name: str, *shape: int) -> np.ndarray:
        arrays = [w[f"layers.{i}.{name}"].T for i in range(L)]  # a vector is unchanged
        return np.stack([a.reshape(shape) if shape else a for a in arrays])

    def norm(name: str) -> dict:
        return {"scale": stack(f"{name}.weight"), "bias": stack(f"{name}.bias")}

    qkv = stack("dec_attn.qkv_net.weight", D, 3, H, K)
    attention = {name: {"weight": qkv[:, :, i]} for i, name in enumerate("qkv")}
    attention["relative"] = {"weight": stack("dec_attn.r_net.weight", D, H, K)}
    attention["out"] = {"weight": stack("dec_attn.o_net.weight", H, K, D)}
    mlp = {
        ours: {"weight": stack(f"pos_ff.CoreNet.{i}.weight"), "bias": stack(f"pos_ff.CoreNet.{i}.bias")}
        for ours, i in (("up", 0), ("down", 3))
    }
    norms = {"attention_norm": norm("dec_attn.layer_norm"), "mlp_norm": norm("pos_ff.layer_norm")}
    params = {
        "blocks": {"attention": attention, "mlp": mlp, **norms},
        "biases": {"u": w["r_w_bias"], "v": w["r_r_bias"]},
    }
    tables = {i: {"weight": w[f"word_emb.emb_layers.{i}.weight"]} for i in range(3 if model.div > 1 else 1)}
    bias = np.concatenate([v for k, v in sorted(w.items()) if "out_layers" in k])
    if not model.cutoffs:
        return params | {"embed": tables[0], "bias": bias}
    # The authors' code counts the clusters from the end.
    gates = {"weight": w["crit.cluster_weight"][::-1]}
    adaptive: dict[str, Any] = {"gates": gates, "gates_bias": w["crit.cluster_bias"][::-1], "bias": bias}
    embed: dict[str, Any] = {"tables": tables}
    if model.div > 1:
        embed["projections"] = {i: {"weight": w[f"word_emb.emb_projs.{i}"].T} for i in range(3)}
        adaptive["first"] = {"weight": w["crit.out_projs.0"].T}
    return params | {"embed": embed, "adaptive": adaptive}


GOLDEN = TransformerXL(
    vocab_size=40, segment=6, memory=6, layers=2, width=16, heads=2, mlp_width=24, shared_biases=True
)
CASES = {
    "plain": GOLDEN,
    "same_length": replace(GOLDEN, memory=9, same_length=True, clamp=4),
    "adaptive": replace(GOLDEN, cutoffs=(10, 20)),
    "adaptive_div": replace(GOLDEN, cutoffs=(10, 20), div=2),
}


@pytest.mark.parametrize("name", CASES)
def test_three_segments_equal_the_authors_code(name: str) -> None:
    model, stored = CASES[name], dict(np.load(GOLDENS / f"transformer_xl_{name}.npz"))
    tokens_BT, expected_BTV = jnp.asarray(stored.pop("tokens")), stored.pop("logprobs")
    params = jax.tree.map(jnp.asarray, golden_params(stored, model))
    shapes = nnx.to_pure_dict(abstract_model(model, FLOAT32, HERE)[1])
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)
    logits_BTV = in_turn(model, params, plain(tokens_BT), 6, model.memory)
    np.testing.assert_allclose(jax.nn.log_softmax(logits_BTV), expected_BTV, atol=1e-4)


def test_it_has_its_published_size() -> None:
    # 151M in the paper's table 1, with the 267,735 words of WikiText-103: the table with a bias,
    # three gates with a bias, 16 layers with 5 square matrices, two norms and the MLP, and u and v.
    base = TransformerXL(vocab_size=267_735, cutoffs=(20_000, 40_000, 200_000), shared_biases=True)
    layer = 5 * 410**2 + 4 * 410 + 2 * 410 * 2100 + 2100 + 410
    assert parameter_counts(base)["total"] == (267_735 + 3) * 411 + 16 * layer + 2 * 410 == 151_107_538


def test_flops_count_the_keys_in_memory_and_the_product_by_distance() -> None:
    layer = 4 * 16**2 + 4 * 16 + 2 * 16 * 32 + 32 + 16 + 2 * 16  # without the projection of the sinusoids
    attention = 2 * 3 * 2 * 3 * 16 * (T + 5)  # layers, products, multiply and add, forward and backward
    assert flops_per_token(replace(XL, memory=5), T) == 6 * (2 * layer + V * 16 + V) + attention


# ------------------------------------------------------------------------------- positions


def test_relative_shift_equals_the_naive_formula() -> None:
    random, M = np.random.default_rng(0), 3
    S = M + T
    q_THK, r_SHK = random.standard_normal((T, 2, 4)), random.standard_normal((S, 2, 4))
    by_distance = np.einsum("thk,shk->hts", q_THK, r_SHK[::-1])[None]
    shifted = np.asarray(relative_shift(jnp.asarray(by_distance)))[0]
    for i in range(T):
        for j in range(M + i + 1):
            np.testing.assert_allclose(shifted[:, i, j], (q_THK[i] * r_SHK[M + i - j]).sum(-1), rtol=1e-5)


def test_sinusoids_are_sines_then_cosines_and_clamped() -> None:
    x_ND = np.asarray(sinusoids(6, 4, 3))
    expected = [[np.sin(d), np.sin(d / 100), np.cos(d), np.cos(d / 100)] for d in (0, 1, 2, 3, 3, 3)]
    np.testing.assert_allclose(x_ND, expected, atol=1e-6)


# ------------------------------------------------------------------------------ the memory


@pytest.mark.parametrize("model", [XL, ADAPTIVE], ids=["post-norm", "pre-norm"])
def test_two_segments_with_memory_equal_one_twice_as_long(model: TransformerXL) -> None:
    batch, params = streams(2, 2 * T), sharp_params(model)
    whole, kept = forward(model)(params, batch)
    assert kept is None
    np.testing.assert_allclose(in_turn(model, params, batch, T, T), whole, atol=2e-5)


def test_a_longer_memory_than_a_segment_reaches_two_segments_back() -> None:
    batch, params = plain(streams(1, 3 * T).tokens_BT), sharp_params(XL)
    whole = np.asarray(forward(XL)(params, batch)[0])
    np.testing.assert_allclose(in_turn(XL, params, batch, T, 2 * T), whole, atol=2e-5)
    shorter = in_turn(XL, params, batch, T, T)
    np.testing.assert_allclose(shorter[:, : 2 * T], whole[:, : 2 * T], atol=2e-5)
    assert np.abs(shorter - whole)[:, 2 * T :].max() > 1e-2


def test_the_gradient_does_not_cross_into_the_previous_segment() -> None:
    first, second = cut(plain(streams(2, 2 * T).tokens_BT))
    params = sharp_params(XL)

    @jax.jit
    def gradients(params: dict, memory: Memory) -> tuple[dict, dict, Memory]:
        def loss(before: dict, after: dict, memory: Memory) -> jax.Array:
            kept = model_of(XL, COMPUTE)(before).hidden(replace(first, memory=memory)).memory
            part = replace(second, memory=kept)
            given = replace(second, memory=memory)
            build = model_of(XL, COMPUTE)(after)
            return OBJECTIVE(build, part, None).loss + OBJECTIVE(build, given, None).loss

        return jax.grad(loss, (0, 1, 2), allow_int=True)(params, params, memory)

    memory = forward(XL)(params, replace(first, memory=init_memory(XL, COMPUTE, HERE, 2)))[1]
    assert memory is not None and float(jnp.abs(memory.x_BLMD).min(initial=1)) >= 0
    before, after, by_memory = gradients(params, memory)
    assert all((np.asarray(g) == 0).all() for g in jax.tree.leaves(before))
    assert (np.asarray(by_memory.x_BLMD) == 0).all()
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(after))
    logits = [np.asarray(forward(XL)(params, replace(second, memory=m))[0]) for m in (None, memory)]
    assert np.abs(logits[0] - logits[1]).max() > 1e-2  # although the memory does matter


def seen_places(model: TransformerXL, memory_segments: list[int], segments: list[int]) -> np.ndarray:
    """[T, M + T]: whether a layer's output at position t changes with the features at position s."""
    M, D = len(memory_segments), model.width
    params = sharp_params(model)
    tokens = jnp.arange(1, T + 1)[None]
    batch = replace(plain(tokens), segments_BT=jnp.asarray([segments]))
    x_MD = jax.random.normal(jax.random.key(0), (M, D))

    @jax.jit
    def out(table_VD: jax.Array, x_MD: jax.Array) -> jax.Array:
        memory = Memory(x_MD[None, None], jnp.asarray([memory_segments]))
        decoder = model_of(model, COMPUTE)(params | {"embed": {"weight": table_VD}})
        return decoder.hidden(replace(batch, memory=memory)).x_BTD[0]

    table_VD = params["embed"]["weight"]
    base = out(table_VD, x_MD)
    changed = [out(table_VD, x_MD.at[m].add(1.0)) for m in range(M)]
    changed += [out(table_VD.at[1 + t].add(1.0), x_MD) for t in range(T)]
    return np.stack([np.abs(np.asarray(c - base)).max(-1) > 1e-6 for c in changed], axis=1)


@pytest.mark.parametrize("same_length", [False, True])
def test_a_token_sees_its_document_up_to_itself(same_length: bool) -> None:
    model, M = replace(XL, layers=1, same_length=same_length), 6
    memory_segments, segments = [0, 3, 4, 4, 5, 5], [5, 5, 5, 6, 6, 7, 7, 7]
    numbers = np.array(memory_segments + segments)
    back = M + np.arange(T)[:, None] - np.arange(M + T)
    expected = (back >= 0) & (numbers[M:, None] == numbers)
    if same_length:
        expected &= back < M
    np.testing.assert_array_equal(seen_places(model, memory_segments, segments), expected)


def test_same_length_sees_as_many_tokens_late_in_a_segment_as_early() -> None:
    model = replace(XL, layers=1, same_length=True)
    seen = seen_places(model, [1] * 6, [1] * T)
    assert seen.sum(1).tolist() == [6] * T


def test_later_tokens_and_other_documents_have_no_gradient() -> None:
    model = replace(XL, tied=False)
    params, tokens = sharp_params(model), jnp.arange(1, T + 1)[None]
    segments = np.array([1] * 3 + [2] * 5)
    batch = replace(
        plain(tokens), segments_BT=jnp.asarray(segments[None]), memory=init_memory(model, COMPUTE, HERE, 1)
    )

    @jax.jit
    def jacobian(table_VD: jax.Array) -> jax.Array:
        def squares(table_VD: jax.Array) -> jax.Array:
            decoder = model_of(model, COMPUTE)(params | {"embed": {"weight": table_VD}})
            return jnp.square(decoder.logits(decoder.hidden(batch).x_BTD)[0]).sum(-1)

        return jax.jacrev(squares)(table_VD)[:, 1 : T + 1]

    size_TT = np.abs(np.asarray(jacobian(params["embed"]["weight"]))).max(-1)
    seen = np.tri(T, dtype=bool) & (segments[:, None] == segments)
    assert (size_TT[~seen] == 0).all()
    assert (size_TT[seen] > 1e-6).all()


# -------------------------------------------------------------------------------- training


BATCHES = cut(streams(8, 4 * T))


@cache
def stepper(sizes: str = "one", accumulate: int = 1) -> tuple[State, Callable[..., Any], jax.sharding.Mesh]:
    """An initial state and the compiled step of `ADAPTIVE` on a mesh."""
    run = make_run(
        ADAPTIVE,
        data=Text(path="none", contiguous=True),
        # With Adam's usual eps, the signs of gradients that are pure rounding error would matter.
        optim=Optim(peak_lr=1e-2, warmup_steps=2, eps=1e-3),
        train=Train(steps=20, batch_size=8, accumulate=accumulate),
        compute=COMPUTE,
    )
    program = make_program(run, mesh(MESHES.get(sizes, ONE)))
    if sizes == "one" and accumulate == 1:
        state = init_state(run, program)
    else:
        state = jax.device_put(jax.device_get(stepper()[0]), program.shardings)
    batch = Batch.abstract(8, T, batch_sharding(program.mesh))
    with jax.set_mesh(program.mesh):
        lowered = compile_step(run, program).lower(program.abstract, batch)
    # It runs only a few steps: optimising it takes longer than it saves.
    return state, lowered.compile({"xla_backend_optimization_level": 0}), program.mesh


def train(batches: list[Batch], sizes: str = "one", accumulate: int = 1) -> tuple[State, list[dict]]:
    (state, step, on), seen = stepper(sizes, accumulate), []
    with jax.set_mesh(on):
        for batch in batches:
            state, metrics = step(state, jax.device_put(batch, batch_sharding(on)))
            seen.append({name: float(value) for name, value in metrics.items()})
    return jax.device_get(state), seen


@cache
def four_steps(sizes: str = "one", accumulate: int = 1) -> tuple[State, list[dict]]:
    return train(BATCHES, sizes, accumulate)


def assert_equal_runs(a: tuple[State, list[dict]], b: tuple[State, list[dict]]) -> None:
    for name in ("loss", "grad_norm", "accuracy", "weight"):
        np.testing.assert_allclose([s[name] for s in a[1]], [s[name] for s in b[1]], rtol=1e-5)
    assert_close(a[0].memory, b[0].memory, 2e-4)


def test_accumulation_equals_the_full_batch_memory_included() -> None:
    assert_equal_runs(four_steps(), four_steps(accumulate=2))
    kept = four_steps()[0].memory
    np.testing.assert_array_equal(kept.segments_BM, BATCHES[-1].segments_BT)
    assert kept.x_BLMD.shape == (8, 2, T, 32)


@pytest.mark.parametrize("sizes", MESHES)
def test_eight_devices_equal_one(sizes: str) -> None:
    assert_equal_runs(four_steps(), four_steps(sizes))


def test_a_bad_step_leaves_the_memory_empty() -> None:
    bad = replace(BATCHES[0], weights_BT=BATCHES[0].weights_BT.at[0, 0].set(jnp.nan))
    state, seen = train([BATCHES[0], bad])
    assert seen[-1]["bad_steps"] == 1
    assert not state.memory.segments_BM.any() and not state.memory.x_BLMD.any()
    assert four_steps()[0].memory.segments_BM.all()


def test_twenty_steps_give_the_stored_losses() -> None:
    # The losses of this test when it was written (jax 0.12.0.1, one CPU device), with the schedule that ends
    # with the last step: it guards against changes, not against bugs that existed then. Five passes over
    # four segments.
    _, seen = train(BATCHES * 5)
    assert [seen[0]["loss"], seen[-1]["loss"]] == pytest.approx([5.5835, 4.0351], abs=2e-3)


# ------------------------------------------------------------------------------- decoding


DECODED = {
    "plain": replace(XL, memory=5),
    "longer in evaluation, clamped": replace(XL, memory=3, eval_memory=6, clamp=4, norm_at="pre"),
    "same_length": replace(XL, memory=5, same_length=True),
}


@pytest.mark.parametrize("name", DECODED)
def test_decoding_equals_segments_of_one_token_with_memory(name: str) -> None:
    model, S, prompt = DECODED[name], 16, 9
    params, tokens_BT = sharp_params(model), streams(2, S).tokens_BT
    M = model.eval_memory or model.memory
    expected = in_turn(model, params, plain(tokens_BT), 1, M)
    apart = nnx.merge(abstract_model(model, COMPUTE, HERE, scanned=False)[0], decoding_params(model, params))

    @jax.jit
    def decode(tokens_BT: jax.Array, start_B: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        x_BTD, cache = apart.decode(tokens_BT, start_B, cache)
        return apart.logits(x_BTD), cache

    zero_B, held = jnp.zeros(2, jnp.int32), init_cache(model, HERE, 2, S, jnp.dtype("float32"))
    logits, held = decode(tokens_BT[:, :prompt], zero_B, held)
    parts = [logits]
    for i in range(prompt, S):
        logits, held = decode(tokens_BT[:, i : i + 1], zero_B + i, held)
        parts.append(logits)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), expected, atol=2e-5)


def test_without_a_memory_decoding_sees_the_whole_row() -> None:
    model = replace(XL, memory=0)
    params, tokens_BT = sharp_params(model), streams(2, 16).tokens_BT
    expected = forward(model)(params, plain(tokens_BT))[0]
    apart = nnx.merge(abstract_model(model, COMPUTE, HERE, scanned=False)[0], decoding_params(model, params))
    cache = init_cache(model, HERE, 2, 16, jnp.dtype("float32"))
    x_BTD, _ = jax.jit(apart.decode)(tokens_BT, jnp.zeros(2, jnp.int32), cache)
    np.testing.assert_allclose(apart.logits(x_BTD), expected, atol=2e-5)


def test_greedy_generation_takes_the_top_1_token_of_the_forward_pass() -> None:
    """With a model with adaptive softmax; ids beyond the tokenizer's are never generated."""
    model = replace(ADAPTIVE, vocab_size=280, cutoffs=(100, 200), memory=4, context=32, layers=1)
    params, tokenizer = sharp_params(model), ByteTokenizer()
    prompts = [tokenizer.encode("ab"), tokenizer.encode("hello you")]
    greedy = Sampling(temperature=0.0)
    made = Generator(model, COMPUTE, params, tokenizer).generate(prompts, greedy, max_new_tokens=5, stop=[])
    for prompt, completion in zip(prompts, made, strict=True):
        row = jnp.asarray([[*prompt, *completion.ids]])
        logits_TV = in_turn(model, params, plain(row), 1, 4)[0, :, : tokenizer.vocab_size]
        assert completion.ids == logits_TV.argmax(-1)[len(prompt) - 1 : -1].tolist()
        assert len(completion.ids) == 5


# ---------------------------------------------------------------------------- rejected configs


def test_impossible_configs_are_rejected() -> None:
    with pytest.raises(UserError, match=r"eval_memory is 3 but model\.memory is 0"):
        replace(XL, memory=0, eval_memory=3)
    with pytest.raises(UserError, match="even"):
        replace(XL, width=15, head_width=4)
    with pytest.raises(UserError, match=r"contiguous=True"):
        make_run(XL)
    objective = causal_lm(CausalLM(z_loss=0.1), VOCABULARY)
    decoder = model_of(ADAPTIVE, COMPUTE)(sharp_params(ADAPTIVE))
    with pytest.raises(UserError, match="z_loss"):
        jax.eval_shape(lambda batch: objective(decoder, batch, None).loss, BATCHES[0])


def test_a_kernel_that_supports_no_bias_is_rejected_under_strict() -> None:
    with pytest.raises(UserError, match="cannot run here"):
        Recurrent(XL, Compute(attention="splash", strict=True), HERE, jax.random.key(0))


def test_chunks_of_the_adaptive_loss_change_neither_loss_nor_gradients() -> None:
    batch, params = streams(2, T), sharp_params(ADAPTIVE)

    @partial(jax.jit, static_argnums=0)
    def losses(chunk: int, params: dict) -> tuple[tuple[jax.Array, dict], dict]:
        def loss(params: dict) -> tuple[jax.Array, dict]:
            sums = OBJECTIVE(model_of(ADAPTIVE, replace(COMPUTE, loss_chunk=chunk))(params), batch, None)
            return sums.loss, sums.metrics

        return jax.value_and_grad(loss, has_aux=True)(params)

    whole, parts = losses(2 * T, params), losses(4, params)
    assert_close(whole, parts, 1e-5)
    logits_BTV, _ = forward(ADAPTIVE)(params, batch)
    logprobs_BT = jnp.take_along_axis(logits_BTV, batch.targets_BT[..., None], -1)[..., 0]
    hits = (logits_BTV.argmax(-1) == batch.targets_BT) * batch.weights_BT
    assert float(whole[0][0]) == pytest.approx(float(-(logprobs_BT * batch.weights_BT).sum()), rel=1e-5)
    assert float(whole[0][1]["correct"]) == float(hits.sum())
