"""The quick start from end to end, on little text and for few steps: what it leaves, and going on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jax
import pytest

from jaxgpt import quickstart, quickstart_data
from jaxgpt.cli import main
from jaxgpt.lock import LOCK
from jaxgpt.quickstart_data import Corpus, corpus
from jaxgpt.train import loop

VALUES = {
    "pretrain_bits_per_byte",
    "answer_loss_base",
    "answer_loss_tuned",
    "exact_match_base",
    "exact_match_tuned",
    "seconds",
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A twentieth of the text, half of the layers, and 12 steps of each training, compiled as for users."""
    jax.config.update("jax_disable_most_optimizations", False)
    pretrain, tune = quickstart.pretrain_run, quickstart.tune_run
    model = replace(quickstart.model(), layers=2, width=64)

    def little() -> Corpus:
        return corpus(300_000)

    def short(make):
        return lambda workdir: replace(
            (run := make(workdir)),
            train=replace(run.train, steps=12, eval_every=6, save_every=4),
            optim=replace(run.optim, warmup_steps=2),
        )

    monkeypatch.setattr(quickstart, "model", lambda: model)
    monkeypatch.setattr(quickstart_data, "corpus", little)
    monkeypatch.setattr(quickstart, "TRAIN_DIALOGUES", 400)
    monkeypatch.setattr(quickstart, "TEST_QUESTIONS", 20)
    monkeypatch.setattr(quickstart, "pretrain_run", short(pretrain))
    monkeypatch.setattr(quickstart, "tune_run", short(tune))
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.mark.slow
def test_every_stage_is_done_once_and_an_interrupted_one_goes_on(
    small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / "work"
    plain, steps = loop.train, []

    def train(run, **options):
        result = plain(run, **options)
        steps.append((run.name, result.step))
        if len(steps) == 1:
            raise KeyboardInterrupt  # after the pretraining, before anything else
        return result

    monkeypatch.setattr(loop, "train", train)
    with pytest.raises(KeyboardInterrupt):
        quickstart.quickstart(workdir=work)
    assert not (work / "results.json").exists()
    prepared = (work / "text" / "manifest.json").stat().st_mtime_ns
    assert main(["quickstart", "--workdir", str(work)]) == 0
    assert steps == [("pretrain", 12), ("pretrain", 12), ("tune", 12)]
    assert (work / "text" / "manifest.json").stat().st_mtime_ns == prepared

    results = json.loads((work / "results.json").read_text("utf-8"))
    assert results.keys() >= VALUES
    assert 0 < results["answer_loss_tuned"] < results["answer_loss_base"]
    said = capsys.readouterr().out
    assert f"jaxgpt chat {work / 'runs' / 'tune'}" in said
    assert f"{results['answer_loss_tuned']:.3f}" in said
    page = (work / "report.html").read_text("utf-8")
    for heading in ("Numbers", "Pretraining", "Instruction tuning", "What the loss sees", "Skills"):
        assert f"<h2>{heading}</h2>" in page

    def times() -> list[int]:
        files = [p for p in sorted((work / "runs").rglob("*")) if p.is_file() and p.name != LOCK]
        return [path.stat().st_mtime_ns for path in files]

    again = times()
    assert main(["quickstart", "--workdir", str(work)]) == 0
    assert again == times()
    repeated = json.loads((work / "results.json").read_text("utf-8"))
    assert repeated.pop("seconds") >= results.pop("seconds") and repeated == results


def test_the_tested_questions_are_not_trained_on(small, tmp_path: Path) -> None:
    quickstart._claim(tmp_path / "work")
    quickstart._write_corpus(tmp_path / "work")
    folder = tmp_path / "work" / "instructions"

    def questions(name: str) -> set[str]:
        lines = (folder / f"{name}.jsonl").read_text("utf-8").splitlines()
        turns = (m for line in lines for m in json.loads(line)["messages"])
        return {m["content"] for m in turns if m["role"] == "user"}

    assert len(questions("test")) == 20
    assert not questions("test") & (questions("train") | questions("validation"))


def test_a_folder_of_something_else_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("keep me")
    assert main(["quickstart", "--workdir", str(tmp_path)]) == 2
    assert "holds other files" in capsys.readouterr().err
    assert main(["quickstart", "--workdir", str(tmp_path / "mine.txt")]) == 2
    assert "is a file" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
