"""Checkpoints chosen by a metric of a task: the loop, the record, and which checkpoint is loaded."""

from __future__ import annotations

import json
import string
from dataclasses import replace
from pathlib import Path

import jax
import pytest
from tiny import ONE, mesh, sharp_params
from tiny_runs import MODEL, OPTIM, TRAIN, records

from jaxgpt.config import Compute, Mesh, Run, Suite, Train
from jaxgpt.config.code import trust
from jaxgpt.errors import UserError
from jaxgpt.evals.during import task_scores
from jaxgpt.evals.suite import run_suite
from jaxgpt.sample.load import load_trained
from jaxgpt.tasks import Translation
from jaxgpt.text.tokenizer import ByteTokenizer
from jaxgpt.train.hooks import Score
from jaxgpt.train.loop import train


@pytest.fixture
def run(tmp_path: Path) -> Run:
    (tmp_path / "pairs.tsv").write_text("".join(f"{w}\t{w}{w}\n" for w in string.printable[:62]))
    task = Translation(
        train=(str(tmp_path / "pairs.tsv"),), validation=(str(tmp_path / "pairs.tsv"),), into="two",
        prompts=("{text}",), held_out="{text}", tokenizer="byte", max_new_tokens=4,
        metrics=("exact_match", "chrf"),
    )  # fmt: skip
    fields = vars(TRAIN) | {
        "steps": 6,
        "eval_every": 2,
        "eval_examples": 8,
        "best_by": "en-two:chrf",
        "save_every": 2,
    }
    parts = {"model": MODEL, "optim": OPTIM, "compute": Compute(dtype="float32", unroll=1)}
    return Run(
        name="best",
        runs=str(tmp_path),
        data=task,
        mesh=Mesh(data=jax.device_count()),
        train=Train(**fields),
        **parts,
    )


def test_the_best_checkpoint_is_the_one_with_the_best_metric(run):
    """Whatever the loss says: the scores are given, highest at step 4 of 6."""
    values = iter([10.0, 30.0, 20.0])

    def given(*parts):
        return lambda params: {
            "en-two:chrf": Score(next(values), True),
            "en-two:exact_match": Score(0.0, True),
        }

    result = train(run, progress=False, scores=given)
    best = json.loads((run.folder / "best.json").read_text())
    assert best == {"by": "en-two:chrf", "higher_is_better": True, "value": 30.0, "step": 4}
    assert (result.step, load_trained(run.folder).step) == (6, 4)
    assert [r["val_chrf/en-two"] for r in records(run.folder, "val_loss")] == [10.0, 30.0, 20.0]


def test_scores_during_training_are_those_of_a_suite(run):
    run = replace(run, train=replace(run.train, steps=4, eval_every=4, eval_examples=62))
    train(run, progress=False, scores=task_scores)
    (record,) = records(run.folder, "val_loss")
    (scores,) = run_suite(load_trained(run.folder), Suite(name="s", tasks=(run.data,), resamples=0))
    assert record["val_chrf/en-two"] == pytest.approx(scores.figures["chrf"].value)
    assert record["val_exact_match/en-two"] == scores.figures["exact_match"].value


def test_a_run_may_be_best_by_a_function_of_its_user(run, tmp_path):
    """It is called by its own name, wherever its file is."""
    (tmp_path / "mine.py").write_text("def letters(p):\n    return len(p.answer)\n")
    own = f"{tmp_path / 'mine.py'}:letters"
    trust(tmp_path / "mine.py")
    parts = replace(run.train, best_by="en-two:letters")
    run = replace(run, data=replace(run.data, metrics=("chrf", own)), train=parts)
    scores = task_scores(run, ByteTokenizer(), mesh(ONE))
    assert scores is not None and set(scores(sharp_params(run.model))) == {"en-two:chrf", "en-two:letters"}


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"best_by": "perplexity"}, "train.best_by is 'perplexity'; allowed: loss, error"),
        ({"best_by": "en-two:chrf", "eval_examples": 0}, "eval_examples is 0"),
        ({"best_by": "en-two:chr"}, "en-two:chrf"),
    ],
)
def test_what_cannot_be_is_said(run, parts, words):
    with pytest.raises(UserError, match=words):
        replace(run, train=replace(run.train, **parts))
    with pytest.raises(UserError, match="given no scores"):
        train(run, progress=False)
