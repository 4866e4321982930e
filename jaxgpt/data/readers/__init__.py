"""From the config of data to its rows: one reader for each of its classes. Nothing here imports jax."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

from jaxgpt.config import Chat, Classifier, Labelled, Mix, Pairs, Prompts, Rated, Run, Tagged, Task, Text
from jaxgpt.config.data import Data
from jaxgpt.data.mixing import MixedRows
from jaxgpt.data.packing import Item, Rows
from jaxgpt.data.readers import chat, labelled, pairs, prompts, tagging, tasks, text
from jaxgpt.data.readers.labels import Encode, rows_by
from jaxgpt.errors import UserError, require
from jaxgpt.text.load import load_tokenizer
from jaxgpt.text.tokenizer import ByteTokenizer, Tokenizer


class Reader(NamedTuple):
    """How one kind of data is read.

    Attributes:
      rows: (data, tokenizer, length, seed, batch_size, task) to rows by number; see `rows_of`.
      tokenizer: of the data, where their tokenizer is: a folder, `byte`, or nothing, which means that of
        the run to start from.
      encode: of data with labels: the examples of any split and the items that each was encoded to.
    """

    rows: Callable[[Any, Tokenizer, int, int | None, int, Classifier | None], Rows]
    tokenizer: Callable[[Any], str] = attrgetter("tokenizer")
    encode: Encode | None = None


def _mixed(
    data: Mix, tokenizer: Tokenizer, length: int, seed: int | None, batch_size: int, task: Classifier | None
) -> Rows:
    """Rows of all sources, by their weights or their sizes; without a seed, one source after another."""
    parts = [rows_of(source, tokenizer, length, seed, batch_size, task) for source in data.sources]
    sizes = [part.epoch_rows ** (1 / data.temperature) for part in parts]
    return MixedRows(parts, data.weights or sizes, seed)


def _mixed_tokenizer(data: Mix) -> str:
    """The tokenizer that the sources name.

    Raises:
      UserError: they name different ones.
    """
    places = [reader_of(source).tokenizer(source) for source in data.sources]
    named = {name: place for name, place in zip(data.source_names, places, strict=True) if place}
    digests = {place: open_tokenizer(place).digest for place in set(named.values())}
    first = next(iter(named), "")
    for name, place in named.items():
        require(
            digests[place] == digests[named[first]],
            f"the sources {first} and {name} of data have different tokenizers ({named[first]} and {place}); "
            "prepare one again with the other's.",
        )
    return named.get(first, "")


READERS: dict[type, Reader] = {
    Text: Reader(text.rows, text.tokenizer_of),
    Chat: Reader(chat.rows),
    Prompts: Reader(prompts.rows),
    Pairs: Reader(pairs.pair_rows),
    Rated: Reader(pairs.rated_rows),
    Tagged: Reader(rows_by(tagging.encode), encode=tagging.encode),
    Labelled: Reader(rows_by(labelled.encode), encode=labelled.encode),
    Mix: Reader(_mixed, _mixed_tokenizer),
    Task: Reader(tasks.rows),
}
"""The reader of each class of `config.data`; that of Task is for all classes derived from it."""


def reader_of(data: Data) -> Reader:
    """The reader of data."""
    return READERS[Task if isinstance(data, Task) else type(data)]


def rows_of(
    data: Data,
    tokenizer: Tokenizer,
    model_length: int,
    seed: int | None,
    batch_size: int,
    task: Classifier | None = None,
) -> Rows:
    """Packed rows by number: endless training rows, or without a seed those of validation in order.

    Args:
      data: what to read.
      tokenizer: the one the data were or are to be tokenized with.
      model_length: T where `data.length` is None.
      seed: of the order of documents or examples and of the cuts.
      batch_size: rows of the global batch, the streams of contiguous text.
      task: what labels mean, on Tagged and Labelled data.

    Raises:
      UserError: no data, or data of another tokenizer.
    """
    length = data.length or model_length
    return reader_of(data).rows(data, tokenizer, length, seed, batch_size, task)


def encode_split(
    data: Data, tokenizer: Tokenizer, length: int, split: str, task: Classifier
) -> tuple[list[Any], list[list[Item]]]:
    """The examples of a split (`train`, `validation`, `test`) of data with labels, and the items of each.

    Raises:
      UserError: the data have no labels, the split names no files, or the model does not know a label.
    """
    encode = reader_of(data).encode
    if encode is None:
        raise UserError(f"{type(data).__name__} data have no labels; set data to Tagged or Labelled.")
    return encode(data, tokenizer, length, split, task)


def open_tokenizer(name: str) -> Tokenizer:
    """The tokenizer that data name: `byte`, or a folder."""
    return ByteTokenizer() if name == "byte" else load_tokenizer(name)


def run_tokenizer(run: Run) -> Tokenizer:
    """The tokenizer a run reads its data with.

    Raises:
      UserError: when there is none where the config says.
    """
    name = reader_of(run.data).tokenizer(run.data)
    if name:
        return open_tokenizer(name)
    require(
        bool(run.init_from),
        "data.tokenizer and init_from are empty; name a tokenizer folder or a run to start from.",
    )
    require(
        Path(run.init_from).is_dir(),
        f"init_from {run.init_from!r} does not exist; name the folder of a trained run.",
    )
    return load_tokenizer(Path(run.init_from) / "tokenizer")
