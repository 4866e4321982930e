"""Runs that tune a part of a model: what their folders hold, resuming, and where their base must be."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_runs import copy, curve, interrupt_at, records, restore, text_run

import jaxgpt
from jaxgpt.checkpoint import load_params
from jaxgpt.cli import main
from jaxgpt.config import (
    GPT,
    Batching,
    Full,
    LoRA,
    Optim,
    PrefixTuning,
    PromptTuning,
    Run,
    Sampling,
    Train,
    load_run,
)
from jaxgpt.convert.merge import merge
from jaxgpt.errors import UserError
from jaxgpt.evals.loss import validation_loss
from jaxgpt.sample.engine import Engine
from jaxgpt.sample.generate import Generator
from jaxgpt.sample.load import load_trained
from jaxgpt.sample.request import Piece, Request
from jaxgpt.train.loop import train
from jaxgpt.tune.base import flatten
from jaxgpt.tune.slots import fill

MODEL = GPT(vocab_size=264, context=48, layers=2, width=32, heads=4)
FAST = Optim(peak_lr=2e-2, final_lr=2e-2, schedule="constant", warmup_steps=0)
SHORT = Train(steps=6, batch_size=8, log_every=1, eval_every=3, save_every=2)
PLACES = ("blocks.attention.*",)
"""Enough for a test of runs, and soon compiled."""


@pytest.fixture(scope="module")
def runs(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, and two adapters of different ranks over it."""
    folder = tmp_path_factory.mktemp("tuned")
    train(of(corpus, folder, "base", None), progress=False)
    for name, rank in (("one", 2), ("two", 3)):
        train(of(corpus, folder, name, LoRA(rank=rank, targets=PLACES, dropout=0.1)), progress=False)
    return folder


def of(corpus: Path, folder: Path, name: str, tune: object, **parts: object) -> Run:
    run = text_run(corpus, folder, name, model=MODEL, train=SHORT, optim=FAST, **parts)
    run = replace(run, data=replace(run.data, length=32))
    return run if tune is None else replace(run, tune=tune, init_from=str(folder / "base"))


def test_only_what_is_trained_is_saved_and_every_command_has_the_whole(runs: Path) -> None:
    state, _ = restore(runs / "one")
    assert {path[-1] for path in flatten(state.params)} == {"a", "b"}
    trained = sum(x.size for x in jax.tree.leaves(state.params))
    (compiled,) = records(runs / "one", "trained_parameters")
    assert compiled["trained_parameters"] == trained == 2 * 2 * 4 * (32 + 32)
    assert compiled["parameters"] > 10 * trained
    held = load_trained(runs / "one", which="newest")
    last = records(runs / "one", "val_loss")[-1]
    assert validation_loss(runs / "one", which="newest")["loss"] == pytest.approx(last["val_loss"], abs=2e-5)
    base, _ = load_params(runs / "base", load_run(runs / "base"), held.mesh)
    assert jax.tree.structure(base) == jax.tree.structure(held.params)
    named = json.loads((runs / "one" / "base.json").read_text())
    assert named["run"] == str(runs / "base")
    assert named["step"] in (3, 6)


def test_an_interrupted_run_goes_on_bitwise_equal(
    runs: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout in the adapters; though its base has been trained on meanwhile."""
    shutil.copytree(runs / "base", tmp_path / "base")
    run = of(corpus, tmp_path, "one", LoRA(rank=2, targets=PLACES, dropout=0.1))
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3, 15)
        assert train(run, progress=False).reason == "SIGTERM"
    longer = replace(of(corpus, tmp_path, "base", None), train=replace(SHORT, steps=8))
    train(longer, progress=False)
    assert train(run, progress=False).reason == "finished"
    assert curve(tmp_path / "one") == curve(runs / "one")
    now, then = (restore(folder / "one")[0] for folder in (tmp_path, runs))
    for a, b in zip(*map(jax.tree.leaves, (now, then)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_base_is_found_beside_the_run_or_in_it_and_never_taken_for_another(
    runs: Path, corpus: Path, tmp_path: Path
) -> None:
    own = copy(runs / "one", tmp_path)
    path = own / "base.json"
    named = json.loads(path.read_text())
    path.write_text(json.dumps(named | {"run": "gone/base"}))
    with pytest.raises(UserError, match=r"was tuned from gone/base, which is not there, .*--self-contained"):
        load_trained(own)
    shutil.copytree(runs / "base", tmp_path / "base")
    expected = load_trained(runs / "one").params
    jax.tree.map(np.testing.assert_array_equal, load_trained(own).params, expected)
    path.write_text(json.dumps(named | {"digest": "00000000", "run": "gone/base"}))
    with pytest.raises(UserError, match=r"has other parameters at step .* than when .* was tuned from it"):
        load_trained(own)
    shutil.rmtree(own)
    whole = of(corpus, tmp_path, "one", LoRA(rank=2, targets=PLACES, dropout=0.1))
    train(whole, progress=False, self_contained=True)
    shutil.rmtree(tmp_path / "base")
    jax.tree.map(np.testing.assert_array_equal, load_trained(own).params, expected)
    assert train(whole, progress=False).reason == "finished"


def test_a_tuned_run_can_be_started_from(runs: Path, corpus: Path, tmp_path: Path) -> None:
    """Its parameters are then the whole ones."""
    run = replace(of(corpus, tmp_path, "next", None), init_from=str(runs / "one"))
    train(replace(run, train=replace(SHORT, steps=1)), progress=False)
    first = records(tmp_path / "next")[0]["loss"]
    assert first < records(runs / "base")[0]["loss"]
    over = replace(run, name="over", tune=LoRA(rank=1, targets=PLACES))
    train(replace(over, train=replace(SHORT, steps=1)), progress=False)
    assert records(tmp_path / "over")[0]["loss"] == pytest.approx(first, abs=1e-5)


@pytest.mark.parametrize(
    "tune", [PromptTuning(tokens=8, init="text", text="the cat"), PrefixTuning(tokens=8)]
)
def test_virtual_tokens_take_their_part_of_the_context(
    tune: PromptTuning | PrefixTuning, runs: Path, corpus: Path, tmp_path: Path
) -> None:
    run = of(corpus, tmp_path, "virtual", tune)
    run = replace(run, init_from=str(runs / "base"), data=replace(run.data, length=None))
    assert run.length == 40
    train(replace(run, train=replace(SHORT, steps=3)), progress=False)
    model = jaxgpt.load(tmp_path / "virtual")
    assert "added" in model.params
    assert len(model.generate("the", max_new_tokens=60, temperature=0).ids) <= 40 - 3
    greedy = model.generate("the cat", max_new_tokens=12, temperature=0)
    prompt = model.generator.texts(["the cat"])["prompts"][0]
    ((logprob, likeliest),) = model.score([prompt], [greedy.ids])
    assert likeliest
    assert logprob == pytest.approx(sum(greedy.logprobs), abs=1e-4)
    with pytest.raises(UserError, match=r"adds something beside the weights that cannot be merged"):
        merge(str(tmp_path / "virtual"), str(tmp_path / "merged"))
    maps = model.attention(["the cat sat"])[0]
    assert (maps.sum(-1) < 1).all()  # the rest goes to the virtual tokens
    with pytest.raises(UserError, match=r"data.length 48 and tune.tokens 8 is more than model.context 48"):
        replace(run, data=replace(run.data, length=48))


def test_adapters_of_one_batch_are_those_of_each_alone(runs: Path) -> None:
    """Slot 0 is the base; loading one more compiles nothing."""
    generator = Generator.load(runs / "base")
    prompts = generator.texts(["the cat", "seven dogs ran", "the cat", "a mat"])["prompts"]
    generator.make_slots(slots=2, rank=4)
    generator.load_adapter("one", runs / "one")
    before = fill._cache_size()
    generator.load_adapter("two", runs / "two")
    assert fill._cache_size() == before
    made = generator.generate(prompts, max_new_tokens=8, adapters=["one", "two", None, "one"])
    alone = {name: Generator.load(runs / name) for name in ("base", "one", "two")}
    for i, name in enumerate(["one", "two", "base", "one"]):
        (expected,) = alone[name].generate(prompts[i : i + 1], max_new_tokens=8, seeds=[i])
        assert made[i].ids == expected.ids
        np.testing.assert_allclose(made[i].logprobs, expected.logprobs, atol=1e-4)
    engine, pieces = Engine(generator, Batching(slots=4, page=4, chunk=8)), [list[Piece]() for _ in prompts]
    for i, name in enumerate(["one", "two", None, "one"]):
        how = {"adapter": name, "sampling": Sampling(), "seed": i, "max_new_tokens": 8}
        engine.submit(Request(prompt=prompts[i], **how), pieces[i].append)
    while engine.step():
        pass
    assert [[piece.id for piece in row] for row in pieces] == [one.ids for one in made]
    for names, words in (
        ("three", "there is no adapter 'three'; loaded are one, two"),
        (["one"], "adapters has 1 entries for 4 prompts"),
    ):
        with pytest.raises(UserError, match=words):
            generator.generate(prompts, adapters=names)
    with pytest.raises(UserError, match=r"all 2 slots are taken \(one, two\)"):
        generator.load_adapter("three", runs / "one")


def test_the_interface_takes_an_adapter_of_its_own_model_alone(runs: Path) -> None:
    model = jaxgpt.load(runs / "base")
    model.load_adapter("one", runs / "one")
    both = model.generate(["the cat"] * 2, adapter=["one", None], max_new_tokens=6, temperature=0)
    tuned = jaxgpt.load(runs / "one").generate("the cat", max_new_tokens=6, temperature=0)
    assert both[0].ids == tuned.ids
    assert both[1].ids == model.generate("the cat", max_new_tokens=6, temperature=0).ids
    with pytest.raises(UserError, match=r"was tuned from .*base, step .*, not from .*one, step"):
        jaxgpt.load(runs / "one").load_adapter("two", runs / "two")


def test_a_merged_run_is_the_tuned_one_without_its_base(runs: Path, corpus: Path, tmp_path: Path) -> None:
    assert main(["merge", str(runs / "one"), str(tmp_path / "merged")]) == 0
    whole, tuned = jaxgpt.load(tmp_path / "merged"), jaxgpt.load(runs / "one")
    jax.tree.map(np.testing.assert_array_equal, whole.params, tuned.params)
    text = {"max_new_tokens": 8, "temperature": 0}
    assert whole.generate("the cat", **text).ids == tuned.generate("the cat", **text).ids
    assert whole.step == tuned.step
    assert isinstance(whole.config.tune, Full)
    next_run = replace(of(corpus, tmp_path, "next", None), init_from=str(tmp_path / "merged"))
    train(replace(next_run, train=replace(SHORT, steps=1)), progress=False)
    with pytest.raises(UserError, match="is an imported or merged model without a state to resume from"):
        train(load_run(tmp_path / "merged"), progress=False)
    with pytest.raises(UserError, match="trains all parameters: it is whole already"):
        merge(str(runs / "base"), str(tmp_path / "other"))


def test_a_method_needs_a_model_to_tune() -> None:
    with pytest.raises(UserError, match="tune is LoRA but init_from is empty; name the run"):
        Run(name="x", tune=LoRA())
