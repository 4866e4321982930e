"""Records of files: JSON lines, a JSON document, a table, Parquet."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxgpt.data.lines import kind_name, parse_line, read_lines
from jaxgpt.data.sources import Report, endings, kind_of, read_all
from jaxgpt.data.tables import TABLES, named_rows, parquet_rows
from jaxgpt.errors import UserError, require

SUFFIXES = (*endings(".json", ".jsonl", ".ndjson"), *TABLES, ".parquet")


@dataclass
class RecordReport(Report):
    """What reading records found; `unread` counts fields, by file and name, that nobody asked for."""

    unread: dict[str, Counter[str]] = field(default_factory=dict)

    def add_unread(self, path: str, names: list[str]) -> None:
        """Count fields of a record of the file."""
        self.unread.setdefault(path, Counter()).update(names)


def read_records(
    path: str, report: RecordReport, is_record: Callable[[Any], bool], columns: Sequence[str] = ()
) -> Iterator[tuple[str, Any]]:
    """(where it stands, value) of each record of a file; those that cannot be parsed are counted bad.

    Args:
      path: ends in one of `SUFFIXES`.
      report: counts records, bad ones, and the fields beside them in a JSON document.
      is_record: whether a value is one record; tells one record from a list of them.
      columns: names of a table's columns where its first line names none, see `tables.named_rows`.

    Raises:
      UserError: the file cannot be read, is damaged, or its records are in no one place.
    """
    kind = kind_of(path, SUFFIXES)
    if kind == ".jsonl":
        return read_lines(path, report, parse_line)
    if kind == ".json":
        return _document(path, report, is_record)
    return parquet_rows(path, report) if kind == ".parquet" else named_rows(path, report, columns)


def _document(path: str, report: RecordReport, is_record: Callable[[Any], bool]) -> Iterator[tuple[str, Any]]:
    data = read_all(path)
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (offset {error.start}); convert it with iconv.") from None
    except RecursionError:
        raise UserError(f"{path} cannot be read (its values are nested too deeply); fix it.") from None
    except ValueError as error:
        if isinstance(error, json.JSONDecodeError) and _is_lines(error):
            yield from read_lines(path, report, parse_line)
            return
        raise UserError(
            f"{path} is not JSON ({error}); a file of one object per line is named .jsonl."
        ) from None
    del data
    for i, record in enumerate(_records(path, value, report, is_record)):
        report.lines += 1
        yield f"{path}: record {i + 1}", record


def _is_lines(error: json.JSONDecodeError) -> bool:
    """Whether a document broke off after its first line, as JSON lines do under the name of a document."""
    head = error.doc[: error.pos].strip()
    return error.msg == "Extra data" and bool(head) and "\n" not in head


def _records(path: str, value: Any, report: RecordReport, is_record: Callable[[Any], bool]) -> list[Any]:
    """The records of a JSON document: a list of them, one alone, columns, or a list inside an object."""
    if isinstance(value, list):
        return [value] if is_record(value) else value
    require(isinstance(value, dict), f"{path} holds {kind_name(value)}; a list of records was expected.")
    rows = _columns(value)
    if rows and is_record(rows[0]):
        return rows
    if is_record(value):
        return [value]
    lists = [name for name, inner in value.items() if isinstance(inner, list) and inner]
    names = ", ".join(lists or value)
    require(
        len(lists) == 1,
        f"{path} holds an object with {len(lists) or 'no'} lists in it ({names:.200}), and no dialogue by "
        "itself; write the records to read into a file of their own.",
    )
    around = [f"field {name!r} around the records" for name, v in value.items() if v and name not in lists]
    report.add_unread(path, around)
    return value[lists[0]]


def _columns(value: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of columns: lists, or objects by index as pandas writes them; none of another object."""
    columns = list(value.values())
    if all(isinstance(c, dict) for c in columns) and len({tuple(c) for c in columns}) == 1:
        columns = [list(c.values()) for c in columns]
    if not all(isinstance(c, list) for c in columns) or len({len(c) for c in columns}) != 1:
        return []
    if all(isinstance(cell, dict) for column in columns for cell in column):
        return []  # turns, or the records of several splits
    return [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]
