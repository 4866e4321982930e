"""Runs that learn labels, from files to the report: what training measured is what the report says."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import COMPUTE

from jaxgpt import cli
from jaxgpt.config import GPT, Bert, Classification, Classifier, Labelled, Optim, Run, Tagged, Train
from jaxgpt.data.readers.labelled import read_labelled
from jaxgpt.data.readers.tagging import read_conll
from jaxgpt.errors import UserError
from jaxgpt.evals.labels import label_report
from jaxgpt.sample.load import load_trained
from jaxgpt.text.tokenizer import ByteTokenizer
from jaxgpt.train import loop

TRAIN = Train(steps=30, batch_size=8, eval_every=10, save_every=30, best_by="error")
OPTIM = Optim(peak_lr=3e-3, warmup_steps=5)
SIZES = {"vocab_size": ByteTokenizer().vocab_size, "context": 48, "layers": 1, "width": 32, "heads": 2}
NAMES = ("Ada", "Eve", "Paris", "Rome", "runs", "sits")
LABELS = ("O", "B-PER", "B-LOC")


def tags(n: int, chance: random.Random) -> str:
    """Column lines: a word's tag follows from the word."""
    words = [[chance.randrange(6) for _ in range(chance.randint(2, 6))] for _ in range(n)]
    return "\n".join("".join(f"{NAMES[w]} {LABELS[(1, 1, 2, 2, 0, 0)[w]]}\n" for w in line) for line in words)


def table(n: int, chance: random.Random) -> str:
    """A header and rows of two texts; the label follows from the first."""
    rows = [(chance.choice(NAMES), chance.choice(NAMES)) for _ in range(n)]
    return "text\tother\tlabel\n" + "".join(f"{a}\t{b}\t{a in NAMES[:3]}\n" for a, b in rows)


@pytest.mark.parametrize("kind", ["tags", "texts", "pairs"])
def test_training_the_report_and_predictions_agree(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three labels, fewer than the id of padding; a table without pairs and one with them."""
    make = tags if kind == "tags" else table
    for name, n in (("train", 120), ("validation", 30)):
        (tmp_path / f"{name}.tsv").write_text(make(n, random.Random(name)).replace(" ", "\t"))
    files = {name: (str(tmp_path / f"{name}.tsv"),) for name in ("train", "validation")}
    backbone = Bert(**SIZES, dropout=0.0) if kind == "pairs" else GPT(**SIZES, causal=False)
    if kind == "tags":
        model, data = Classifier(backbone=backbone, labels=LABELS), Tagged(**files, tokenizer="byte")
    else:
        model = Classifier(backbone=backbone, labels=("False", "True"), pool="mean")
        data = Labelled(**files, tokenizer="byte", pair="other" if kind == "pairs" else "")
    parts = {"objective": Classification(), "optim": OPTIM, "train": TRAIN, "compute": COMPUTE}
    run = Run(name=kind, runs=str(tmp_path), model=model, data=data, **parts)
    result = loop.train(run)
    assert result.reason == "finished"
    report = label_report(load_trained(run.folder), "validation", batch_size=4)
    figures = report.figures
    accuracy = figures["token_accuracy" if kind == "tags" else "label_accuracy"]
    assert accuracy == pytest.approx(1 - result.best, abs=1e-6)
    assert accuracy > 0.6  # a third of the tags, a half of the texts, would be chance
    assert cli.main(["predict", str(run.folder), files["validation"][0]]) == 0
    assert close([json.loads(line) for line in capsys.readouterr().out.splitlines()], report.predictions)
    out = tmp_path / "out.tsv"
    assert cli.main(["predict", str(run.folder), files["validation"][0], "--out", str(out)]) == 0
    if kind == "tags":
        wanted = [tuple(found["tags"]) for found in report.predictions]
        assert [sentence.tags for sentence in read_conll([out])] == wanted
    else:
        made = [example.label for example in read_labelled([out], label_field="predicted")]
        assert made == [found["label"] for found in report.predictions]


def close(made: Any, wanted: Any) -> bool:
    """Equal JSON, up to the rounding of numbers."""
    if isinstance(wanted, dict):
        return wanted.keys() <= made.keys() and all(close(made[key], value) for key, value in wanted.items())
    if isinstance(wanted, list):
        return len(made) == len(wanted) and all(map(close, made, wanted))
    return made == (pytest.approx(wanted, rel=1e-4) if isinstance(wanted, float) else wanted)


def test_labels_that_the_model_lacks_are_named_together(tmp_path: Path) -> None:
    (tmp_path / "a.bio").write_text("Ada I-PER\nParis I-LOC\n\nRome I-LOC\n\n")
    files = (str(tmp_path / "a.bio"),)
    run = Run(
        name="a",
        runs=str(tmp_path),
        model=Classifier(backbone=GPT(**SIZES, causal=False), labels=("O", "B-ORG")),
        data=Tagged(train=files, validation=files, tokenizer="byte"),
        objective=Classification(),
        train=TRAIN,
        optim=OPTIM,
    )
    with pytest.raises(UserError, match=r"data.train has labels .*: B-LOC, B-PER \(tags are read as BIO\)"):
        loop.train(run)
    assert not run.folder.exists()
