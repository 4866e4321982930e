"""Zero-shot tasks from a file of JSON lines: the last word of a passage, and multiple choice.

A file is of one kind, told by the fields of its first record:
  text                             the last word of the text is predicted (LAMBADA; Paperno et al. 2016)
  context or question, choices, label   the likeliest of the choices, `label` being the right one's index

Every record counts: a bad one stops the evaluation, since a score over some of a task's records is
no score of the task.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxgpt.data.lines import as_object, check_text, numbered_lines, parse_line
from jaxgpt.data.sources import expand
from jaxgpt.errors import UserError, nearest, require
from jaxgpt.evals.figure import Figure
from jaxgpt.evals.perplexity import exponential
from jaxgpt.evals.scoring import Score, Scorer

SUFFIXES = (".jsonl", ".jsonl.gz")


@dataclass(frozen=True)
class Question:
    """A context, its possible continuations, and which is right.

    Attributes:
      context: what is given.
      choices: continuations with the space before them; a single one is a last word to predict.
      label: index of the right one.
    """

    context: str
    choices: tuple[str, ...]
    label: int = 0


def read_task(path: str | Path) -> list[Question]:
    """The questions of a file.

    Raises:
      UserError: the file cannot be read, holds nothing, or has a bad record; with its line.
    """
    (name,) = expand([path], SUFFIXES)
    read: Callable[[dict[str, Any]], Question] | None = None
    questions = []
    for number, line in numbered_lines(name):
        try:
            record = as_object(parse_line(line))
            if read is None:
                read = _choice if "choices" in record else _last_word
            questions.append(read(record))
        except ValueError as error:
            raise UserError(f"{name}:{number}: {error}; fix the record or remove it.") from None
    require(bool(questions), f"{name} holds no record; write one JSON object per line.")
    return questions


def _text(record: dict[str, Any], *names: str) -> str:
    """The first of these fields that the record has."""
    found = next((name for name in names if name in record), None)
    if found is None:
        raise ValueError(f"no field {' or '.join(map(repr, names))}{nearest(names[0], map(str, record))}")
    return check_text(record[found], found)


def _last_word(record: dict[str, Any]) -> Question:
    parts = _text(record, "text").rsplit(None, 1)
    if len(parts) < 2:
        raise ValueError("field 'text' has fewer than two words")
    return Question(parts[0], (" " + parts[1],))


def _choice(record: dict[str, Any]) -> Question:
    context = _text(record, "context", "question")
    choices, label = record.get("choices"), record.get("label")
    if not isinstance(choices, list) or len(choices) < 2:
        raise ValueError("field 'choices' is not a list of at least two texts")
    if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < len(choices):
        raise ValueError(f"field 'label' is {label!r}, not an index from 0 to {len(choices) - 1}")
    texts = [check_text(choice, "choices") for choice in choices]
    if not all(text.strip() for text in texts):
        raise ValueError("a choice is empty")
    return Question(context, tuple(t if t[0].isspace() else " " + t for t in texts), label)


def run_task(
    scorer: Scorer, questions: Sequence[Question], batch_size: int = 32, about: str = ""
) -> dict[str, Figure]:
    """A task's figures with their standard errors; see `last_word` and `multiple_choice`.

    Args:
      scorer: the model.
      questions: all of one kind, at least one.
      batch_size: rows at a time.
      about: what the progress line says.
    """
    grouped = choice_scores(scorer, questions, batch_size, about)
    if len(questions[0].choices) == 1:
        return last_word([scores[0] for scores in grouped])
    return multiple_choice(questions, grouped)


def choice_scores(
    scorer: Scorer, questions: Sequence[Question], batch_size: int = 32, about: str = ""
) -> list[list[Score]]:
    """What the model makes of each choice of each question; see `run_task`."""
    requests = [scorer.pair(q.context, choice) for q in questions for choice in q.choices]
    scores = iter(scorer.token_logprobs(requests, batch_size, about))
    return [[next(scores) for _ in question.choices] for question in questions]


def last_word(scores: Sequence[Score]) -> dict[str, Figure]:
    """Figures of last words.

    Returns:
      `accuracy`: the share of which every token is the likeliest; `perplexity`: the exponential of the
      mean negative log-probability of a word, all its tokens together; its error by the delta method.
    """
    nats = mean([-score.logprob for score in scores])
    value = exponential(nats.value)
    error = None if value is None or nats.stderr is None else value * nats.stderr
    return {"accuracy": mean([score.greedy for score in scores]), "perplexity": Figure(value, error)}


def multiple_choice(questions: Sequence[Question], scores: Sequence[Sequence[Score]]) -> dict[str, Figure]:
    """Shares of right choices (the first of a tie).

    Returns:
      `acc` by the summed log-likelihood, and by it divided by the choice's length: `acc_norm` in
      characters and `acc_bytes` in bytes of UTF-8 without the space before it, as
      lm-evaluation-harness has both, `acc_tokens` in tokens.
    """
    right: dict[str, list[bool]] = {"acc": [], "acc_norm": [], "acc_bytes": [], "acc_tokens": []}
    for question, found in zip(questions, scores, strict=True):
        words = [choice.removeprefix(" ") for choice in question.choices]
        lengths = {
            "acc": [1] * len(words),
            "acc_norm": list(map(len, words)),
            "acc_bytes": [len(word.encode()) for word in words],
            "acc_tokens": [score.tokens for score in found],
        }
        for name, sizes in lengths.items():
            values = [score.logprob / size for score, size in zip(found, sizes, strict=True)]
            right[name].append(int(np.argmax(values)) == question.label)
    return {name: mean(values) for name, values in right.items()}


def mean(values: Sequence[float]) -> Figure:
    """The mean and its standard error (of a sample: n - 1), which a single value has not."""
    n = len(values)
    middle = sum(values) / n
    if n == 1:
        return Figure(middle)
    return Figure(middle, math.sqrt(sum((v - middle) ** 2 for v in values) / (n - 1) / n))
