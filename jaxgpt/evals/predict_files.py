"""Files of texts to label, and what was predicted of them in JSON lines or in the files' own formats.

Nothing here imports jax.
"""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from jaxgpt.config import Labelled, Tagged
from jaxgpt.data.lines import (
    as_object,
    check_text,
    decode_line,
    field_of,
    numbered_lines,
    parse_line,
    read_lines,
)
from jaxgpt.data.readers.tagging import DOCUMENT, is_tag, scheme_of, split_columns, to_bio
from jaxgpt.data.readers.tagging import SUFFIXES as COLUMN_SUFFIXES
from jaxgpt.data.sources import Report, endings, kind_of, say_once
from jaxgpt.data.tables import TABLES, table_rows
from jaxgpt.errors import UserError, require
from jaxgpt.files import to_json

log = logging.getLogger(__name__)

Kind = Literal["jsonl", "table", "columns", "lines"]
JSON_LINES = endings(".jsonl", ".ndjson")
WORD_FIELDS = ("words", "tokens")
"""Fields of a record that hold the words of a text, where there is no field of the text."""
_FIX = "fix or remove them"


@dataclass(frozen=True)
class Given:
    """A text to label.

    Attributes:
      text: the text, the words of it, or a pair of texts.
      gold: its label or its tags, where the file has them.
      own: what the file holds of it: a record, the cells of a row, the columns of each word.
    """

    text: str | Sequence[str]
    gold: Any = None
    own: Any = None


@dataclass(frozen=True)
class Source:
    """A file's texts, its kind, and of a table the header and whether its cells are quoted."""

    kind: Kind
    texts: list[Given]
    header: list[str] = field(default_factory=list)
    quoted: bool = False


def read_source(path: str, data: Tagged | Labelled, kind: Kind | None = None, name: str = "") -> Source:
    """The texts of a file for a run with such data.

    Args:
      path: of the file.
      data: of the run. Taggers and classifiers read JSON lines, tables and lines of text; taggers column
        files too.
      kind: of the file; None tells it by the file's ending and, of .txt files, by what is in them.
      name: field or column of the text, instead of `data.text`, or of `text`.

    Raises:
      UserError: a line that cannot be read, or no text at all.
    """
    kind = kind or kind_of_source(path, data)
    report = Report()
    if isinstance(data, Tagged):
        source = _columns(path) if kind == "columns" else _texts(path, kind, name or "text", data, report)
    else:
        require(kind != "columns", "a classifier reads no column files; use jsonl, table or lines.")
        source = _texts(path, kind, name or data.text, data, report)
    report.check(0, _FIX)
    require(bool(source.texts), f"{path} holds no text; fill it or name another.")
    gold = "with" if any(given.gold is not None for given in source.texts) else "without"
    log.info("%s: %d texts (%s), %s labels", path, len(source.texts), kind, gold)
    return source


def kind_of_source(path: str, data: Tagged | Labelled) -> Kind:
    """What a file is by its ending, or by its lines where they are a word and a tag."""
    if kind_of(path, JSON_LINES):
        return "jsonl"
    if isinstance(data, Labelled) or kind_of(path, TABLES) == ".csv":
        return "table" if kind_of(path, TABLES) else "lines"
    plain = Path(path).suffix.lower()
    if plain in COLUMN_SUFFIXES and plain != ".txt":
        return "columns"
    try:
        columns = [split_columns(line) for _, line in numbered_lines(path)]
    except ValueError:
        return "lines"
    words = [cells for cells in columns if cells[0] != DOCUMENT]
    tagged = all(len(cells) > 1 and is_tag(cells[-1]) and len(cells) == len(words[0]) for cells in words)
    return "columns" if tagged and words else "lines"


# --------------------------------------------------------------------------------- lines and tables


def _texts(path: str, kind: Kind, name: str, data: Tagged | Labelled, report: Report) -> Source:
    pair, label = (data.pair, data.label) if isinstance(data, Labelled) else ("", "")
    if kind == "table":
        return _table(path, (name, pair, label), report)
    if kind == "lines":
        require(not pair, f"lines of {path} hold one text each; give pairs as a table or JSON lines.")
        lines = read_lines(path, report, lambda line: decode_line(line).rstrip("\r\n"))
        return Source(kind, [Given(text, own=text) for _, text in lines])
    read = (
        partial(_words, name=name)
        if isinstance(data, Tagged)
        else partial(_record, names=(name, pair, label))
    )
    return Source(kind, list(_good(read_lines(path, report, parse_line), read, report)))


def _good(
    records: Iterable[tuple[str, Any]], read: Callable[[Any], Given], report: Report
) -> Iterator[Given]:
    for where, record in records:
        try:
            yield read(record)
        except ValueError as error:
            report.add_bad(where, str(error))


def _words(record: Any, name: str) -> Given:
    """A text for a tagger."""
    found = next((key for key in WORD_FIELDS if name not in as_object(record) and key in record), "")
    if not found:
        return Given(check_text(field_of(as_object(record), name), name), own=record)
    words = record[found]
    if not isinstance(words, list) or not all(isinstance(word, str) and word for word in words):
        raise ValueError(f"field {found!r} is not a list of words")
    return Given([check_text(word, found) for word in words], own=record)


def _record(record: Any, names: tuple[str, str, str]) -> Given:
    """A text for a classifier, or a pair."""
    texts = [check_text(field_of(as_object(record), name), name) for name in names[:2] if name]
    for name, text in zip(names, texts, strict=False):
        if not text.strip():
            raise ValueError(f"field {name!r} is empty")
    gold = record.get(names[2])
    return Given(texts[0] if len(texts) == 1 else texts, None if gold is None else str(gold).strip(), record)


def _table(path: str, names: tuple[str, str, str], report: Report) -> Source:
    rows, wanted = list(table_rows(path, report)), [name for name in names[:2] if name]
    first = rows[0][1] if rows else []
    header = first if set(wanted) <= set(first) else []
    columns = header or [*wanted, *filter(None, names[2:])][: max(len(first), len(wanted))]
    require(
        len(first) in (len(wanted), len(columns)),
        f"{path} has no column {', '.join(n for n in wanted if n not in first)!r} (its first line has: "
        f"{', '.join(cell[:40] for cell in first[:8])}); name one with --field, or give {len(wanted)} "
        "columns without a header.",
    )
    texts = []
    for where, cells in rows[bool(header) :]:
        if len(cells) != len(columns):
            report.add_bad(where, f"{len(cells)} columns, not the {len(columns)} of the first line")
            continue
        record = dict(zip(columns, cells, strict=True))
        texts += [
            Given(g.text, g.gold, cells)
            for g in _good([(where, record)], partial(_record, names=names), report)
        ]
    return Source("table", texts, header, kind_of(path, TABLES) == ".csv")


# -------------------------------------------------------------------------------------- column files


def _columns(path: str) -> Source:
    """Sentences of a column file, with tags in the last column or without."""
    sentences, last = list[list[list[str]]](), -1
    for number, line in numbered_lines(path):
        try:
            cells = split_columns(line)
        except UnicodeDecodeError:
            raise UserError(f"{path}:{number} is not UTF-8; convert the file, as with iconv.") from None
        except ValueError as error:
            raise UserError(f"{path}:{number}: {error}") from None
        if number > last + 1 or not sentences or cells[0] == DOCUMENT:
            sentences.append([])
        if cells[0] != DOCUMENT:
            sentences[-1].append(cells)
        last = number if cells[0] != DOCUMENT else -1
    sentences = [sentence for sentence in sentences if sentence]
    words = [cells for sentence in sentences for cells in sentence]
    if not all(len(cells) > 1 and is_tag(cells[-1]) for cells in words):
        return Source("columns", [Given([cells[0] for cells in s], own=s) for s in sentences])
    tags = [[cells[-1] for cells in sentence] for sentence in sentences]
    scheme = scheme_of(tags)
    pairs = zip(sentences, tags, strict=True)
    return Source("columns", [Given([c[0] for c in s], to_bio(t, scheme), s) for s, t in pairs])


# ------------------------------------------------------------------------------------------- output


def own_lines(source: Source, records: Sequence[dict[str, Any]]) -> Iterator[str]:
    """What was predicted, in the format of the source.

    Of JSON lines the records themselves. Of a table its columns and, for a tagger, `spans` as JSON, for a
    classifier `predicted` and `score`. Of column files and of lines for a tagger: word, score, any other
    columns, and the predicted tag, so that the last two are gold and predicted where the file has tags. Of
    lines for a classifier: text, label and score. All but .csv files have tabs between columns.
    """
    if source.kind == "jsonl":
        yield from json_lines(source, records)
    elif source.kind == "columns" or (source.kind == "lines" and "tags" in records[0]):
        for given, record in zip(source.texts, records, strict=True):
            rows = given.own if source.kind == "columns" else [[word] for word in record["words"]]
            for cells, score, tag in zip(rows, record["scores"], record["tags"], strict=True):
                yield "\t".join((cells[0], f"{score:.6f}", *cells[1:], tag)) + "\n"
            yield "\n"
    else:
        if source.header:
            names = ["spans"] if "tags" in records[0] else ["predicted", "score"]
            yield _row([*source.header, *names], source.quoted)
        for given, record in zip(source.texts, records, strict=True):
            cells = given.own if source.kind == "table" else [given.own]
            yield _row([*cells, *_cells(record)], source.quoted)


def _cells(record: dict[str, Any]) -> list[str]:
    if "spans" in record:
        return [to_json(record["spans"])]
    return [record["label"], f"{record['score']:.6f}"]


def _row(cells: Sequence[str], quoted: bool) -> str:
    if not quoted:
        return "\t".join(cells) + "\n"
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue()


def json_lines(source: Source, records: Sequence[dict[str, Any]]) -> Iterator[str]:
    """One object per text: what was predicted, before it the other fields of the input's record."""
    for given, record in zip(source.texts, records, strict=True):
        if isinstance(given.own, dict):
            kept = {key: value for key, value in given.own.items() if key not in record}
            lost = [
                k for k, v in given.own.items() if k in record and v not in (record[k], record.get("gold"))
            ]
            if lost:
                say_once(f"fields of the input give way to what was predicted: {', '.join(lost)}")
            record = kept | record
        yield to_json(record) + "\n"
