"""Runs over preferences: the reference is computed once and stored, and a run goes on bitwise with it."""

from __future__ import annotations

import json
import math
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from families import native_run
from tiny import FLOAT32, assert_same
from tiny_runs import interrupt_at, records, restore

from jaxgpt.api import load
from jaxgpt.config import DPO, GPT, KTO, LoRA, Mesh, Optim, Pairs, Rated, Run, Train
from jaxgpt.errors import UserError
from jaxgpt.evals.loss import loss_of
from jaxgpt.sample.load import load_trained
from jaxgpt.text.chat import prompt_ids
from jaxgpt.text.tokenizer import ByteTokenizer
from jaxgpt.train.loop import train

MODEL = GPT(vocab_size=264, context=64, layers=1, width=32, heads=4, dropout=0.1)


def write(path: Path, first: int, count: int) -> tuple[str]:
    records = [
        {"prompt": f"{i}", "chosen": f"yes {i}", "rejected": f"no{i}"} for i in range(first, first + count)
    ]
    path.write_text("\n".join(map(json.dumps, records)))
    return (str(path),)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with random parameters."""
    folder = tmp_path_factory.mktemp("bases") / "base"
    native_run(folder, MODEL)
    return folder


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("pairs")
    data = Pairs(
        train=write(folder / "a.jsonl", 0, 24), validation=write(folder / "b.jsonl", 50, 8), length=64, bins=1
    )
    return Run(
        name="dpo", runs=str(folder), init_from=str(base), model=MODEL, data=data, objective=DPO(beta=0.5),
        compute=replace(FLOAT32, unroll=1), mesh=Mesh(data=1, fsdp=8),
        optim=Optim(peak_lr=1e-2, final_lr=1e-3, warmup_steps=0),
        train=Train(steps=6, batch_size=8, log_every=1, eval_every=3, save_every=2),
    )  # fmt: skip


@pytest.fixture(scope="module")
def done(run: Run) -> Path:
    train(run, progress=False)
    return run.folder


def test_what_is_logged_and_learned(done, run) -> None:
    """At the first step model and reference are one, but for dropout; after it the margin grows."""
    plain = replace(run, model=replace(MODEL, dropout=0.0), name="plain", train=replace(run.train, steps=3))
    train(plain, progress=False)
    first = records(plain.folder)[0]
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert first["margin"] == pytest.approx(0, abs=1e-4)
    seen = records(done)
    for name in ("reward_chosen", "reward_rejected", "accuracy", "length_chosen", "length_rejected"):
        assert name in seen[0] and f"val_{name}" in records(done, "val_loss")[0]
    assert seen[-1]["margin"] > 0.5 and "bits_per_byte" not in seen[0]
    last = records(done, "val_loss")[-1]
    assert last["val_loss"] < math.log(2) and last["val_accuracy"] > 0.9
    assert last["val_margin"] == pytest.approx(
        last["val_reward_chosen"] - last["val_reward_rejected"], rel=1e-4
    )


def test_the_reference_is_the_model_that_the_run_starts_from(done, run, base) -> None:
    """Its log-probabilities are those that `score` finds of each answer, in the order of the files."""
    stored = np.load(done / "reference/validation.npz")["logprobs"]
    model = load(base)
    contexts, answers = [], []
    for i in range(50, 58):
        for said in (f"yes {i}", f"no{i}"):
            contexts.append(prompt_ids([{"role": "user", "content": str(i)}], ByteTokenizer()))
            answers.append([*said.encode(), ByteTokenizer().control["<|end|>"]])
    wanted = [logprob for logprob, _ in model.score(contexts, answers)]
    sizes = [len(c) + len(a) for c, a in zip(contexts, answers, strict=True)]
    found = [part.sum() for part in np.split(stored, np.cumsum(sizes)[:-1])]
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_evaluation_finds_the_same_again(done) -> None:
    found = loss_of(load_trained(done, which="newest"), batch_size=8)
    last = records(done, "val_loss")[-1]
    for name in ("loss", "accuracy", "margin", "reward_rejected"):
        assert found[name] == pytest.approx(last[f"val_{name}"], rel=1e-4), name
    assert found["targets"] == 8
    broken = done.parent / "moved" / "dpo"
    shutil.copytree(done, broken)
    (broken / "reference/validation.npz").unlink()
    with pytest.raises(UserError, match=r"validation.npz does not exist; bring back"):
        loss_of(load_trained(broken), batch_size=8)


def test_a_run_goes_on_bitwise_with_what_is_stored(done, run, base, tmp_path, monkeypatch) -> None:
    """The base is not read again: here it is another by then."""
    mine = shutil.copytree(base, tmp_path / "base")
    again = replace(run, runs=str(tmp_path), init_from=str(mine))
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3, signal.SIGTERM)
        assert train(again, progress=False).reason == "SIGTERM"
    stamp = (again.folder / "reference/train.npz").stat().st_mtime_ns
    shutil.rmtree(mine / "checkpoints")
    assert train(again, progress=False).step == 6
    assert (again.folder / "reference/train.npz").stat().st_mtime_ns == stamp
    sizes = {"data": 1, "fsdp": 8, "tensor": 1, "expert": 1}
    assert_same(restore(again.folder, sizes)[0], restore(done, sizes)[0])


def test_a_changed_file_or_base_is_noticed(done, run, tmp_path) -> None:
    shutil.copytree(done, tmp_path / "dpo")
    longer = replace(run, runs=str(tmp_path))
    validation = Path(longer.folder / "reference/validation.npz")
    held = dict(np.load(validation))
    np.savez(
        validation, about=np.frombuffer(b'{"data": "x", "base": "y"}', np.uint8), logprobs=held["logprobs"]
    )
    with pytest.raises(UserError, match=r"is no longer the model that .*reference was computed from"):
        train(longer, progress=False)
    validation.unlink()
    train(longer, progress=False)  # what is gone is computed anew, from the same base
    np.testing.assert_array_equal(np.load(validation)["logprobs"], held["logprobs"])
    validation.write_bytes(validation.read_bytes()[:200])
    with pytest.raises(UserError, match=r"validation.npz is damaged .*; remove it, and it is computed anew"):
        train(longer, progress=False)


def test_ratings_train_with_their_reference_point(run, tmp_path) -> None:
    lines = [
        {"prompt": f"{i}", "completion": f"{'yes' if i % 3 else 'no'} {i}", "label": i % 3 > 0}
        for i in range(80)
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = Rated(train=(str(tmp_path / "a.jsonl"),), validation_fraction=0.2, length=64, bins=1)
    kto = replace(run, name="kto", runs=str(tmp_path), data=data, objective=KTO(beta=0.5))
    train(kto, progress=False)
    last = records(kto.folder, "val_loss")[-1]
    assert {"val_kl", "val_reward_chosen", "val_reward_rejected", "val_margin"} < last.keys()
    assert records(kto.folder)[-1]["margin"] > 0.2 and last["val_accuracy"] > 0.5


@pytest.mark.parametrize("kind", ["DPO", "KTO"])
def test_a_frozen_base_is_the_reference_that_would_be_stored(kind, run, base, tmp_path) -> None:
    """With an adapter, dropout off: the same figures and updates, and nothing is stored."""
    lines = [{"prompt": f"{i}", "completion": f"yes {i}", "label": i % 2 == 0} for i in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    rated = Rated(train=(str(tmp_path / "a.jsonl"),), validation_fraction=0.3, length=64, bins=1)
    kinds = {"DPO": (DPO(beta=0.5), run.data), "KTO": (KTO(beta=0.5), rated)}
    short = replace(
        run, runs=str(tmp_path), model=replace(MODEL, dropout=0.0), tune=LoRA(rank=4),
        **dict(zip(("objective", "data"), kinds[kind], strict=True)), train=replace(run.train, steps=3),
    )  # fmt: skip
    seen = {}
    for reference in ("stored", "frozen"):
        one = replace(short, name=reference, objective=replace(short.objective, reference=reference))
        train(one, progress=False)
        assert (one.folder / "reference").exists() == (reference == "stored")
        seen[reference] = records(one.folder), records(one.folder, "val_loss")[-1]
        found = loss_of(load_trained(one.folder, which="newest"), batch_size=8)
        assert found["margin"] == pytest.approx(seen[reference][1]["val_margin"], rel=1e-3, abs=1e-5)
    (stored, last), (frozen, same) = seen.values()
    for name in ("loss", "margin", "reward_chosen", "grad_norm"):
        values = [[record[name] for record in part] for part in (frozen, stored)]
        assert values[0] == pytest.approx(values[1], rel=1e-3, abs=1e-4), name
    assert same["val_loss"] == pytest.approx(last["val_loss"], rel=1e-4)
    with pytest.raises(UserError, match=r"reference is 'frozen' but tune is Full\(...\), which changes"):
        replace(run, objective=DPO(reference="frozen"))
    with pytest.raises(UserError, match=r"reference is 'frozen' but tune is LoRA\(...\), which changes"):
        replace(one, tune=LoRA(init="pissa"))
