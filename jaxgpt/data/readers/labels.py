"""What data with labels share: a split's files, and labels that the model must know."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxgpt.config import Classifier, Labelled, Tagged
from jaxgpt.data.packing import Item, PackedExamples, Rows
from jaxgpt.errors import UserError, require
from jaxgpt.text.tokenizer import Tokenizer

Encode = Callable[[Any, Tokenizer, int, str, Classifier], tuple[list[Any], list[list[Item]]]]
"""(data, tokenizer, length, split, task) to the examples of the split and the items of each."""


def split_files(data: Tagged | Labelled, split: str) -> tuple[str, ...]:
    """The files of `train`, `validation` or `test`; `UserError` where none is named."""
    files: tuple[str, ...] = getattr(data, split)
    require(bool(files), f"data.{split} names no files; name some, such as --data.{split} FILE.")
    return files


def check_labels(split: str, used: set[str], whole: tuple[str, ...], task: Classifier) -> None:
    """Refuse data with labels that the model does not have, naming all of them."""
    missing = sorted(used.difference(task.labels))
    require(
        not missing,
        f"data.{split} has labels that are not in model.labels {task.labels}: {', '.join(missing)}"
        f"{' (tags are read as BIO)' if task.pool == 'token' else ''}; set model.labels to {whole}, "
        "or mend the files.",
    )


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
        _, groups = encode(data, tokenizer, length, split, task)
        items = [item for group in groups for item in group]
        return PackedExamples(items, length, data.bins, seed, tokenizer.control["<|pad|>"])

    return rows
