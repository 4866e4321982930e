"""Runs in few bits: what the methods promise, and that such a run is used like any other."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from story import story
from tiny import FLOAT32, HERE, ONE, make_run, plain, steps

import jaxgpt
import jaxgpt.config
from jaxgpt.batch import Batch
from jaxgpt.config import GPT, LoRA, MoE, Optim, Quantization, Run, Text, to_json
from jaxgpt.convert import calibrate, few_bits, rounding
from jaxgpt.convert.commands import export, save_params
from jaxgpt.convert.quantize import quantize, read_split
from jaxgpt.errors import UserError
from jaxgpt.evals.perplexity import Document, sliding
from jaxgpt.evals.scoring import Scorer
from jaxgpt.layers.quantized import Quantized
from jaxgpt.layers.quantized import quantize as nearest
from jaxgpt.models import abstract_model, assemble, init_params
from jaxgpt.sample.load import load_trained
from jaxgpt.text.tokenizer import ByteTokenizer
from jaxgpt.train.loop import train
from jaxgpt.tune.base import flatten
from jaxgpt.tune.few_bits import whole_params

MODEL = GPT(
    vocab_size=264, context=32, layers=2, width=32, heads=2, kv_heads=1, mlp_width=64, position="rope",
    norm="rmsnorm", mlp="swiglu", bias=False, tied=False,
)  # fmt: skip
FORMS = ("int8", "int4", "nf4", "fp8")
WAYS = [
    ("int8", "rtn", "float"),
    ("int4", "gptq", "float"),
    ("nf4", "awq", "float"),
    ("fp8", "rtn", "float"),
    ("int8", "smoothquant", "int8"),
]


def write(folder: Path, model=MODEL, params=None, **parts) -> Path:
    """A run's folder with these parameters, or fresh ones."""
    run = Run(
        **({"name": folder.name, "runs": str(folder.parent), "model": model, "compute": FLOAT32} | parts)
    )
    ByteTokenizer().save(folder / "tokenizer")
    save_params(folder, run, params or init_params(model, FLOAT32, HERE, jax.random.key(0)), 3)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that has learned a little, and a text beside it."""
    folder = tmp_path_factory.mktemp("few") / "base"
    text = "\n".join(story(i, 20) for i in range(60))
    ids = np.asarray(ByteTokenizer().encode(text), np.int32)
    random, T = np.random.default_rng(0), MODEL.context

    def batch() -> Batch:
        starts = random.integers(0, len(ids) - T - 1, 16)
        rows_BT = np.stack([ids[s : s + T + 1] for s in starts])
        return replace(plain(jnp.asarray(rows_BT[:, :-1])), targets_BT=jnp.asarray(rows_BT[:, 1:]))

    optim = Optim(peak_lr=1e-2, final_lr=1e-2, schedule="constant", warmup_steps=0)
    state, seen = steps(make_run(MODEL, optim=optim), ONE, [batch() for _ in range(120)])
    assert seen[-1]["loss"] < 2.0
    (folder.parent / "text.txt").write_text(text)
    return write(folder, params=jax.device_get(state.params))


@pytest.fixture(scope="module")
def whole(trained: Path):
    return load_trained(trained)


def logits(run, params, tokens_BT):
    """Of parameters of any kind."""

    @jax.jit
    def run_it(params, batch):
        module = assemble(abstract_model(run.model, run.compute, HERE)[0], params)
        return module.logits(module.hidden(batch).x_BTD)

    return run_it(params, plain(tokens_BT))


TOKENS = jax.random.randint(jax.random.key(1), (2, 24), 32, 120)


@pytest.mark.parametrize(("form", "method", "activations"), WAYS)
def test_what_is_written_is_what_was_measured(form, method, activations, trained, tmp_path) -> None:
    out, text = tmp_path / "out", str(trained.parent / "text.txt")
    quantize(str(trained), str(out), to=form, method=method, activations=activations, text=(text,), rows=8)
    found, record = load_trained(out), json.loads((out / "quantize.json").read_text())
    tune = Quantization(to=form, method=method, activations=activations)
    assert found.run.tune == tune
    assert found.step == 3
    scored = sliding(Scorer.of(found), held_out(found, text)).figures()
    assert scored["token_perplexity"] == pytest.approx(record["perplexity"]["after"], rel=1e-5)
    assert record["perplexity"]["after"] < 1.2 * record["perplexity"]["before"]
    # 4 bits and 32 of a scale for each 32 or 64 inputs, or of 8 bits for each output; some factors of inputs.
    held = flatten(found.params)
    few = {p: w for p, w in held.items() if not isinstance(w, jax.Array)}
    assert len(few) == 7
    floats = sum(w.size for w in held.values() if isinstance(w, jax.Array))
    matrices = sum(w.size for w in flatten(whole_params(found.params)).values()) - floats
    assert record["bytes"]["before"] == 4 * (floats + matrices)
    bits = {"int8": 9, "fp8": 9, "int4": 5.5, "nf4": 6.5}[form]
    assert 4 * floats < record["bytes"]["after"] < 4 * floats + matrices * bits / 8
    size = sum(f.stat().st_size for f in (out / "checkpoints").rglob("*") if f.is_file())
    assert size < sum(f.stat().st_size for f in (trained / "checkpoints").rglob("*") if f.is_file())


def held_out(found, text: str) -> list[Document]:
    return [Document(ids, 0, 0, 0) for ids in read_split(found, (text,), ())[1]]


@pytest.mark.parametrize("form", ["int4", "int8"])
def test_a_run_in_few_bits_is_used_like_any_other(form, trained, tmp_path) -> None:
    out = tmp_path / "out"
    quantize(str(trained), str(out), to=form)
    model = jaxgpt.load(out)
    made = model.generate("the cat", max_new_tokens=8, temperature=0)
    assert made.ids
    # Cached decoding equals the full forward pass of the same weights.
    prompt = model.encode("the cat")
    best = [int(model.logits([prompt + made.ids[:i]])[0][-1, :259].argmax()) for i in range(len(made.ids))]
    assert made.ids == best
    assert model.score(["the cat"], [" sat"])[0][0] < 0
    export(str(out), str(tmp_path / "hf"))
    again = jaxgpt.load(tmp_path / "hf")
    np.testing.assert_allclose(again.logits(["the cat"])[0], model.logits(["the cat"])[0], atol=1e-4)


def test_keys_and_values_in_eight_bits(trained) -> None:
    exact, few = jaxgpt.load(trained), jaxgpt.load(trained, cache="int8")
    made = [m.generate("the cat sat", max_new_tokens=12, temperature=0) for m in (exact, few)]
    assert made[0].ids == made[1].ids
    assert made[0].logprobs != made[1].logprobs
    np.testing.assert_allclose(made[0].logprobs, made[1].logprobs, atol=0.05)
    beam = jaxgpt.config.Beam(beams=3)
    assert few.generate("the cat", max_new_tokens=4, decoding=beam).ids


def test_adapters_stand_over_few_bits(trained, tmp_path) -> None:
    out = tmp_path / "out"
    quantize(str(trained), str(out), to="nf4")
    model = jaxgpt.load(out)
    first = model.generate("the cat", max_new_tokens=6, temperature=0).ids
    model.generator.make_slots(2, rank=2)
    assert model.generate("the cat", max_new_tokens=6, temperature=0).ids == first


def test_a_run_in_few_bits_is_not_trained_but_tuned_from(trained, tmp_path) -> None:
    out = tmp_path / "out"
    quantize(str(trained), str(out), to="int4")
    with pytest.raises(UserError, match="trains nothing"):
        train(replace(load_trained(out).run, name="other"))
    from jaxgpt.checkpoint.whole import whole_model

    base = load_trained(out)
    run = replace(base.run, name="tuned", tune=LoRA(), init_from=str(out))
    assert all(isinstance(p, jax.Array) for p in flatten(whole_model(run, base.params)).values())


@pytest.mark.parametrize("form", FORMS)
def test_gptq_lowers_the_error_of_outputs(form) -> None:
    """Inputs that go together, as those of real layers, let later weights make up for earlier ones."""
    random = np.random.default_rng(0)
    z_NI = random.standard_normal((400, 48)) * np.geomspace(0.02, 2, 48)
    x_NI = jnp.asarray(z_NI @ random.standard_normal((48, 48)), jnp.float32)
    weight = jnp.asarray(random.standard_normal((3, 16, 5, 4)), jnp.float32)  # [*inputs, *outputs]
    w_IO = weight.reshape(48, 20)

    def error(few: Quantized) -> float:
        return float(jnp.square(x_NI @ (few.whole().reshape(48, 20) - w_IO)).mean())

    plain_one = nearest(weight, form, 0, 2)
    made = rounding.gptq(weight, {"products": x_NI.T @ x_NI}, form, 2)
    assert made.array.scale.shape == plain_one.array.scale.shape
    assert made.array.qvalue.dtype == plain_one.array.qvalue.dtype
    assert error(made) < 0.7 * error(plain_one)
    # Inputs that have nothing to do with each other leave nothing to make up for.
    same = rounding.gptq(weight, {"products": jnp.eye(48)}, form, 2)
    np.testing.assert_allclose(  # but for ties
        jnp.abs(same.whole() - weight), jnp.abs(plain_one.whole() - weight), atol=1e-5
    )


def test_awq_changes_nothing_but_the_rounding() -> None:
    """With inputs of very different sizes, its error is lower; at the exponent 0 it is plain rounding."""
    random = np.random.default_rng(0)
    x_NI = jnp.asarray(random.standard_normal((400, 64)) * np.geomspace(0.01, 10, 64), jnp.float32)
    weight = jnp.asarray(random.standard_normal((64, 8)), jnp.float32)
    seen = {"products": x_NI.T @ x_NI, "sizes": jnp.abs(x_NI).sum(0)}
    made, plain_one = rounding.awq(weight, seen, "int4", 1), nearest(weight, "int4", 0, 1)

    def error(few) -> float:
        return float(jnp.square(x_NI @ (few.whole() - weight)).mean())

    assert error(made) < 0.7 * error(plain_one)
    np.testing.assert_allclose(
        made.product(x_NI, 1, jnp.dtype("float32"), HERE), x_NI @ made.whole(), rtol=1e-3, atol=1e-3
    )
    # The factors beside the weight are undone by those in it: what is left is at most half a step.
    step = made.into[:, None] * made.base.array.scale
    assert bool((jnp.abs(made.whole() - weight) <= 0.51 * step).all())


@pytest.mark.parametrize(
    "change",
    [{"zero_centered_norm": True, "norm_at": "both"}, {"norm": "layernorm", "mlp": "gelu", "bias": True}],
)
def test_smoothquant_changes_nothing_in_float(change, tmp_path) -> None:
    model = replace(MODEL, **change)
    params = init_params(model, FLOAT32, HERE, jax.random.key(0))
    flat = flatten(params)
    for path in flat:  # norms that make outliers, and biases
        if path[-1] in ("scale", "bias"):
            noise = jax.random.normal(jax.random.key(len(path)), flat[path].shape)
            flat[path] = flat[path] + 0.3 * noise
    found = load_trained(write(tmp_path / "base", model, few_bits.unflatten(flat)))
    before = found.params
    facts = few_bits.about(found.run)
    smoothed = few_bits._smoothed(found, facts, np.asarray(TOKENS))
    changed = [p for p, leaf in flatten(smoothed).items() if (leaf != flatten(before)[p]).any()]
    assert ("blocks", "attention", "q", "weight") in changed
    assert ("blocks", "mlp", "up", "weight") in changed
    assert ("blocks", "mlp_norm", "scale") in changed
    np.testing.assert_allclose(
        logits(found.run, smoothed, TOKENS), logits(found.run, before, TOKENS), atol=2e-4
    )


def test_smoothquant_helps_where_inputs_have_outliers(trained, tmp_path) -> None:
    """A norm whose output has one feature 50 times as large, which the weights after it make up for."""
    found = load_trained(trained)
    flat = flatten(found.params)
    factor_D = jnp.ones(32).at[5].set(50.0)
    scale = ("blocks", "attention_norm", "scale")
    flat[scale] = flat[scale] * factor_D
    for name in "qkv":
        path = ("blocks", "attention", name, "weight")
        flat[path] = flat[path] / factor_D[:, None, None]
    base, text = write(tmp_path / "base", params=few_bits.unflatten(flat)), str(trained.parent / "text.txt")
    after = {}
    for method in ("rtn", "smoothquant"):
        out = tmp_path / method
        quantize(str(base), str(out), method=method, activations="int8", text=(text,), rows=8)
        after[method] = json.loads((out / "quantize.json").read_text())["perplexity"]["after"]
    assert after["smoothquant"] < after["rtn"]


def test_perplexity_falls_with_bits_and_with_care(trained, tmp_path) -> None:
    text, after = str(trained.parent / "text.txt"), {}
    for form, method in (("int8", "rtn"), ("int4", "rtn"), ("int4", "gptq"), ("nf4", "rtn")):
        out = tmp_path / f"{form}-{method}"
        quantize(str(trained), str(out), to=form, method=method, text=(text,))
        record = json.loads((out / "quantize.json").read_text())
        after[form, method] = record["perplexity"]["after"] / record["perplexity"]["before"]
    assert after["int8", "rtn"] == pytest.approx(1, abs=0.01)
    assert after["int8", "rtn"] < after["int4", "gptq"] < after["int4", "rtn"]
    assert after["nf4", "rtn"] < after["int4", "rtn"]


def test_sums_are_those_of_the_inputs(whole) -> None:
    """Of the first layer's projections: the normalised embeddings of the tokens."""
    rows_RT = np.asarray(TOKENS)[:, :20]
    path = ("blocks", "attention", "q", "weight")
    names = ("products", "sizes", "peaks")
    seen = calibrate.observe(whole, whole.params, [path], np.concatenate([rows_RT] * 2), names, (0, 2))
    flat = flatten(whole.params)
    x_NI = flat[("embed", "weight")][rows_RT.reshape(-1)]
    x_NI = x_NI / jnp.sqrt(jnp.square(x_NI).mean(-1, keepdims=True) + 1e-5)
    x_NI = x_NI * flat[("blocks", "attention_norm", "scale")][0]
    assert len(seen[path]) == 2
    np.testing.assert_allclose(seen[path][0]["products"], 2 * x_NI.T @ x_NI, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(seen[path][0]["sizes"], 2 * jnp.abs(x_NI).sum(0), rtol=1e-4)
    np.testing.assert_allclose(seen[path][0]["peaks"], jnp.abs(x_NI).max(0), rtol=1e-5)


@pytest.mark.parametrize("room", [1, 2**30])
def test_layers_in_one_pass_or_in_many(room, trained, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(few_bits, "ROOM", room)
    spans = list(
        few_bits._spans(few_bits.few_bits.matrices(few_bits.about(load_trained(trained).run), ()), 2)
    )
    assert spans == ([(0, 1), (1, 2)] if room == 1 else [(0, 2)])
    text = str(trained.parent / "text.txt")
    quantize(str(trained), str(tmp_path / "out"), to="int4", method="gptq", text=(text,), rows=4)
    record = json.loads((tmp_path / "out" / "quantize.json").read_text())
    assert record["perplexity"]["after"] < 1.2 * record["perplexity"]["before"]


def test_experts_and_skipped_layers(tmp_path) -> None:
    model = replace(MODEL, moe=MoE(experts=4, per_token=2))
    base, text = write(tmp_path / "base", model), tmp_path / "text.txt"
    text.write_text(story(1, 60))
    out, skip = tmp_path / "out", ("blocks.attention.k",)
    quantize(str(base), str(out), to="int4", method="awq", text=(str(text),), skip=skip)
    found, flat = load_trained(out), flatten(load_trained(base).params)
    few = flatten(found.params)
    for path in (("blocks", "attention", "k", "weight"), ("blocks", "mlp", "router", "weight")):
        np.testing.assert_array_equal(few[path], flat[path])
    assert isinstance(few[("blocks", "mlp", "up", "weight")], Quantized)
    whole_one = logits(found.run, whole_params(found.params), TOKENS)
    np.testing.assert_allclose(logits(found.run, found.params, TOKENS), whole_one, atol=1e-5)
    with pytest.raises(UserError, match="kk', which fits no linear layer"):
        quantize(str(base), str(tmp_path / "x"), skip=("blocks.attention.kk",))


def test_what_cannot_be(trained, tmp_path) -> None:
    text, out = str(trained.parent / "text.txt"), str(tmp_path / "x")
    with pytest.raises(UserError, match="name a text with --text"):
        quantize(str(trained), out, method="gptq")
    with pytest.raises(UserError, match="need 'int8' in both"):
        quantize(str(trained), out, to="nf4", method="smoothquant", text=(text,))
    quantize(str(trained), str(tmp_path / "a"))
    with pytest.raises(UserError, match="in few bits already"):
        quantize(str(tmp_path / "a"), out)
    with pytest.raises(UserError, match="not empty"):
        quantize(str(trained), str(tmp_path / "a"))
    post = write(tmp_path / "post", replace(MODEL, norm_at="post"))
    with pytest.raises(UserError, match="choose gptq or awq"):
        quantize(str(post), out, method="smoothquant", text=(text,))
    assert not Path(out).exists()


def test_the_config_is_stored_whole(trained, tmp_path) -> None:
    quantize(str(trained), str(tmp_path / "out"), to="nf4", skip=("blocks.mlp.*",))
    held = json.loads((tmp_path / "out" / "config.json").read_text())["run"]["tune"]
    assert held == to_json(Quantization(to="nf4", skip=("blocks.mlp.*",)))
    assert isinstance(load_trained(tmp_path / "out").run.data, Text)
