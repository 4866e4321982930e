"""What every method of tuning promises: what it trains, what it leaves, and where it begins and ends."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import FLOAT32, HERE, MIXED, ONE, T, assert_same, packed, sharp_params
from tiny_tune import BATCHES, LATEST, MERGED, METHODS, NOTHING_AT_FIRST, SMALL, logits_of, trained, tuned

from jaxgpt.config import (
    IA3,
    Bert,
    BitFit,
    BottleneckAdapters,
    Classification,
    Classifier,
    Compute,
    DoRA,
    Labelled,
    LastLayers,
    LoRA,
    MoE,
    PrefixTuning,
    PromptTuning,
    Train,
    TransformerXL,
)
from jaxgpt.errors import UserError
from jaxgpt.layers.cache import init_cache
from jaxgpt.models import abstract_model, assemble
from jaxgpt.sample.program import prepare
from jaxgpt.train.state import freeze
from jaxgpt.tune import make_tuning
from jaxgpt.tune.base import flatten, unflatten

D, F, L, H, K = 32, 128, 2, 4, 8


def count(tune: Any, model: Any = SMALL) -> int:
    learned = make_tuning(tune, model, FLOAT32, HERE).learned
    return sum(x.size for x in jax.tree.leaves(learned))


def test_trained_parameters_are_those_of_the_papers_formulas() -> None:
    """For GPT-2's layers: four projections of D x D, and the MLP's D x F and F x D."""
    linear = 4 * (D + D) + (D + F) + (F + D)
    assert count(LoRA(rank=3)) == L * 3 * linear
    assert count(LoRA(rank=3, targets=("*.q", "*.v"))) == L * 3 * 2 * (D + D)  # section 4.2 of the paper
    assert count(DoRA(rank=3)) == L * (3 * linear + 4 * D + F + D)
    assert count(PromptTuning(tokens=5)) == 5 * D
    assert count(PrefixTuning(tokens=5)) == L * 2 * 5 * D
    assert count(PrefixTuning(tokens=5, projection=7)) == 5 * D + (D + 1) * 7 + (7 + 1) * L * 2 * D
    adapter, norms = 2 * D * 3 + D + 3, 2 * 2 * D
    assert count(BottleneckAdapters(size=3)) == L * (2 * adapter + norms)
    assert count(BottleneckAdapters(size=3, place="pfeiffer", norms=False)) == L * adapter
    assert count(IA3()) == L * (2 * D + F)
    assert count(BitFit()) == L * (4 * D + F + D + 2 * D) + D
    one = 4 * D * D + 4 * D + 2 * D * F + F + D + 4 * D
    assert count(LastLayers(layers=1)) == one + 2 * D
    assert count(LastLayers(layers=0)) == 2 * D


@pytest.mark.parametrize("name", METHODS)
def test_a_method_trains_all_that_is_its_own_and_leaves_the_rest(name: str) -> None:
    case, state, numbers = trained(name)
    assert_same(case.whole, sharp_params(case.run.model))
    assert_same(case.base, freeze(case.program, case.whole))
    assert numbers[-1]["loss"] < numbers[2]["loss"]  # of the same batch
    assert all(number["bad_steps"] == 0 for number in numbers)
    now, first = (flatten(jax.device_get(one.params)) for one in (state, case.state))
    assert all((now[path] != first[path]).any() for path in first)
    # No optimizer state for what is frozen.
    assert {x.shape for x in jax.tree.leaves(state.opt) if x.ndim} <= {x.shape for x in now.values()}
    if name in ("last", "qlora"):
        return
    merged = flatten(jax.jit(case.program.tuning.merge)(state.params, case.base))
    own = {path[: path.index("weight") + 1] if "weight" in path else path for path in now}
    biases = {(*path[:-1], "bias") for path in own} if name == "ia3" else set()
    for path, leaf in flatten(case.whole).items():
        if path not in own | biases:
            np.testing.assert_array_equal(merged[path], leaf, str(path))


@pytest.mark.parametrize("name", METHODS)
def test_where_it_begins_and_what_is_merged(name: str) -> None:
    """Most change nothing before the first step. Merged equals unmerged; weights are then arrays alone."""
    case, state, _ = trained(name)
    model, batch = case.run.model, BATCHES[0]
    enter = jax.jit(lambda learned, base: case.program.tuning.enter(learned, base, None))
    plain = logits_of(model, case.whole, batch)
    if name in NOTHING_AT_FIRST:
        first = logits_of(model, enter(case.state.params, case.base), batch)
        np.testing.assert_allclose(first, plain, atol=2e-5 if name in ("pissa", "dora") else 0)
    whole = jax.jit(case.program.tuning.merge)(state.params, case.base)
    merged = logits_of(model, whole, batch)
    np.testing.assert_allclose(merged, logits_of(model, enter(state.params, case.base), batch), atol=1e-5)
    assert np.abs(merged - plain).max() > 1e-3
    if name in MERGED:
        assert jax.tree.structure(whole) == jax.tree.structure(case.whole)


@pytest.mark.parametrize("name", ["lora", "qlora", "prompt", "houlsby"])
def test_eight_devices_equal_one(name: str) -> None:
    """The third loss follows two updates."""
    sizes = MIXED if name != "qlora" else ONE | {"fsdp": 4, "data": 2}
    _, eight = tuned(METHODS[name], LATEST, sizes).train(BATCHES)
    for a, b in zip(trained(name)[2], eight, strict=False):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("name", ["lora", "prompt"])
def test_accumulation_scan_and_remat_change_nothing(name: str) -> None:
    """The scan over layers, each computed again in the backward pass, in two microbatches."""
    other = {"compute": replace(FLOAT32, remat="full", unroll=1), "train": Train(batch_size=8, accumulate=2)}
    _, same = tuned(METHODS[name], LATEST, **other).train(BATCHES)
    for a, b in zip(trained(name)[2], same, strict=False):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_dropout_is_of_the_adapters_input_alone_and_off_in_evaluation() -> None:
    case = tuned(LoRA(rank=3, dropout=0.5), SMALL)
    learned = jax.tree.map(lambda x: x + 0.1, case.state.params)

    def loss(key: Any) -> Any:
        model = case.program.model(learned, case.base, key)
        return model.hidden(BATCHES[0]).x_BTD

    first, again, other = (jax.jit(loss)(jax.random.key(n)) for n in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-2
    still = loss(None)
    np.testing.assert_array_equal(still, tuned(LoRA(rank=3), SMALL).model(learned).hidden(BATCHES[0]).x_BTD)


def test_b_of_lora_plus_learns_faster() -> None:
    """With AdamW the first step moves every element by its learning rate."""
    case = tuned(replace(METHODS["lora"], lr_ratio=4.0), SMALL)
    state, _ = case.train(BATCHES[:1])
    step = {
        path: np.abs(np.asarray(a - b)).max()
        for (path, a), b in zip(
            flatten(state.params).items(), flatten(case.state.params).values(), strict=True
        )
    }
    by_name = {name: {round(float(v), 4) for p, v in step.items() if p[-1] == name} for name in "ab"}
    assert by_name["b"] == {0.04}
    assert max(by_name["a"]) < 0.011


def test_pissa_begins_with_the_largest_singular_values() -> None:
    """Mirsky: what is left of the weight has the other ones."""
    case = tuned(METHODS["pissa"], SMALL)
    path = ("blocks", "mlp", "up", "weight")
    whole, left = flatten(case.whole)[path][0], flatten(case.base)[path][0]
    values = np.linalg.svd(np.asarray(whole), compute_uv=False)
    np.testing.assert_allclose(
        np.linalg.svd(np.asarray(left), compute_uv=False)[: D - 3], values[3:], atol=1e-4
    )


@pytest.mark.parametrize(("form", "error"), [("int8", 0.01), ("int4", 0.12), ("nf4", 0.1)])
def test_a_quantized_base_gives_the_gradients_of_what_it_rounds_to(form: str, error: float) -> None:
    case = tuned(LoRA(rank=3, base=form), LATEST)
    merged = jax.jit(case.program.tuning.merge)(case.state.params, case.base)
    now = flatten(merged)
    for path, leaf in flatten(case.whole).items():
        off = np.linalg.norm(now[path] - leaf) / np.linalg.norm(leaf)
        assert off < error, (path, off)
        assert (off > 0) == (path[-1] == "weight" and path[0] == "blocks"), path
    rounded = tuned(LoRA(rank=3), LATEST, params=merged)
    for a, b in zip(case.train(BATCHES[:2])[1], rounded.train(BATCHES[:2])[1], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


MIXTURE = replace(LATEST, moe=MoE(experts=4, width=16), windows=())


def test_experts_have_adapters_too() -> None:
    """As many as experts; training on several devices equals that on one; merged equals unmerged."""
    assert count(LoRA(rank=2, targets=("blocks.mlp.up",)), MIXTURE) == L * 4 * 2 * (D + 16)
    case = tuned(LoRA(rank=2), MIXTURE)
    state, numbers = case.train(BATCHES[:2])
    spread = tuned(LoRA(rank=2), MIXTURE, ONE | {"expert": 2, "tensor": 2, "fsdp": 2})
    for a, b in zip(numbers, spread.train(BATCHES[:2])[1], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    enter = jax.jit(lambda learned, base: case.program.tuning.enter(learned, base, None))
    merged = jax.jit(case.program.tuning.merge)(state.params, case.base)
    apart = logits_of(MIXTURE, enter(state.params, case.base), BATCHES[0])
    np.testing.assert_allclose(logits_of(MIXTURE, merged, BATCHES[0]), apart, atol=1e-5)
    assert not any("router" in path for path in flatten(state.params))


XL = TransformerXL(
    vocab_size=64, context=32, segment=T, memory=0, layers=2, width=32, heads=4, mlp_width=64, dropout=0.0
)


@pytest.mark.parametrize("name", ["lora", "houlsby", "parallel", "ia3", "last"])
def test_a_transformer_xl_is_tuned_too(name: str) -> None:
    case = tuned(METHODS[name], XL)
    state, numbers = case.train(BATCHES[:1] * 4)
    assert numbers[-1]["loss"] < numbers[0]["loss"]
    moved = [a != b for a, b in zip(*map(jax.tree.leaves, (state.params, case.state.params)), strict=True)]
    assert all(map(np.any, moved))


BERT = Bert(vocab_size=64, context=24, layers=2, width=32, heads=4, dropout=0.0)
ENCODER = Classifier(backbone=BERT, labels=("a", "b"), pool="first")


@pytest.mark.parametrize("name", ["lora", "prefix", "houlsby", "bitfit", "last"])
def test_a_classifier_trains_its_head_with_every_method(name: str) -> None:
    data = {"data": Labelled(train=("a",), validation=("b",)), "objective": Classification()}
    case = tuned(METHODS[name], ENCODER, **data)
    batch = packed([(8, 8)] * 8)
    first = np.zeros((8, T), np.float32)
    first[:, [0, 8]] = 1
    label = jnp.asarray(batch.tokens_BT[:, :1] % 2) * jnp.ones((1, T), jnp.int32)
    batch = replace(batch, targets_BT=label, weights_BT=jnp.asarray(first))
    state, numbers = case.train([batch] * 4)
    assert numbers[-1]["loss"] < numbers[0]["loss"]
    flat, before = flatten(state.params), flatten(case.state.params)
    assert {("head", "weight"), ("bias",)} <= flat.keys()
    assert any((flat[path] != before[path]).any() for path in flat if path[0] in ("backbone", "added"))
    assert jax.jit(case.program.tuning.merge)(state.params, case.base).keys() >= case.whole.keys()


def test_what_does_not_fit_is_said_in_one_sentence() -> None:
    cases: list[tuple[Any, Any, str]] = [
        (LoRA(targets=("c_attn",)), SMALL, r"tune.targets has 'c_attn', .* there are blocks.attention.k, "),
        (PromptTuning(), BERT, "sees both sides .*; use PrefixTuning"),
        (PrefixTuning(), XL, "no place for virtual tokens; use LoRA"),
        (LoRA(rank=40, init="pissa"), SMALL, "has only 32 singular values; lower it"),
        (LoRA(base="nf4"), MIXTURE, "weights of experts are not quantized; leave blocks.mlp.down"),
        (LoRA(dropout=0.1), MIXTURE, "adapters of experts have no dropout; leave "),
        (DoRA(), MIXTURE, "weights of experts have no magnitude; leave "),
        (LastLayers(layers=3), SMALL, "tune.layers is 3 but the model has 2"),
        (BitFit(), replace(LATEST), "tune trains biases, of which this model has none"),
        (PromptTuning(tokens=24), SMALL, "leaves nothing of model.context 24; lower it"),
    ]
    for tune, model, words in cases:
        with pytest.raises(UserError, match=words):
            make_tuning(tune, model, FLOAT32, HERE)


def test_a_base_under_an_adapter_is_read_in_the_compute_type_and_changes_nothing() -> None:
    """As the sampler prepares it, with layers stacked as on an accelerator; DoRA's norm needs all digits."""
    half, target = Compute(dtype="bfloat16", attention="xla"), replace(HERE, unroll=False)
    path, tokens = ("blocks", "mlp", "down", "weight"), BATCHES[0].tokens_BT
    for name, dtype in (("lora", "bfloat16"), ("ia3", "bfloat16"), ("dora", "float32")):
        case, state, _ = trained(name)
        params = case.program.tuning.enter(state.params, case.base, None)
        ready = prepare(LATEST, half, target, params)
        assert flatten(ready)[path].base.dtype == dtype

        @jax.jit
        def decode(params: dict, target: Any = target) -> jax.Array:
            module = assemble(abstract_model(LATEST, half, target)[0], params)
            return module.decode(tokens, None, init_cache(LATEST, target, 8, 16, jnp.dtype("bfloat16")))[0]

        wide, before = flatten(ready), flatten(params)
        wide |= {p: before[p] for p, leaf in wide.items() if hasattr(leaf, "base")}
        np.testing.assert_array_equal(decode(ready), decode(unflatten(wide)))
