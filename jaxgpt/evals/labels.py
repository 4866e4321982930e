"""Predicted labels of a trained classifier, and the reports about them.

Shapes: B rows, T tokens per row, C labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxgpt.batch import Batch
from jaxgpt.config import Labelled, Tagged
from jaxgpt.data.loader import ValidationBatches
from jaxgpt.data.packing import Item, PackedExamples
from jaxgpt.data.readers import encode_split
from jaxgpt.errors import NotFinite, UserError
from jaxgpt.evals.loss import fetch_behind
from jaxgpt.evals.tagging_report import classification_report, confusion, tagging_report
from jaxgpt.models import abstract_model
from jaxgpt.sample.load import Trained
from jaxgpt.sharding import row_shards
from jaxgpt.target import Target


class Labels(NamedTuple):
    """What a classifier made of a split.

    Attributes:
      figures: the scores by name, as a report has them.
      text: the whole report.
      labels: the C labels of `counts`: the model's, and behind them those that the split alone has.
      counts: [C, C], rows gold and columns predicted.
    """

    figures: dict[str, float]
    text: str
    labels: tuple[str, ...]
    counts: np.ndarray


def label_report(trained: Trained, split: str, batch_size: int = 32) -> Labels:
    """Label a split of the run's own data and compare with its gold labels.

    Raises:
      UserError: the run tells no labels apart, or the split names no files.
    """
    run, task = trained.run, trained.run.task
    if task is None or not isinstance(run.data, Tagged | Labelled):
        raise UserError(f"{trained.folder} tells no labels apart; give the run of a Classifier.")
    examples, items = encode_split(run.data, trained.tokenizer, run.length, split, task)
    made = iter(predict(trained, [item for group in items for item in group], batch_size))
    named = [[task.labels[i] for _ in group for i in next(made)] for group in items]
    if isinstance(run.data, Tagged):
        gold = [sentence.tags for sentence in examples]
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
        right, made_up = [text.label for text in examples], [labels[0] for labels in named]
        report = classification_report(right, made_up)
        macro = report.scores["macro avg"]["f1-score"]
        figures = {"label_accuracy": _share(right, made_up), "macro_f1-score": macro}
    labels = (*task.labels, *sorted(set(right).difference(task.labels)))
    return Labels(figures, report.text, labels, confusion(right, made_up, labels))


def _share(gold: list[str], predicted: list[str]) -> float:
    return sum(a == b for a, b in zip(gold, predicted, strict=True)) / max(1, len(gold))


def predict(trained: Trained, items: Sequence[Item], batch_size: int = 32) -> list[list[int]]:
    """The likeliest label at every weighted token of each item, in order.

    Items are packed into rows as in training, which changes no prediction: documents do not see
    each other.
    """
    run, mesh = trained.run, trained.mesh
    batch_size += -batch_size % row_shards(mesh)
    pad = trained.tokenizer.control["<|pad|>"]
    rows = PackedExamples(items, run.length, cast(Any, run.data).bins, None, pad)
    graphdef, _ = abstract_model(run.model, replace(run.compute, remat="none"), Target.of(mesh))

    @jax.jit
    def likeliest(params: dict, batch: Batch) -> jax.Array:
        model = nnx.merge(graphdef, params)
        logits_BTC = model.logits(model.hidden(batch).x_BTD)
        finite_BT = jnp.isfinite(logits_BTC).all(-1)  # else the likeliest would be a label like any other
        found_BT = jnp.where(finite_BT, jnp.argmax(logits_BTC, axis=-1), -1)
        return jax.lax.with_sharding_constraint(found_BT, P())  # for every process

    with jax.set_mesh(mesh):
        made = list(fetch_behind(likeliest(trained.params, b) for b in ValidationBatches(rows, batch_size)))
    found: list[list[int]] = [[] for _ in items]
    for row_T, numbers in zip(np.concatenate(made), rows.order, strict=False):
        at = 0
        for number in numbers:
            weights = np.asarray(items[number].weights)
            found[number] = row_T[at : at + len(weights)][weights > 0].tolist()
            at += len(weights)
            if -1 in found[number]:
                raise NotFinite("logits of labels are")
    return found
