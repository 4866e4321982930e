"""Reports about the predicted labels of a run's own data."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from jaxgpt.config import Tagged
from jaxgpt.data.readers import encode_split
from jaxgpt.evals.predict import (
    BATCH,
    joined_places,
    label_of,
    label_record,
    labelling,
    probabilities,
    tagged_words,
    tagging_record,
)
from jaxgpt.evals.tagging_report import (
    LabelReport,
    by_class,
    classification_report,
    confusion,
    tagging_report,
)
from jaxgpt.sample.load import Trained


class Labels(NamedTuple):
    """What a classifier made of a split.

    Attributes:
      figures: the scores by name, as a report has them.
      text: the whole report.
      labels: the C labels of `counts`: the model's, and behind them those that the split alone has.
      counts: [C, C], rows gold and columns predicted.
      predictions: of each example in order, with its gold labels, as JSON.
      classes: of each label, or type of entity (strict): its name, precision, recall, f1 and support.
    """

    figures: dict[str, float]
    text: str
    labels: tuple[str, ...]
    counts: np.ndarray
    predictions: list[dict[str, Any]]
    classes: list[dict[str, Any]]


def label_report(trained: Trained, split: str, batch_size: int = BATCH) -> Labels:
    """Label a split of the run's own data and compare with its gold labels.

    Raises:
      UserError: the run tells no labels apart, or the split names no files.
    """
    task, data = labelling(trained)
    examples, items = encode_split(data, trained.tokenizer, trained.run.length, split, task)
    made = iter(probabilities(trained, [item for group in items for item in group], batch_size, split))
    rows = [[p_C for _ in group for p_C in next(made)] for group in items]
    if isinstance(data, Tagged):
        places = [joined_places(sentence.words, data.joiner) for sentence in examples]
        words = [tagged_words(*pair, task.labels) for pair in zip(places, rows, strict=True)]
        predictions = [
            tagging_record(data.joiner.join(sentence.words), found, sentence.tags)
            for sentence, found in zip(examples, words, strict=True)
        ]
        gold, named = [sentence.tags for sentence in examples], [[w.tag for w in found] for found in words]
        report = tagging_report(gold, named)
        right, made_up = ([tag for tags in side for tag in tags] for side in (gold, named))
        figures = {
            f"{mode}_{average}_{key}": scores[f"{average} avg"][key]
            for mode, scores in (("strict", report.strict), ("default", report.default))
            for average in ("micro", "macro")
            for key in ("precision", "recall", "f1-score")
        }
        figures["token_accuracy"] = _share(right, made_up)
    else:
        found = [label_of(p_C, task.labels) for (p_C,) in rows]
        predictions = [label_record(e.text, e.pair, p, e.label) for e, p in zip(examples, found, strict=True)]
        right, made_up = [text.label for text in examples], [label.label for label in found]
        report = classification_report(right, made_up)
        macro = report.scores["macro avg"]["f1-score"]
        figures = {"label_accuracy": _share(right, made_up), "macro_f1-score": macro}
    labels = (*task.labels, *sorted(set(right).difference(task.labels)))
    classes = by_class(report.scores if isinstance(report, LabelReport) else report.strict)
    return Labels(figures, report.text, labels, confusion(right, made_up, labels), predictions, classes)


def _share(gold: list[str], predicted: list[str]) -> float:
    return sum(a == b for a, b in zip(gold, predicted, strict=True)) / max(1, len(gold))
