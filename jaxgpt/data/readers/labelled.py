"""Texts with one label each: read from tables and JSON lines, encoded for sequence classification.

Template: `<|bos|> text <|eos|>`, and `pair <|eos|>` after it where there is a second text.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jaxgpt.config import Classifier, Labelled
from jaxgpt.data.lines import as_object, check_text, field_of, parse_line, read_lines
from jaxgpt.data.packing import Item
from jaxgpt.data.readers.labels import known_labels, split_files
from jaxgpt.data.sources import Report, endings, expand
from jaxgpt.data.tables import TABLES, table_rows
from jaxgpt.errors import require, require_known
from jaxgpt.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

SUFFIXES = (*TABLES, *endings(".jsonl", ".ndjson"))
Names = tuple[str, str, str]
"""The fields of text, pair ("" for none) and label."""


@dataclass(frozen=True)
class LabelledText:
    """A text, or a pair of texts, and its label."""

    text: str
    pair: str | None
    label: str


def label_set(examples: Iterable[LabelledText]) -> tuple[str, ...]:
    """The labels in order: of their value where all are integers (2 before 10), else of the alphabet."""
    labels = {example.label for example in examples}
    try:
        return tuple(sorted(labels, key=lambda label: (int(label), label)))
    except ValueError:
        return tuple(sorted(labels))


def encode_labelled(
    example: LabelledText,
    tokenizer: Tokenizer,
    labels: Sequence[str],
    length: int,
    pool: Literal["first", "last", "mean"],
) -> Item:
    """The example as at most `length` tokens, its label the one target.

    The target is at the first token for the pool `first`, at the last for `last` and `mean` (whose
    reader averages over all tokens). What does not fit is cut from the ends of the texts, token by
    token from the longer of the two (the pair when they are even): `longest_first` of transformers.

    Raises:
      UserError: a label that is not in `labels`; a length below 4.
    """
    require(length >= 4, f"length is {length}; a text with its control tokens needs at least 4.")
    require_known(pool, ("first", "last", "mean"), f"pool is {pool!r}")
    require_known(example.label, labels, f"label {example.label!r} is not one of the model's")
    bos, eos = tokenizer.control["<|bos|>"], tokenizer.control["<|eos|>"]
    text, pair = tokenizer.encode(example.text), list[int]()
    room = length - 2
    if example.pair is not None:
        pair, room = tokenizer.encode(example.pair), length - 3
        pair = pair[: max(room - len(text), room // 2)]
    first, second = [bos, *text[: room - len(pair)], eos], [*pair, eos] if example.pair is not None else []
    tokens = first + second
    types = None if example.pair is None else [0] * len(first) + [1] * len(second)
    targets, weights = [0] * len(tokens), [0.0] * len(tokens)
    place = 0 if pool == "first" else -1
    targets[place], weights[place] = labels.index(example.label), 1.0
    return Item(tokens, targets, weights, types)


# --------------------------------------------------------------------------------------- the files


def read_labelled(
    paths: Iterable[str | Path],
    text_field: str = "text",
    pair_field: str = "",
    label_field: str = "label",
    max_bad: float = 0.01,
) -> list[LabelledText]:
    """The examples of .tsv, .csv, .jsonl and .jsonl.gz files, folders or globs, in their order.

    A table has a header that names the fields, or is two columns, text and label. A .csv is quoted
    as the csv module has it; in a .tsv a quote is a character like any other. A label is a string
    or an integer. Bad lines are logged with file and line and left out.

    Raises:
      UserError: a file that cannot be read or lacks a field; a share of bad lines above `max_bad`;
        no example at all.
    """
    report, examples = Report(), list[LabelledText]()
    names = (text_field, pair_field, label_field)
    require(bool(text_field and label_field), "data.text and data.label cannot be empty; name the fields.")
    for path in expand(paths, SUFFIXES):
        before = len(examples), report.bad
        table = path.lower().endswith(TABLES)
        records = _table(path, names, report) if table else read_lines(path, report, parse_line)
        for where, record in records:
            try:
                examples.append(_example(record, names))
            except ValueError as error:
                report.add_bad(where, str(error))
        require((len(examples), report.bad) != before, f"{path} holds no example; fill it or leave it out.")
    report.check(max_bad, "fix them or leave the file out")
    require(bool(examples), "the files of labelled texts hold no example; name files that do.")
    return examples


def _example(record: Any, names: Names) -> LabelledText:
    for name in filter(None, names):
        field_of(as_object(record), name)
    text_field, pair_field, label_field = names
    text = check_text(record[text_field], text_field)
    pair = check_text(record[pair_field], pair_field) if pair_field else None
    for name, value in ((text_field, text), (pair_field, pair)):
        if value is not None and not value.strip():
            raise ValueError(f"field {name!r} is empty")
    label = record[label_field]
    if isinstance(label, bool) or not isinstance(label, str | int):
        raise ValueError(f"field {label_field!r} is {type(label).__name__}, not a string or an integer")
    label = check_text(str(label), label_field).strip()  # a space at its end would be a second label
    if not label:
        raise ValueError(f"field {label_field!r} is empty")
    return LabelledText(text, pair, label)


def _table(path: str, names: Names, report: Report) -> Iterator[tuple[str, dict[str, str]]]:
    """(where it stands, field to cell) of each row but the header."""
    columns, headed, labels = list[str](), True, list[str]()
    for where, cells in table_rows(path, report):
        if not columns:
            columns, headed = _columns(path, cells, names)
            if headed:
                continue
        if len(cells) != len(columns):
            report.add_bad(where, f"{len(cells)} columns, not the {len(columns)} of the first")
            continue
        if not headed:
            labels.append(cells[-1])
        yield where, dict(zip(columns, cells, strict=True))
    if len(labels) > 2 and labels.count(labels[0]) == 1:
        log.warning(
            "%s: the first line is read as an example, but no other has its label %r; if it is a header, "
            "name its columns (data.text, data.label)",
            path,
            labels[0],
        )


def _columns(path: str, cells: list[str], names: Names) -> tuple[list[str], bool]:
    """The names of a table's columns by its first row, and whether that row is a header."""
    wanted = [name for name in names if name]
    missing = [name for name in wanted if name not in cells]
    if not missing:
        return cells, True
    # a header that has one of the names, or names that someone chose, mean a mistake in a name
    plain = names == ("text", "", "label") and len(missing) == len(wanted) and len(cells) == 2
    shown = ", ".join(cell[:40] for cell in cells[:8])
    require(
        plain,
        f"{path} has no column {missing[0]!r} (its first line has: {shown}); name columns of its header "
        "(data.text, data.pair, data.label), or give two columns, text and label, without one.",
    )
    return [names[0], names[2]], False


# --------------------------------------------------------------------------------------- the splits


def encode(
    data: Labelled, tokenizer: Tokenizer, length: int, split: str, task: Classifier
) -> tuple[list[LabelledText], list[list[Item]]]:
    """The texts of a split (`train`, `validation`, `test`), and the one item of each.

    Raises:
      UserError: the split names no files; a label that the model does not know.
    """
    assert task.pool != "token", "Run pairs Tagged data with it"
    texts = read_labelled(split_files(data, split), data.text, data.pair, data.label)
    labels = known_labels(split, {text.label for text in texts}, label_set(texts), task)
    return texts, [[encode_labelled(t, tokenizer, labels, length, task.pool)] for t in texts]
