"""Local tasks: what a record says, what is wrong with a bad one, and the figures' definitions."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_evals import ROWS

from jaxgpt.errors import UserError
from jaxgpt.evals.figure import Figure
from jaxgpt.evals.scoring import Score, Scorer
from jaxgpt.evals.tasks import Question, last_word, mean, multiple_choice, read_task, run_task


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_records_become_questions(tmp_path: Path) -> None:
    words = write(tmp_path / "w.jsonl", {"text": "one two\nthree "}, {"text": "a  b", "more": 1})
    assert read_task(words) == [Question("one two", (" three",)), Question("a", (" b",))]
    choices = write(
        tmp_path / "c.jsonl",
        {"context": "Q", "choices": ["a", " b"], "label": 1},
        {"question": "R", "choices": ["c", "\nd", "e f"], "label": 0},
    )
    assert read_task(choices) == [Question("Q", (" a", " b"), 1), Question("R", (" c", "\nd", " e f"), 0)]


GOOD_WORD = {"text": "a b"}
GOOD_CHOICE = {"context": "a", "choices": ["b", "c"], "label": 0}


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([GOOD_WORD, {"txt": "a b"}], ":2: no field 'text'; did you mean 'txt'?"),
        ([{"text": "word"}], ":1: field 'text' has fewer than two words"),
        ([GOOD_WORD, {"text": 3}], ":2: field 'text' is int, not a string"),
        ([GOOD_WORD, [1]], ":2: a JSON object was expected, not list"),
        ([GOOD_CHOICE, {"choices": ["b", "c"], "label": 0}], ":2: no field 'context' or 'question'"),
        ([GOOD_CHOICE | {"choices": ["b"]}], ":1: field 'choices' is not a list of at least two texts"),
        ([GOOD_CHOICE | {"choices": ["b", 1]}], ":1: field 'choices' is int, not a string"),
        ([GOOD_CHOICE | {"choices": ["b", " "]}], ":1: a choice is empty"),
        ([GOOD_CHOICE, GOOD_CHOICE | {"label": 2}], ":2: field 'label' is 2, not an index from 0 to 1"),
        ([GOOD_CHOICE | {"label": True}], ":1: field 'label' is True"),
        ([GOOD_CHOICE, GOOD_WORD], ":2: no field 'context' or 'question'"),
    ],
    ids=lambda value: value[-30:] if isinstance(value, str) else "",
)
def test_a_bad_record_is_named_by_its_line(records: list[Any], message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", *records)
    with pytest.raises(UserError) as error:
        read_task(path)
    assert str(error.value).startswith(f"{path}{message}")


def test_a_file_that_is_no_task_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "blank.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match="holds no record"):
        read_task(tmp_path / "blank.jsonl")
    (tmp_path / "t.jsonl").write_text('{"text": "a b"}\n{"text": \n')
    with pytest.raises(UserError, match=r"t\.jsonl:2: not JSON"):
        read_task(tmp_path / "t.jsonl")
    with pytest.raises(UserError, match="does not exist"):
        read_task(tmp_path / "none.jsonl")


def test_last_words_are_right_where_the_model_would_write_them(reciter: Scorer, tmp_path: Path) -> None:
    """The model recites `xyz abc`: it is sure of the third letter and of the space before a word."""
    texts = ["say xyz abc", "xyz abc", "xyz abd", "xyz a"]
    questions = read_task(write(tmp_path / "w.jsonl", *({"text": text} for text in texts)))
    figures = run_task(reciter, questions, ROWS)
    assert figures["accuracy"] == mean([1, 1, 0, 1])
    bos = reciter.tokenizer.control["<|bos|>"]
    requests = [([bos, *t.rsplit(" ", 1)[0].encode()], [*b" ", *t.rsplit(" ", 1)[1].encode()]) for t in texts]
    nats = [-score.logprob for score in reciter.token_logprobs(requests, ROWS)]
    assert figures["perplexity"].value == pytest.approx(math.exp(np.mean(nats)))


def test_the_likeliest_choice_is_the_answer(reciter: Scorer) -> None:
    questions = [
        Question("say xyz", (" abc", " cba"), 0),
        Question("say xyz", (" bbb", " abc"), 1),
        Question("say xyz", (" abc", " cba"), 1),
    ]
    figures = run_task(reciter, questions, ROWS)
    assert figures["acc"] == figures["acc_norm"] == figures["acc_tokens"] == mean([1, 1, 0])


def test_each_accuracy_divides_by_its_own_length() -> None:
    """One question that every normalisation answers in its own way, by hand."""
    question = Question("q", (" ab", " ééé", " abcdefghi", " abcdefghijkl"), 0)
    scores = [Score(*s, False, n, 0) for *s, n in ([-4.0, 2], [-4.5, 9], [-9.3, 1], [-13.0, 13])]
    # log-likelihoods a character: -2, -1.5, -1.03, -1.083; a byte: -2, -0.75, ...; a token: -2, -0.5, ...
    chosen = {"acc": 0, "acc_norm": 2, "acc_bytes": 1, "acc_tokens": 1}
    for label in range(4):
        figures = multiple_choice([Question(question.context, question.choices, label)], [scores])
        assert figures == {name: Figure(float(choice == label)) for name, choice in chosen.items()}


def test_errors_are_those_of_a_sample() -> None:
    values = [1.0, 0.0, 0.0, 1.0, 1.0]
    figure = mean(values)
    assert figure.value == pytest.approx(np.mean(values))
    assert figure.stderr == pytest.approx(np.std(values, ddof=1) / np.sqrt(5))
    found = last_word([Score(-v - 1, True, 1, 1) for v in values])
    assert found["accuracy"] == Figure(1.0, 0.0)
    assert found["perplexity"].value == pytest.approx(math.exp(1.6))
    assert found["perplexity"].stderr == pytest.approx(math.exp(1.6) * figure.stderr)
    assert mean([True]) == Figure(1.0, None)
