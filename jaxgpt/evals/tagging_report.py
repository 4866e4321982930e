"""Precision, recall and F1 of tags and of labels, counted by seqeval and scikit-learn themselves.

Published numbers of named entity recognition come from these two, so theirs are reported, to the
digit: entities in seqeval's default mode (which reads as conlleval does: Tjong Kim Sang and De
Meulder 2003) and in its strict mode (IOB2: an I- without its B- is no entity), tokens by scikit-learn.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxgpt.errors import UserError, require, require_known

DIGITS = 4
_AVERAGES = ("accuracy", "micro avg", "macro avg", "weighted avg")
_COLUMNS = ("precision", "recall", "f1-score", "support")
Scores = dict[str, Any]
"""As scikit-learn's `output_dict`: a type, label or average to its precision, recall, f1-score and
support; `accuracy` to a number. Nothing but Python's own numbers, so that it can be written as JSON."""


@dataclass(frozen=True)
class TaggingReport:
    """Scores of predicted tags.

    Attributes:
      default: of entities, as conlleval reads them.
      strict: of entities that are well-formed BIO.
      tokens: of the tags one by one, `O` among them.
      text: the three as printable tables.
    """

    default: Scores
    strict: Scores
    tokens: Scores
    text: str


@dataclass(frozen=True)
class LabelReport:
    """Scores of predicted labels, and the same as a printable table."""

    scores: Scores
    text: str


def tagging_report(gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> TaggingReport:
    """Compare the BIO tags of sentences. What is undefined (no entity of a type predicted) is 0.

    Raises:
      UserError: sentences that do not match, no tag at all, a tag that is not BIO, no seqeval.
    """
    require(
        len(gold) == len(predicted),
        f"{len(gold)} gold sentences and {len(predicted)} predicted; give as many.",
    )
    for i, (a, b) in enumerate(zip(gold, predicted, strict=True), 1):
        require(
            len(a) == len(b), f"sentence {i} has {len(a)} gold tags and {len(b)} predicted; give as many."
        )
    flat_gold, flat_predicted = ([tag for tags in side for tag in tags] for side in (gold, predicted))
    require(bool(flat_gold), "there is no tag to compare; give at least one sentence.")
    for tag in sorted({*flat_gold, *flat_predicted}):
        well_formed = tag in ("O", "B", "I") or (tag[:2] in ("B-", "I-") and len(tag) > 2)
        require(well_formed, f"tag {tag!r} is not BIO (O, B-TYPE, I-TYPE); turn it with tagging.to_bio.")
    default, strict = _entities(gold, predicted)
    tokens = _sklearn(flat_gold, flat_predicted)
    parts = {
        "Entities (seqeval, default mode as conlleval)": default,
        "Entities (seqeval, strict mode, IOB2)": strict,
        "Tokens (scikit-learn)": tokens,
    }
    text = "\n".join(f"{title}\n{layout(scores)}" for title, scores in parts.items())
    return TaggingReport(default, strict, tokens, text)


def classification_report(gold: Sequence[str], predicted: Sequence[str]) -> LabelReport:
    """Compare the labels of texts, by scikit-learn. What is undefined is 0.

    Raises:
      UserError: lists that do not match, no label at all, no scikit-learn.
    """
    _check_pairs(gold, predicted)
    require(bool(gold), "there is no label to compare; give at least one.")
    scores = _sklearn(gold, predicted)
    return LabelReport(scores, layout(scores))


def confusion(gold: Sequence[str], predicted: Sequence[str], labels: Sequence[str]) -> np.ndarray:
    """[labels, labels] int64: how often each gold label (row) was predicted as each (column).

    Raises:
      UserError: lists that do not match, a label that is not in `labels`.
    """
    _check_pairs(gold, predicted)
    number = {label: i for i, label in enumerate(labels)}
    for label in sorted({*gold, *predicted}):
        require_known(label, number, f"label {label!r} is not one of those to count")
    counts = np.zeros((len(labels), len(labels)), np.int64)
    rows, columns = ([number[label] for label in side] for side in (gold, predicted))
    np.add.at(counts, (rows, columns), 1)
    return counts


def _check_pairs(gold: Sequence[str], predicted: Sequence[str]) -> None:
    require(
        len(gold) == len(predicted), f"{len(gold)} gold labels and {len(predicted)} predicted; give as many."
    )


def _entities(gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> tuple[Scores, Scores]:
    """Scores in the default and in the strict mode."""
    try:
        from seqeval.metrics import classification_report as report
        from seqeval.scheme import IOB2
    except ImportError:
        raise UserError(
            "reports of tagging need seqeval, which is not installed; run `pip install 'jaxgpt[eval]'`."
        ) from None
    sides = [list(tags) for tags in gold], [list(tags) for tags in predicted]
    kinds = {tag[0] for side in sides for tags in side for tag in tags}
    settings: dict[str, Any] = {"output_dict": True, "zero_division": 0}
    # seqeval fails where no entity is found: every tag but O is part of one, strictly every B- begins one
    default: Any = report(*sides, **settings) if kinds & {"B", "I"} else {}
    strict: Any = report(*sides, mode="strict", scheme=IOB2, **settings) if "B" in kinds else {}
    return _plain(default), _plain(strict)


def _sklearn(gold: Sequence[str], predicted: Sequence[str]) -> Scores:
    try:
        from sklearn.metrics import classification_report as report
    except ImportError:
        raise UserError(
            "reports of labels need scikit-learn, which is not installed; run `pip install 'jaxgpt[eval]'`."
        ) from None
    with warnings.catch_warnings():  # with many labels and few examples it suspects a regression
        warnings.filterwarnings("ignore", "The number of unique classes", UserWarning)
        scores: Any = report(list(gold), list(predicted), output_dict=True, zero_division=0)
    return _plain(scores)


def _plain(scores: Mapping[str, Any]) -> Scores:
    """The same in Python's numbers; averages of 0 where seqeval, without any entity, would divide by 0."""
    none = dict.fromkeys(_COLUMNS, 0.0)
    scores = scores or dict.fromkeys(_AVERAGES[1:], none)
    made: Scores = {}
    for name, row in scores.items():
        made[name] = {k: float(v) for k, v in row.items()} if isinstance(row, Mapping) else float(row)
        if isinstance(row, Mapping):
            made[name]["support"] = int(row["support"])
    return made


def by_class(scores: Scores) -> list[dict[str, Any]]:
    """A row for each type or label: its name, precision, recall, f1 and support (how many there are)."""
    names = [name for name, found in scores.items() if name not in _AVERAGES and isinstance(found, dict)]
    columns = dict(zip(("precision", "recall", "f1", "support"), _COLUMNS, strict=True))
    return [{"label": n, **{short: scores[n][long] for short, long in columns.items()}} for n in names]


def layout(scores: Scores, digits: int = DIGITS) -> str:
    """The table of the scores as seqeval and scikit-learn print it."""
    width = max(len("weighted avg"), digits, *map(len, scores))
    lines = [" " * width + " " + "".join(f" {name:>9}" for name in _COLUMNS)]
    total = scores["macro avg"]["support"]
    for name, row in scores.items():
        if len(lines) == 1 or name in _AVERAGES[:2]:
            lines.append("")
        if isinstance(row, float):
            lines.append(f"{name:>{width}s} " + " " * 20 + f" {row:>9.{digits}f} {total:>9}")
        else:
            numbers = "".join(f" {row[column]:>9.{digits}f}" for column in _COLUMNS[:3])
            lines.append(f"{name:>{width}s} {numbers} {row['support']:>9}")
    return "\n".join([*lines, ""])
