"""Self-training and active selection: what is taken and why, and that a next run can read it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import HERE
from tiny_evals import COMPUTE, MODEL, save_run

from jaxgpt.config import Classification, Classifier, Labelled, Tagged
from jaxgpt.data.readers.labelled import read_labelled
from jaxgpt.data.readers.tagging import read_conll
from jaxgpt.errors import UserError
from jaxgpt.evals.few_labels import (
    column_lines,
    confidence,
    known_texts,
    most_uncertain,
    take_confident,
    uncertainty,
    written,
)
from jaxgpt.evals.few_labels_command import label, select
from jaxgpt.files import write_jsonl, write_text
from jaxgpt.models import init_params


def said(label: str, p: float) -> dict:
    other = {"yes": "no", "no": "yes"}[label]
    return {"label": label, "score": p, "scores": {label: p, other: 1 - p}}


KEYS = list("abcdefg")
RECORDS = [said("yes", p) for p in (0.99, 0.97, 0.95, 0.6)] + [said("no", p) for p in (0.96, 0.55, 0.92)]


def test_the_surest_are_taken_and_every_other_is_accounted_for():
    found = take_confident([*KEYS, "a"], [*RECORDS, RECORDS[0]], 0.9, 3, False, {"b"})
    assert found.places == [0, 2, 4]  # the three surest of a, c, e, g
    assert (found.unsure, found.known, found.repeated, found.over) == (2, 1, 1, 1)
    assert found.counts == {"yes": 2, "no": 1}


def test_balance_takes_as_many_of_each_label():
    found = take_confident(KEYS, RECORDS, 0.9, 0, True, set())
    assert found.places == [0, 1, 4, 6] and found.counts == {"yes": 2, "no": 2}
    assert take_confident(KEYS, RECORDS, 0.9, 2, True, set()).places == [0, 4]


def test_measures_by_hand():
    record = {"label": "a", "score": 0.5, "scores": {"a": 0.5, "b": 0.3, "c": 0.2}}
    assert uncertainty(record, "least-confidence") == pytest.approx(0.5)
    assert uncertainty(record, "margin") == pytest.approx(0.8)
    expected = -sum(p * math.log(p) for p in (0.5, 0.3, 0.2))
    assert uncertainty(record, "entropy") == pytest.approx(expected)
    sentence = {"tags": ["O", "B-X"], "scores": [0.9, 0.6]}
    assert confidence(sentence) == 0.6 and uncertainty(sentence, "least-confidence") == pytest.approx(0.4)
    with pytest.raises(UserError, match="use least-confidence"):
        uncertainty(sentence, "entropy")


def test_the_least_certain_come_first_and_known_ones_never():
    assert most_uncertain(KEYS, RECORDS, "entropy", 3, set()) == [5, 3, 6]
    assert most_uncertain(KEYS, RECORDS, "entropy", 3, {"f"}) == [3, 6, 2]
    assert most_uncertain(["a", "a", "b"], RECORDS[:3], "margin", 3, set()) == [2, 0]


def test_diverse_texts_are_not_near_duplicates():
    """The two least certain lie together; the second to be chosen is the one far from the first."""
    x = {5: [1.0, 0.0], 3: [1.0, 0.01], 6: [0.0, 1.0]}
    features = lambda places: np.array([x.get(i, [1.0, 0.1]) for i in places])  # noqa: E731
    assert most_uncertain(KEYS, RECORDS, "entropy", 2, set(), features, pool=2) == [5, 6]


@pytest.mark.parametrize("ending", [".tsv", ".jsonl"])
def test_what_is_written_is_training_data_of_a_next_run(tmp_path: Path, ending):
    data = Labelled(train=("t.tsv",), validation=("v.tsv",), text="review", label="mood")
    records, lines = written(data, ["a b", "c"], [RECORDS[0], RECORDS[4]], ending, "run")
    path = tmp_path / f"more{ending}"
    write_jsonl(path, records) if records else write_text(path, "\n".join(lines) + "\n")
    assert [(e.text, e.label) for e in read_labelled([path], "review", "", "mood")] == [
        ("a b", "yes"),
        ("c", "no"),
    ]
    records, _ = written(data, ["a b"], [RECORDS[0]], ".jsonl", own=[{"id": 7, "mood": "?", "review": "a b"}])
    assert records == [{"review": "a b", "mood": "", "id": 7, "predicted": "yes", "confidence": 0.99}]
    with pytest.raises(UserError, match="tab"):
        written(data, ["a\tb"], [RECORDS[0]], ".tsv", "run")


def test_sentences_are_written_as_column_files(tmp_path: Path):
    lines = column_lines([{"tags": ["O", "B-X"]}, {"tags": ["O"]}], [["in", "Rome"], ["so"]])
    write_text(tmp_path / "a.bio", "\n".join(lines) + "\n")
    assert [(s.words, s.tags) for s in read_conll([tmp_path / "a.bio"])] == [
        (("in", "Rome"), ("O", "B-X")),
        (("so",), ("O",)),
    ]


def test_texts_of_the_runs_own_files_are_known(tmp_path: Path):
    (tmp_path / "a.tsv").write_text("good  film\t1\nbad\t0\n")
    files = (str(tmp_path / "a.tsv"),)
    assert known_texts(Labelled(train=files, validation=files)) == {"good film", "bad"}


def test_a_run_labels_and_selects(labels_run: Path, tmp_path: Path, capsys):
    """Its own texts and repeated ones are left out by their words; other fields stay; its files are safe."""
    new = tmp_path / "new.jsonl"
    texts = ["Ada  runs", "we love it", "we love it", "far away"]
    write_jsonl(new, [{"id": i, "text": text, "label": "yes"} for i, text in enumerate(texts)])
    label(str(labels_run), str(new), out=str(tmp_path / "more.jsonl"), above=0.5)
    said = capsys.readouterr().err
    assert "2 of 4 texts" in said and "1 that the run's files have, 1 repeated" in said
    assert "labels: no 0, yes 2" in said and "2 of those kept have a label in the file: 100.0% agree" in said
    found = [json.loads(line) for line in (tmp_path / "more.jsonl").read_text().splitlines()]
    assert [(r["id"], r["label"], r["source"]) for r in found] == [
        (1, "yes", "run, step 5"),
        (3, "yes", "run, step 5"),
    ]
    assert [e.label for e in read_labelled([tmp_path / "more.jsonl"])] == ["yes", "yes"]
    for diverse in (False, True):
        select(str(labels_run), str(new), out=str(tmp_path / "ask.tsv"), count=1, diverse=diverse)
        assert (tmp_path / "ask.tsv").read_text().splitlines()[0] == "text\tlabel\tpredicted\tconfidence"
    own = labels_run.parent / "own.tsv"
    before = own.read_text()
    with pytest.raises(UserError, match="learns from"):
        label(str(labels_run), str(new), out=str(own), above=0.5)
    assert own.read_text() == before


def test_a_tagger_labels_and_selects(tmp_path: Path, capsys):
    """Its own sentences are known by their words, however they are written; blank ones teach nothing."""
    (tmp_path / "own.bio").write_text("Ada B-PER\nruns O\n. O\n")
    files = (str(tmp_path / "own.bio"),)
    data = Tagged(train=files, validation=files, tokenizer="byte")
    model = Classifier(backbone=replace(MODEL, causal=False), labels=("O", "B-PER", "I-PER"))
    params = init_params(model, COMPUTE, HERE, jax.random.key(1))
    run = str(save_run(tmp_path / "run", data, model, params, objective=Classification()))
    new, out = tmp_path / "new.jsonl", tmp_path / "more.bio"
    write_jsonl(new, [{"text": "Ada runs."}, {"text": " "}, {"words": ["New York", "is", "far"]}])
    label(run, str(new), out=str(out), above=0.0)
    assert "1 of 3 texts" in (said := capsys.readouterr().err) and "1 less sure, 1 that the run's" in said
    assert [s.words for s in read_conll([out])] == [("New York", "is", "far")]
    select(run, str(new), out=str(out), count=3, diverse=True)
    assert [s.words for s in read_conll([out])] == [("New York", "is", "far")]
    with pytest.raises(UserError, match="--balance is for one label per text"):
        label(run, str(new), out=str(out), balance=True)
    with pytest.raises(UserError, match="--by is 'margin'"):
        select(run, str(new), out=str(out), by="margin")
    with pytest.raises(UserError, match="no place in a column file"):
        column_lines([{"tags": ["O"]}], [["a\tb"]])


def test_more_labels_than_are_wanted_cannot_be_balanced():
    with pytest.raises(UserError, match="--most is 1, fewer than the 2 labels"):
        take_confident(KEYS, RECORDS, 0.9, 1, True, set())
