"""`jaxgpt data show`: what a run will be trained on, with its loss mask made visible."""

from __future__ import annotations

import json as jsonlib
import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from jaxgpt.config import Run, Tagged, load
from jaxgpt.config.bounds import Rows, bounded
from jaxgpt.data.readers import rows_of, run_tokenizer
from jaxgpt.data.readers.pairs import SIDES
from jaxgpt.data.readers.tagging import asked_token
from jaxgpt.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from rich.console import Console


File = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG")]
MARKS = "{+", "+}"
"""Around what is trained, where there is no colour (as wdiff marks what is new)."""


@bounded
def show(config: File, *, n: Rows = 3, json: bool = False) -> None:
    """Print the first training rows of a config, and which of their tokens are trained.

    In a terminal, trained tokens (or labels) are in colour and the others dimmed; in a pipe or a log, trained
    stretches stand between `{+` and `+}`.

    Args:
      config: a config file or a run folder.
      n: rows to print.
      json: one object per row instead: text, tokens, weights (of each token as a target), segments, and of
        preferences the side of each segment.
    """
    run = load(config)
    tokenizer = run_tokenizer(run)
    behind = (
        run.task is not None and isinstance(run.data, Tagged) and asked_token(run.data, run.task) == "last"
    )
    if json:
        for example in examples(run, tokenizer, n):
            print(jsonlib.dumps(example, ensure_ascii=False))
        return
    from rich.console import Console

    console = Console(file=sys.stdout, highlight=False)
    coloured = console.is_terminal and not console.no_color and not console.is_dumb_terminal
    legend = _legend(coloured, run.task is not None, behind)
    for number, example in enumerate(examples(run, tokenizer, n)):
        if number == 0:
            console.print(legend, style="dim", markup=False, soft_wrap=True)
        _print(console, coloured, number, example, tokenizer, behind)


def _legend(coloured: bool, labels: bool, behind: bool) -> str:
    if labels:
        where = "after the token" if behind else "before the token"
        shown = "bold green" if coloured else "brackets"
        return f"Labels are in {shown}, {where} at which they are learned; O is learned too and not shown."
    if coloured:
        return "Trained tokens are bold green; dim ones are only read."
    return f"Trained tokens are between {MARKS[0]} and {MARKS[1]}; the others are only read."


def examples(run: Run, tokenizer: Tokenizer, n: int) -> Iterator[dict[str, Any]]:
    """The first n training rows as lists: `text`, and `tokens`, `weights`, `segments` aligned; of
    preferences `sides` too, one for each segment.

    `weights[i]` is the weight with which token i is learned (as a target), so the first token of
    a segment has 0. A segment's last target is listed too, though it is nobody's input.
    """
    rows = rows_of(run.data, tokenizer, run.length, run.train.seed, run.train.batch_size, run.task)
    for i in range(n):
        yield _labelled(rows[i], tokenizer, run.task.labels) if run.task else _example(rows[i], tokenizer)


def _labelled(row: dict[str, Any], tokenizer: Tokenizer, labels: Sequence[str]) -> dict[str, Any]:
    """A row whose weighted tokens have labels of their own; `labels` is None at the others."""
    used = row["segments"] > 0
    columns = {name: row[name][used].tolist() for name in ("tokens", "weights", "segments")}
    named = zip(row["targets"][used].tolist(), columns["weights"], strict=True)
    names = [labels[target] if weight > 0 else None for target, weight in named]
    text = "".join(text for text, _, _ in _runs(**columns, tokenizer=tokenizer))
    return {"text": text, **columns, "labels": names}


def _example(row: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    tokens: list[int] = []
    weights: list[float] = []
    segments: list[int] = []
    sides: list[str] = []
    documents = dict.fromkeys(row["segments"][row["segments"] > 0].tolist())  # in order
    for segment, document in enumerate(documents, 1):
        here = row["segments"] == document
        inputs, targets = row["tokens"][here].tolist(), row["targets"][here].tolist()
        trained = row["weights"][here].tolist()
        last = [targets[-1]] if trained[-1] > 0 else []
        tokens += inputs + last
        weights += [0.0, *trained[:-1], *([trained[-1]] if last else [])]
        segments += [segment] * (len(inputs) + len(last))
        sides += [SIDES[int(row["side"][here][0])]] if "side" in row else []
    text = "".join(text for text, _, _ in _runs(tokens, weights, segments, tokenizer))
    found = {"text": text, "tokens": tokens, "weights": weights, "segments": segments}
    return found | {"sides": sides} if sides else found


def _runs(
    tokens: list[int], weights: list[float], segments: list[int], tokenizer: Tokenizer
) -> list[tuple[str, bool, int]]:
    """(text, trained, segment) of each stretch of tokens alike; control tokens show their names."""
    names = tokenizer.names
    runs: list[tuple[bytes, bool, int]] = []
    for token, weight, segment in zip(tokens, weights, segments, strict=True):
        piece = names[token].encode() if token in names else tokenizer.piece_bytes(token)
        key = (weight > 0, segment)
        if runs and runs[-1][1:] == key:
            runs[-1] = (runs[-1][0] + piece, *key)
        else:
            runs.append((piece, *key))
    return [(data.decode("utf-8", "replace"), trained, segment) for data, trained, segment in runs]


def _with_labels(example: dict[str, Any], tokenizer: Tokenizer, behind: bool) -> list[tuple[str, bool, int]]:
    """The row with the labels that say something, in brackets before the words that they are of.

    Behind them where a word's last token is asked (`Tagged.align`), so that no word is cut in two.
    """
    tokens, segments, labels = (example[name] for name in ("tokens", "segments", "labels"))
    at = {i + behind: label for i, label in enumerate(labels) if label not in (None, "O")}
    runs: list[tuple[str, bool, int]] = []
    for start, end in pairwise([0, *at, len(tokens)]):
        if start in at:
            runs.append((f"[{at[start]}]", True, segments[start]))
        # Not token by token: a character may be several bytes.
        runs += _runs(tokens[start:end], [0.0] * (end - start), segments[start:end], tokenizer)
    return runs


def _print(
    console: Console, coloured: bool, number: int, example: dict[str, Any], tokenizer: Tokenizer, behind: bool
) -> None:
    from rich.rule import Rule
    from rich.text import Text

    weights, segments = example["weights"], example["segments"]
    trained = sum(w > 0 for w in weights)
    count = max(segments, default=0)
    title = f"row {number}: {len(weights)} tokens, {trained} trained, {count} segment{'s' * (count != 1)}"
    console.print(Rule(title, style="bold"))
    before, line = 1, Text()
    names = example.get("sides") or [""] * count
    if any(names):
        console.print(Rule(names[0], style="dim"))
    runs = _runs(example["tokens"], weights, segments, tokenizer)
    begin, end = ("", "") if coloured or "labels" in example else MARKS
    if "labels" in example:
        runs = _with_labels(example, tokenizer, behind)
    for text, is_trained, segment in runs:
        if segment != before:
            console.print(line, soft_wrap=True)
            console.print(Rule(names[segment - 1], style="dim"))
            before, line = segment, Text()
        line.append(f"{begin}{text}{end}" if is_trained else text, "bold green" if is_trained else "dim")
    console.print(line, soft_wrap=True)
