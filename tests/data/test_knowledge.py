"""What is known about a question: read with its sources, kept in an index, put before what is asked."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from jaxgpt.config import Knowledge, Run, code, from_json, to_json
from jaxgpt.data.knowledge import open_library
from jaxgpt.data.readers import rows_of
from jaxgpt.data.readers.tasks import evaluation_samples, question
from jaxgpt.errors import UserError
from jaxgpt.tasks import OpenQA
from jaxgpt.text.tokenizer import ByteTokenizer

ASKED = "What is the capital of France?"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "a.md").write_text(
        "# Cities\n\nSpain's capital is Madrid. France's capital is Paris.\n\n法国的首都是巴黎。\n"
    )
    lines = [{"text": "Rivers flow."}, {"text": "A line.\n\nThe heron is a bird."}]
    (docs / "b.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "facts.tsv").write_text("Subject\tRelation\tObject\nFrance\tcurrency\teuro\n")
    questions = [
        {"question": q, "answer": a} for q, a in [(ASKED, "Paris"), ("Zzz?", "no"), ("A heron?", "bird")]
    ]
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(one) + "\n" for one in questions))
    return tmp_path


def test_passages_are_named_by_file_line_and_character(folder: Path) -> None:
    library = open_library(Knowledge(documents=(f"{folder}/docs",), passages=1, passage_size=30))
    for query, text, place in (
        ("Paris France", "France's capital is Paris.", "a.md:3:28"),
        ("法国的首都", "法国的首都是巴黎。", "a.md:5"),
        ("heron", "The heron is a bird.", "b.jsonl:2, character 10"),
    ):
        found = library.about(query)
        assert found.text == text + "\n\n" and found.sources == (f"{folder}/docs/{place}",)


def test_an_index_is_made_anew_where_the_documents_changed(folder: Path, caplog) -> None:
    index, docs = folder / "x.index", folder / "docs"

    def ask(word: str, size: int = 500) -> str:
        open_library.cache_clear()
        known = Knowledge(documents=(str(docs),), passages=1, index=str(index), passage_size=size)
        return open_library(known).about(word).text

    with caplog.at_level(logging.WARNING):
        assert ask("heron") and not ask("otter")
        made = index.stat().st_mtime_ns
        assert ask("heron") and index.stat().st_mtime_ns == made and not caplog.messages
        (docs / "c.txt").write_text("An otter swims.")
        assert ask("otter") == "An otter swims.\n\n"
        assert "changed since" in caplog.text and index.stat().st_mtime_ns != made
        assert ask("otter", 10) == "An otter\n\n"


def test_training_and_evaluation_see_the_same_before_a_question(folder: Path) -> None:
    known = Knowledge(documents=(f"{folder}/docs",), passages=1, facts=f"{folder}/facts.tsv")
    files = (f"{folder}/qa.jsonl",)
    bare = OpenQA(train=files, validation=files, tokenizer="byte", template="none")
    task = OpenQA(train=files, validation=files, tokenizer="byte", template="none", knowledge=known)
    before = "France, currency: euro.\n\nSpain's capital is Madrid. France's capital is Paris.\n\n"
    bytes_ = ByteTokenizer()
    for seed in (0, None):
        text = bytes_.decode(rows_of(task, bytes_, 1024, seed, 1)[0]["tokens"].tolist())
        assert before in text and "The heron" in text
    samples = [sample for _, sample in evaluation_samples(task)]
    assert samples == [sample for _, sample in evaluation_samples(bare)]
    asked = {s.answers[0]: question(task, s, "Q: {question}")[-1]["content"] for s in samples}
    assert asked["Paris"] == f"{before}Q: {ASKED}\n" and asked["no"] == "Q: Zzz?\n"
    run = Run(name="a", data=task)
    assert from_json(Run, json.loads(json.dumps(to_json(run)))) == run


def test_a_function_of_a_users_file_makes_vectors(folder: Path) -> None:
    file = folder / "letters.py"
    file.write_text(
        "def encode(texts):\n    return [[t.count('z') + 1e-3, t.count('v') + 1e-3] for t in texts]\n"
    )

    code.trust(file)
    known = Knowledge(documents=(f"{folder}/docs",), passages=1, encoder=f"{file}:encode", passage_size=20)
    assert open_library(known).about("vvv").text == "Rivers flow.\n\n"


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"facts": "bad.tsv"}, "2 cells, not a subject, a relation and an object"),
        (
            {"documents": ("docs",), "encoder": "runs/x"},
            "encoder is 'runs/x'; name a function as FILE.py:NAME",
        ),
        ({"index": "x"}, "index is 'x' but documents names nothing"),
        ({"documents": ("empty",)}, "holds no file ending in"),
    ],
)
def test_what_cannot_be_known_is_said_in_one_sentence(folder: Path, monkeypatch, fields, why) -> None:
    monkeypatch.chdir(folder)
    (folder / "bad.tsv").write_text("a\tb\n")
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match=why):
        open_library(Knowledge(**fields))
