"""A run that learns from another: it resumes to the bit, from the same teacher or not at all."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import assert_same
from tiny_runs import MODEL, TRAIN, curve, interrupt_at, records, restore, text_run

from jaxgpt.config import Distillation, Run
from jaxgpt.errors import UserError
from jaxgpt.train import loop
from jaxgpt.train.teacher import FILE

SMALL = replace(MODEL, layers=1)
FOUR = replace(TRAIN, steps=4, save_every=2, eval_every=4, eval_batches=1)


def student(corpus: Path, runs: Path, teacher: Path, name: str = "student") -> Run:
    objective = Distillation(teacher=str(teacher), hard_weight=0.5)
    return text_run(corpus, runs, name, model=SMALL, objective=objective, train=FOUR)


def test_it_learns_from_the_same_teacher_to_the_end_or_not_at_all(
    corpus: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = student(corpus, tmp_path, trained)
    loop.train(run, progress=False)
    assert all(record["divergence"] > 0 for record in records(run.folder))
    cut = student(corpus, tmp_path / "cut", trained)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 1, signal.SIGTERM)
        assert loop.train(cut, progress=False).step < 4
    path = cut.folder / FILE
    about = json.loads(path.read_text())
    assert about["run"] == str(trained)
    path.write_text(json.dumps(about | {"digest": "0"}))
    with pytest.raises(UserError, match="bring back the run of then"):
        loop.train(cut, progress=False)
    path.write_text(json.dumps(about))
    loop.train(cut, progress=False)
    assert curve(cut.folder) == curve(run.folder)
    assert_same(restore(cut.folder)[0].params, restore(run.folder)[0].params)


def test_a_teacher_that_does_not_fit_is_refused(corpus: Path, trained: Path, tmp_path: Path) -> None:
    run = student(corpus, tmp_path, trained)
    for model, why in (
        (replace(SMALL, context=2 * MODEL.context), "data.length to"),
        (replace(SMALL, vocab_size=300), "no causal GPT of 300 ids"),
    ):
        with pytest.raises(UserError, match=why):
            loop.train(replace(run, name=why.split()[0], model=model), progress=False)
