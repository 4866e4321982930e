"""Metrics of answers that are right or wrong: exact match, F1, accuracy, entities, numbers, choices."""

from __future__ import annotations

import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation

import numpy as np

from jaxgpt.errors import require
from jaxgpt.evals.metrics.base import Metric, Prediction, mean_of, ratio
from jaxgpt.text.retrieve import MARK

_NUMBER = re.compile(r"(?:(?<!\w)-)?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalized(text: str, language: str = "en") -> str:
    """An answer as SQuAD's own evaluation compares it: lower case, no punctuation, no articles, single spaces
    (Rajpurkar et al. 2016, section 6.1); of Chinese, no punctuation and no white space, as in CMRC 2018.
    """
    text = text.lower()
    if language == "zh":
        return "".join(c for c in text if not c.isspace() and unicodedata.category(c)[0] not in "PS")
    text = "".join(c for c in text if c not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", text).split())


def _parts(text: str, language: str) -> list[str]:
    """What F1 counts: words, and of Chinese characters (words of Latin letters stay whole)."""
    text = normalized(text, language)
    return re.findall(r"[a-z0-9.]+|\S", text) if language == "zh" else text.split()


def token_f1(answer: str, gold: str, language: str = "en") -> float:
    """Harmonic mean of precision and recall of the words that two answers share."""
    a, b = _parts(answer, language), _parts(gold, language)
    if not a or not b:  # SQuAD 2: nothing is right only where nothing is asked for
        return float(a == b)
    shared = sum((Counter(a) & Counter(b)).values())
    return 2 * shared / (len(a) + len(b)) if shared else 0.0


def _exact(p: Prediction) -> float:
    answer = normalized(p.answer, p.language)
    return 100.0 * any(answer == normalized(gold, p.language) for gold in p.sample.answers)


def _f1(p: Prediction) -> float:
    return 100.0 * max((token_f1(p.answer, gold, p.language) for gold in p.sample.answers), default=math.nan)


def _cited(p: Prediction) -> float:
    require(
        "passage" in p.sample.facts,
        "cited looks for the mark of a passage, but a sample of this task has no facts['passage']; take it "
        "out of its metrics.",
    )
    found = MARK.search(p.text)
    return 100.0 * ((int(found[1]) if found else 0) == p.sample.facts["passage"])


def _same(a: str, b: str) -> bool:
    return a.strip().casefold() == b.strip().casefold()


def _accuracy(p: Prediction) -> float:
    return 100.0 * any(_same(p.answer, gold) for gold in p.sample.answers)


def _chosen(p: Prediction) -> float:
    """Whether the likeliest choice is right; NaN where none was scored."""
    if not p.choices:
        return math.nan
    best = p.sample.choices[int(np.argmax(p.choices))]
    return 100.0 * any(_same(best, gold) for gold in p.sample.answers)


def _class_statistics(predictions: Sequence[Prediction]) -> np.ndarray:
    """Of each label true positives, false positives and false negatives [N, 3 C]; an answer that is no label
    is a false negative alone.
    """
    gold = [p.sample.answers[0].strip().casefold() for p in predictions]
    named = {choice.strip().casefold() for p in predictions for choice in p.sample.choices}
    labels = sorted(named.union(gold))
    rows = np.zeros((len(predictions), len(labels), 3))
    for row, right, p in zip(rows, gold, predictions, strict=True):
        made = p.answer.strip().casefold()
        if made == right:
            row[labels.index(right), 0] = 1
            continue
        row[labels.index(right), 2] = 1
        if made in labels:
            row[labels.index(made), 1] = 1
    return rows.reshape(len(predictions), -1)


def _macro_f1(sums: np.ndarray) -> float:
    tp, fp, fn = sums.reshape(-1, 3).T
    there = tp + fp + fn > 0
    return 100 * float(np.mean(2 * tp[there] / (2 * tp + fp + fn)[there])) if there.any() else math.nan


def entities_of(answer: str) -> Counter[tuple[str, str]]:
    """The entities of an answer with one per line, `LABEL: text`; other lines are none."""
    pairs = (line.partition(":") for line in answer.splitlines())
    found = ((label.strip().upper(), text.strip()) for label, colon, text in pairs if colon)
    return Counter((label, text) for label, text in found if label and text)


def _entity_statistics(predictions: Sequence[Prediction]) -> np.ndarray:
    rows = []
    for p in predictions:
        made, gold = entities_of(p.answer), entities_of(p.sample.answers[0] if p.sample.answers else "")
        rows.append([(made & gold).total(), made.total(), gold.total()])
    return np.asarray(rows, np.float64)


def _micro_f1(sums: np.ndarray) -> float:
    right, made, gold = sums
    return 100 * 2 * right / (made + gold) if made + gold else math.nan


def number_of(text: str) -> Decimal | None:
    """The last number of a text, or None: `1,234.50`, `-3`, `2/4` is 4 (a fraction is two numbers), and `1-2`
    or `1,2` is 2 (a sign begins a word, a comma parts thousands).
    """
    found = _NUMBER.findall(text.replace("\u2212", "-"))
    try:
        return Decimal(found[-1].replace(",", "")) if found else None
    except InvalidOperation:
        return None


def _number_match(p: Prediction) -> float:
    made = number_of(p.answer)
    return 100.0 * (made is not None and any(made == number_of(gold) for gold in p.sample.answers))


def _how(language: str) -> str:
    return "characters, no punctuation (CMRC 2018)" if language == "zh" else "SQuAD's normalisation"


ANSWERS: dict[str, Metric] = {
    "exact_match": Metric("exact match", mean_of(_exact), ratio, signature=_how),
    "f1": Metric("F1 of words", mean_of(_f1), ratio, signature=_how),
    "accuracy": Metric("accuracy of the answer as written", mean_of(_accuracy), ratio),
    "choice_accuracy": Metric("accuracy of the likeliest choice", mean_of(_chosen), ratio, needs="choices"),
    "macro_f1": Metric("macro F1 of labels", _class_statistics, _macro_f1),
    "entity_f1": Metric("F1 of entities", _entity_statistics, _micro_f1),
    "number_match": Metric("share of right numbers", mean_of(_number_match), ratio),
    "cited": Metric("share of answers that name the right passage, or rightly none", mean_of(_cited), ratio),
    "parsed": Metric(
        "share of completions with an answer", mean_of(lambda p: 100.0 * bool(p.answer.strip())), ratio
    ),
}
