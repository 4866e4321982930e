"""Texts to label: files of every kind read, and written with what was predicted of them."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from jaxgpt.cli import main
from jaxgpt.config import GPT, Classification, Classifier, Labelled, Run, Tagged, to_json
from jaxgpt.data.readers.tagging import DOCUMENT, read_conll
from jaxgpt.errors import UserError
from jaxgpt.evals.predict_files import json_lines, own_lines, read_source
from jaxgpt.files import write_json

FILES: dict[str, Any] = {"train": ("a",), "validation": ("a",)}
TAGGED, LABELLED = Tagged(**FILES), Labelled(**FILES)
PAIRS = Labelled(**FILES, pair="other", label="kind")


def read(folder: Path, file: str, text: str, data: Any, **options: Any):
    (folder / file).write_text(text, "utf-8")
    return read_source(str(folder / file), data, **options)


@pytest.mark.parametrize(
    ("name", "text", "kind", "texts", "gold"),
    [
        ("a.txt", "Ada runs.\n\nEve O\n", "lines", ["Ada runs.", "Eve O"], [None, None]),
        (
            "a.txt",
            "Ada B-A\nruns O\n\nEve B-A\n",
            "columns",
            [["Ada", "runs"], ["Eve"]],
            [["B-A", "O"], ["B-A"]],
        ),
        ("a.conll", "Ada NNP\nruns VB\n\nEve NNP\n", "columns", [["Ada", "runs"], ["Eve"]], [None, None]),
        ("a.bio", "我\n在\n\n\n家\n", "columns", [["我", "在"], ["家"]], [None, None]),
        ("a.tsv", " \tx\tB-A\na\ty\tI-A\n", "columns", [[" ", "a"]], [["B-A", "I-A"]]),
        (
            "a.conll",
            f"{DOCUMENT} O\n\nAda S-A\n{DOCUMENT} O\nEve O\n",
            "columns",
            [["Ada"], ["Eve"]],
            [["B-A"], ["O"]],
        ),
        (
            "a.jsonl",
            '{"text": "Ada  runs"}\n{"words": ["Eve", " "]}\n',
            "jsonl",
            ["Ada  runs", ["Eve", " "]],
            [None] * 2,
        ),
        ("a.jsonl", '{"text": ""}\n', "jsonl", [""], [None]),
    ],
)
def test_texts_for_a_tagger(
    tmp_path: Path, name: str, text: str, kind: str, texts: list[Any], gold: list[Any]
) -> None:
    source = read(tmp_path, name, text, TAGGED)
    assert source.kind == kind
    assert [given.text for given in source.texts] == texts
    assert [given.gold for given in source.texts] == gold


@pytest.mark.parametrize(
    ("name", "text", "data", "texts", "gold"),
    [
        ("a.tsv", "text\nAda\nEve\n", LABELLED, ["Ada", "Eve"], [None, None]),
        ("a.tsv", "Ada\nEve\n", LABELLED, ["Ada", "Eve"], [None, None]),
        ("a.tsv", "Ada\tyes\nEve\tno\n", LABELLED, ["Ada", "Eve"], ["yes", "no"]),
        ("a.csv", 'n,text,label\n1,"a, ""b""",yes\n', LABELLED, ['a, "b"'], ["yes"]),
        ("a.csv", "other,text\nb,a\n", PAIRS, [["a", "b"]], [None]),
        ("a.jsonl", '{"text": "a", "other": "b", "kind": 3}\n', PAIRS, [["a", "b"]], ["3"]),
        ("a.txt", "a\tb\n\nc\n", LABELLED, ["a\tb", "c"], [None, None]),
    ],
)
def test_texts_for_a_classifier(
    tmp_path: Path, name: str, text: str, data: Labelled, texts: list[Any], gold: list[Any]
) -> None:
    source = read(tmp_path, name, text, data)
    assert [given.text for given in source.texts] == texts
    assert [given.gold for given in source.texts] == gold


@pytest.mark.parametrize(
    ("name", "text", "data", "said"),
    [
        (
            "a.tsv",
            "body\tid\tn\nAda\t1\t2\n",
            LABELLED,
            r"no column 'text' \(its first line has: body, id, n\)",
        ),
        ("a.tsv", "text\tn\nAda\n", LABELLED, r"1 of 2 lines are bad.*a.tsv:2: 1 columns, not the 2"),
        ("a.jsonl", '{"text": "a"}\n{"texts": "a"}\n', TAGGED, r"a.jsonl:2: no field 'text'.*'texts'"),
        ("a.jsonl", '{"words": "a"}\n', TAGGED, "'words' is not a list of words"),
        ("a.jsonl", '{"text": " "}\n', LABELLED, "field 'text' is empty"),
        ("a.jsonl", "{\n", LABELLED, "not JSON"),
        ("a.txt", "a\n", PAIRS, "one text each; give pairs as a table"),
        ("a.txt", "\n \n", TAGGED, "holds no text"),
    ],
)
def test_what_cannot_be_read_is_said(tmp_path: Path, name: str, text: str, data: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        read(tmp_path, name, text, data)


def test_kinds_that_a_run_does_not_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a classifier reads no column files"):
        read(tmp_path, "a.txt", "a\n", LABELLED, kind="columns")
    assert read(tmp_path, "a.tsv", "a\tb\nc\n", TAGGED, kind="lines").texts[0].text == "a\tb"
    assert read(tmp_path, "a.csv", "body,n\na,b\n", LABELLED, name="body").texts[0].text == "a"


def test_columns_out_are_read_as_columns(tmp_path: Path) -> None:
    """Word, score, what there was, tag; conlleval reads the last two, our reader the last."""
    source = read(tmp_path, "a.conll", "Ada NNP S-PER\nruns VB O\n\nEve NNP O\n", TAGGED)
    records = [{"tags": ["O", "B-PER"], "scores": [0.5, 1.0]}, {"tags": ["B-PER"], "scores": [0.25]}]
    made = "".join(own_lines(source, records))
    assert made.splitlines()[0] == "Ada\t0.500000\tNNP\tS-PER\tO"
    (tmp_path / "b.conll").write_text(made)
    assert [s.tags for s in read_conll([tmp_path / "b.conll"])] == [("O", "B-PER"), ("B-PER",)]
    plain = read(tmp_path, "a.txt", "Ada runs\n", TAGGED)
    made = "".join(own_lines(plain, [records[0] | {"words": ["Ada", "runs"]}]))
    assert made == "Ada\t0.500000\tO\nruns\t1.000000\tB-PER\n\n"


def test_tables_out(tmp_path: Path) -> None:
    record = {"label": "no", "score": 0.75}
    source = read(tmp_path, "a.csv", 'label,text\nyes,"a, b"\n', LABELLED)
    assert "".join(own_lines(source, [record])) == 'label,text,predicted,score\nyes,"a, b",no,0.750000\n'
    source = read(tmp_path, "a.csv", "id,text\n7,Ada\n", TAGGED)
    assert (source.kind, source.texts[0].text) == ("table", "Ada")
    made = "".join(own_lines(source, [{"tags": ["B-A"], "spans": [{"start": 0, "label": "A"}]}]))
    assert list(csv.reader(made.splitlines())) == [
        ["id", "text", "spans"],
        ["7", "Ada", '[{"start": 0, "label": "A"}]'],
    ]
    source = read(tmp_path, "a.tsv", 'a "b"\n', LABELLED)
    assert "".join(own_lines(source, [record])) == 'a "b"\tno\t0.750000\n'
    source = read(tmp_path, "a.txt", "a\n", LABELLED)
    assert "".join(own_lines(source, [record])) == "a\tno\t0.750000\n"


def test_json_lines_out_keep_the_records_other_fields(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    line = {"id": 7, "text": "a", "label": "yes", "score": "high"}
    source = read(tmp_path, "a.jsonl", json.dumps(line) + "\n", LABELLED)
    record = {"text": "a", "label": "no", "score": 0.75, "scores": {"no": 0.75, "yes": 0.25}, "gold": "yes"}
    for lines in (json_lines, own_lines):
        assert [json.loads(made) for made in lines(source, [record])] == [{"id": 7} | record]
    assert "fields of the input give way to what was predicted: score" in caplog.text


def test_a_command_line_is_refused_before_the_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runs here have no checkpoint: what is wrong with the files is said first."""
    tagger = Classifier(backbone=GPT(causal=False), labels=("O", "B-A"))
    tags = Run(name="tags", model=tagger, data=TAGGED, objective=Classification())
    for run in (tags, Run(name="text")):
        write_json(tmp_path / run.name / "config.json", to_json(run))
    (tmp_path / "a.txt").write_text("Ada\n")
    (tmp_path / "many").mkdir()
    for name in "ab":
        (tmp_path / "many" / f"{name}.txt").write_text("Ada\n")
    monkeypatch.chdir(tmp_path)
    for words, said in {
        ("text", "a.txt"): "text tells no labels apart; give the run of a Classifier",
        ("tags", "none.txt"): "none.txt does not exist",
        ("tags", "many"): "many is 2 files; give one at a time",
        ("tags", "a.txt", "--out", "a.txt"): "--out is the input a.txt; name another.",
        ("tags", "a.txt", "--input", "columns", "--field", "x", "--out", "a.txt/b"): "a.txt",
        ("tags", "a.txt", "--format", "csv"): "",
        ("tags", "-"): "standard-input.txt holds no text",
    }.items():
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n")))
        assert main(["predict", *words]) == 2
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1, err
