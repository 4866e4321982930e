"""What data with labels share: a split's files, and labels that the model must know."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from jaxgpt.alive import alive
from jaxgpt.config import Classifier, Labelled, Tagged
from jaxgpt.data.packing import Item, PackedExamples, Rows
from jaxgpt.errors import UserError, require
from jaxgpt.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

Encode = Callable[[Any, Tokenizer, int, str, Classifier], tuple[list[Any], list[list[Item]]]]
"""(data, tokenizer, length, split, task) to the examples of the split and the items of each."""


def split_files(data: Tagged | Labelled, split: str) -> tuple[str, ...]:
    """The files of `train`, `validation` or `test`; `UserError` where none is named."""
    files: tuple[str, ...] = getattr(data, split)
    require(bool(files), f"data.{split} names no files; name some, such as --data.{split} FILE.")
    return files


def known_labels(split: str, used: set[str], whole: tuple[str, ...], task: Classifier) -> tuple[str, ...]:
    """The labels that targets of a split may name: the model's.

    Behind them, those that a test file alone has: the model cannot predict them, so each counts as missed.

    Raises:
      UserError: labels of another split that the model does not have, all of them named.
    """
    missing = tuple(label for label in whole if label in used and label not in task.labels)
    wanted = (*task.labels, *(label for label in whole if label not in task.labels))
    said = (
        f"data.{split} has labels that are not in model.labels {task.labels}: {', '.join(missing)}"
        f"{' (tags are read as BIO)' if task.pool == 'token' else ''}"
    )
    require(not missing or split == "test", f"{said}; set model.labels to {wanted}, or correct the files.")
    if missing:
        log.warning("%s; the model cannot predict them, so they count as missed", said)
    return (*task.labels, *missing)


def rows_by(encode: Encode) -> Callable[..., Rows]:
    """The `rows` of a reader whose examples are encoded to items, each of which is packed whole."""

    def rows(
        data: Tagged | Labelled,
        tokenizer: Tokenizer,
        length: int,
        seed: int | None,
        batch_size: int,
        task: Classifier | None,
    ) -> Rows:
        if task is None:
            raise UserError("labels need a model that knows them; set model to Classifier(...).")
        split = "validation" if seed is None else "train"
        with alive("reading labelled data and writing them as tokens"):
            if split == "train" and data.test:  # its labels are told before the training, not after it
                encode(data, tokenizer, length, "test", task)
            _, groups = encode(data, tokenizer, length, split, task)
        items = [item for group in groups for item in group]
        return PackedExamples(items, length, data.bins, seed, tokenizer.control["<|pad|>"])

    return rows
