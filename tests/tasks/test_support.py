"""Customer service: answers learned with the mark of the passage that supports them, or as unknown."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from jaxgpt.cli import main
from jaxgpt.config import Knowledge
from jaxgpt.data.readers.tasks import evaluation_samples, question
from jaxgpt.evals.metrics import METRICS, Prediction
from jaxgpt.tasks import Support
from jaxgpt.text.retrieve import best_support

DIALOGUES = [
    ("How long may goods be returned?", "For thirty days."),
    ("Which courier brings parcels?", "It is Zebra Logistics."),
    ("Who is Napoleon?", "An emperor."),
]


@pytest.fixture
def task(tmp_path: Path) -> Support:
    (tmp_path / "help").mkdir()
    (tmp_path / "help" / "a.md").write_text(
        "# Returns\n\nGoods may be returned for thirty days.\n\n# Parcels\n\nA courier brings parcels.\n"
    )
    lines = [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"},
                      {"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in DIALOGUES
    ]  # fmt: skip
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    known = Knowledge(documents=(str(tmp_path / "help"),), passages=2, cited=True, least=0.05)
    return Support(test=(str(tmp_path / "test.jsonl"),), tokenizer="byte", knowledge=known)


def test_the_learned_answer_cites_what_supports_it(task: Support) -> None:
    samples = [sample for _, sample in evaluation_samples(task, "test")]
    assert [s.facts["passage"] for s in samples] == [1, 0, 0]
    assert task.target(samples[0]) == "For thirty days. [1]"
    assert (
        task.target(samples[1])
        == task.target(samples[2])
        == "I do not find an answer to this in the documents."
    )
    assert [s.answers[0] for s in samples] == [answer for _, answer in DIALOGUES]
    turns = question(task, samples[0], task.held_out)
    assert [turn["role"] for turn in turns] == ["user", "assistant", "user"]
    assert turns[-1]["content"].startswith("[1] Returns: Goods may be returned for thirty days.\n\n")
    assert turns[-1]["content"].endswith(DIALOGUES[0][0])
    assert question(task, samples[2], task.held_out)[-1]["content"] == DIALOGUES[2][0]
    plain = replace(task, knowledge=None)
    without = [sample for _, sample in evaluation_samples(plain, "test")]
    assert [plain.target(s) for s in without] == [answer for _, answer in DIALOGUES]


def test_marks_are_scored_by_themselves(task: Support) -> None:
    sample = next(sample for _, sample in evaluation_samples(task, "test"))
    for text, cited in (
        ("For thirty days. [1]", 100.0),
        ("For thirty days [2].", 0.0),
        ("For thirty days.", 0.0),
    ):
        p = Prediction(sample, "", text, task.extract(text, sample))
        values = {name: METRICS[name].statistics([p])[0][0] for name in ("cited", "exact_match")}
        assert values == {"cited": cited, "exact_match": 100.0}


def test_support_needs_half_of_the_words() -> None:
    assert best_support("two days", ["in two weeks", "in two days"]) == 2
    assert best_support("only two of many", ["two"]) == 0
    assert best_support("...", ["two"]) == best_support("two", []) == 0


def test_the_limit_keeps_as_many_questions_as_asked(
    task: Support, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "asked.txt").write_text("May goods be returned?\nWhen are parcels brought?\n")
    (tmp_path / "others.jsonl").write_text('{"question": "Who is Napoleon?"}\n')
    command = ["serve", "documents", str(tmp_path / "help"), "--questions", str(tmp_path / "asked.txt")]
    assert main([*command, "--others", str(tmp_path / "others.jsonl"), "--keep", "0.9"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("--least 0.") and float(said[0].split()[1]) > 0
    assert said[1:] == ["answers 2 of 2 questions (100.0%)", "refuses 1 of 1 others (100.0%)"]
    (tmp_path / "empty.txt").write_text("\n")
    assert main([*command[:-1], str(tmp_path / "empty.txt")]) == 2
    assert "there is no question in" in capsys.readouterr().err
