"""A run that learns from another: it resumes to the bit, from the same teacher or not at all."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import assert_same
from tiny_runs import MODEL, TRAIN, curve, interrupt_at, restore, text_run

from jaxgpt.config import Distillation, Run
from jaxgpt.errors import UserError
from jaxgpt.train import loop

SMALL = replace(MODEL, layers=1)
FOUR = replace(TRAIN, steps=4, save_every=2, eval_every=4, eval_batches=1)


def student(corpus: Path, runs: Path, teacher: Path, name: str = "student") -> Run:
    objective = Distillation(teacher=str(teacher), hard_weight=0.5)
    return text_run(corpus, runs, name, model=SMALL, objective=objective, train=FOUR)


def test_it_learns_from_the_teacher_and_resumes(
    corpus: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = student(corpus, tmp_path, trained)
    loop.train(run, progress=False)
    records = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert all(r["divergence"] > 0 for r in records if "loss" in r)
    assert json.loads((run.folder / "teacher.json").read_text())["run"] == str(trained)
    cut = student(corpus, tmp_path / "cut", trained)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3, signal.SIGTERM)
        assert loop.train(cut, progress=False).step == 3
    loop.train(cut, progress=False)
    assert curve(cut.folder) == curve(run.folder)
    assert_same(restore(cut.folder)[0].params, restore(run.folder)[0].params)


def test_another_teacher_is_refused(corpus: Path, trained: Path, tmp_path: Path) -> None:
    run = student(corpus, tmp_path, trained)
    loop.train(run, progress=False)
    path = run.folder / "teacher.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"digest": "0"}))
    with pytest.raises(UserError, match="bring back the run of then"):
        loop.train(run, progress=False)
    with pytest.raises(UserError, match=r"data.length to"):
        loop.train(
            text_run(corpus, tmp_path, "long", model=replace(SMALL, context=2 * MODEL.context),
                     objective=run.objective, train=FOUR), progress=False)  # fmt: skip
