"""Odd files that people have, one of each kind, under tests/odd: read right, or refused with their place.

`expected.json` says for each what is read of it (of dialogues: the text that is trained), or what the
one sentence of the refusal names; `says` is what a warning must name where the rest is read.
"""

from __future__ import annotations

import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from jaxgpt.config import Chat
from jaxgpt.data.documents import read_documents
from jaxgpt.data.readers import rows_of
from jaxgpt.data.readers.labelled import read_labelled
from jaxgpt.data.readers.tagging import read_conll
from jaxgpt.data.sources import expand
from jaxgpt.errors import UserError
from jaxgpt.evals.tasks import read_task
from jaxgpt.text.tokenizer import ByteTokenizer

ODD = Path(__file__).resolve().parents[2] / "odd"
EXPECTED: dict[str, dict[str, dict[str, Any]]] = json.loads((ODD / "expected.json").read_text("utf-8"))
LENGTH = 4096


def trained(path: Path, template: str = "auto") -> list[str]:
    """The trained text of each dialogue of a file, in any order."""
    data = Chat(train=(str(path),), validation=(str(ODD / "dialogues" / "plain.jsonl"),), template=template)
    rows = rows_of(data, ByteTokenizer(), LENGTH, 0, 1)
    row, found = rows[0], []
    for segment in range(1, int(row["segments"].max()) + 1):
        here = (row["segments"] == segment) & (row["weights"] > 0)
        found.append(bytes(int(t) for t in row["targets"][here] if t < 256).decode())
    return sorted(found)


def read(kind: str, path: Path, expected: dict[str, Any]) -> Any:
    """What a file says to the reader of its kind."""
    if kind == "dialogues":
        return trained(path, expected.get("template", "auto"))
    if kind == "tags":
        (sentence,) = read_conll([path])
        return [list(sentence.words), list(sentence.tags)]
    if kind == "labels":
        return [[one.text, one.label] for one in read_labelled([path])]
    if kind == "texts":
        return list(read_documents(expand([path]), field=expected.get("field", "text"), max_bad=0))
    return [[q.context, list(q.choices), q.label] for q in read_task(path)]


CASES = [
    pytest.param(kind, name, expected, id=f"{kind}/{name}")
    for kind, files in EXPECTED.items()
    for name, expected in files.items()
]


@pytest.mark.parametrize(("kind", "name", "expected"), CASES)
def test_it_is_read_right_or_refused_with_its_place(kind, name, expected, caplog):
    call = partial(read, kind, ODD / kind / name, expected)
    if "refused" in expected:
        with pytest.raises(UserError) as error:
            call()
        said = str(error.value)
        assert expected["refused"] in said
        assert "\n" not in said.strip() and len(said) < 1200
        return
    with caplog.at_level(logging.WARNING):
        found = call()
    if kind == "dialogues":
        assert found == sorted(expected["learns"])
    else:
        assert found == expected["reads"]
    assert expected.get("says", "") in caplog.text


def test_every_file_is_expected_and_every_expected_file_is_there():
    for kind, files in EXPECTED.items():
        assert {path.name for path in (ODD / kind).iterdir()} == set(files)


DEEP = {
    "lists": b"[" * 200_000,
    "objects": b'{"a":' * 200_000,
    "5,000 digits": b'{"text": ' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("content", DEEP.values(), ids=DEEP)
@pytest.mark.parametrize(
    ("kind", "name"),
    [("dialogues", "x.jsonl"), ("dialogues", "x.json"), ("labels", "x.jsonl"), ("texts", "x.jsonl"),
     ("tasks", "x.jsonl")],
)  # fmt: skip
def test_json_that_python_cannot_parse_is_refused_in_one_sentence(kind, name, content, tmp_path):
    path = tmp_path / name
    path.write_bytes(content + b"\n")
    with pytest.raises(UserError) as error:
        read(kind, path, {})
    assert "x.json" in str(error.value) and len(str(error.value)) < 600
