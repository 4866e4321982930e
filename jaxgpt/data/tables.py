"""Rows of tables: CSV, TSV and Parquet."""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from jaxgpt.data.lines import LINE_BYTES, decode_line, read_lines
from jaxgpt.data.sources import Report, endings, kind_of, read_all
from jaxgpt.errors import UserError, library_errors, require

log = logging.getLogger(__name__)

TABLES = endings(".tsv", ".csv")
"""Endings of tables of text."""


def table_rows(path: str, report: Report) -> Iterator[tuple[str, list[str]]]:
    """(where it stands, cells) of each row of a .tsv or .csv file, the header being one.

    A .csv is quoted as the csv module has it; in a .tsv a quote is a character like any other.

    Raises:
      UserError: the file cannot be read or is not UTF-8.
    """
    if kind_of(path, TABLES) == ".csv":
        return _csv_rows(path, report)
    return read_lines(path, report, lambda line: decode_line(line).rstrip("\r\n").split("\t"))


def named_rows(path: str, report: Report, fields: Sequence[str] = ()) -> Iterator[tuple[str, dict[str, str]]]:
    """(where it stands, column to cell) of each row below the header of a .tsv or .csv file.

    Args:
      path: of the file.
      report: counts rows and bad rows.
      fields: names of the columns of a table without a header, that is, one whose first line has as many
        cells and fewer than half of these names (a cell of MMLU's may well be called A).

    Raises:
      UserError: as `table_rows`, or two columns have one name.
    """
    columns: list[str] = []
    for where, cells in table_rows(path, report):
        if not columns and len(cells) == len(fields) > 2 * len(set(fields) & set(cells)):
            log.info("%s: its first line names no column; read as %s", path, ", ".join(fields))
            columns = list(fields)
        if not columns:
            twice = next((c for c in cells if cells.count(c) > 1), None)
            require(twice is None, f"{path} has two columns {twice!r} in its first line; rename one.")
            columns = cells
            report.lines -= 1  # a header is no record
        elif len(cells) != len(columns):
            report.add_bad(where, f"{len(cells)} columns, not the {len(columns)} of the first line")
        else:
            yield where, dict(zip(columns, cells, strict=True))


def _csv_rows(path: str, report: Report) -> Iterator[tuple[str, list[str]]]:
    """(where it begins, cells) of each row; what a broken quote swallows counts as bad lines."""
    data = read_all(path)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line} is not UTF-8; convert the file, as with iconv.") from None
    csv.field_size_limit(max(csv.field_size_limit(), LINE_BYTES))  # csv's own is 128 KiB
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    while True:
        start = reader.line_num
        try:
            cells = next(reader, None)
        except csv.Error as error:
            report.lines += reader.line_num - start
            report.bad += reader.line_num - start - 1
            report.add_bad(f"{path}:{start + 1}", f"not CSV ({error})")
            continue
        if cells is None:
            return
        report.lines += reader.line_num - start
        if any(cells):
            yield f"{path}:{start + 1}", cells


# ------------------------------------------------------------------------------------------ Parquet


def parquet_file(path: str) -> Any:
    """A pyarrow ParquetFile; `UserError` where it is none or pyarrow is not installed."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            f"{path} needs pyarrow, which is not installed; run `pip install 'jaxgpt[parquet]'`."
        ) from None
    with library_errors(f"{path} is not a Parquet file", "fetch it again"):
        return pyarrow.parquet.ParquetFile(path)


def parquet_rows(
    path: str, report: Report, field: str = "", groups: Iterable[int] | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it stands, column to value) of each row of a Parquet file; values that are no text are bad rows.

    Args:
      path: of the file.
      report: counts rows and bad rows.
      field: the one column to read, or a path that begins with it (`a.b`); empty reads all.
      groups: numbers of row groups; None means all.

    Raises:
      UserError: the file is damaged, or has no such column.
    """
    file = parquet_file(path)
    names = file.schema_arrow.names
    column = next((n for n in (field, field.replace("[", ".").split(".")[0]) if n in names), None)
    require(
        column is not None or not field,
        f"{path} has no column {field!r}; it has {', '.join(names)}.",
    )
    groups = range(file.metadata.num_row_groups) if groups is None else groups
    row = sum(file.metadata.row_group(i).num_rows for i in range(min(groups, default=0)))
    batches = file.iter_batches(
        batch_size=256, row_groups=list(groups), columns=None if column is None else [column]
    )
    while True:
        with library_errors(f"{path} is damaged after row {row}", "fetch it again"):
            batch = next(batches, None)
        if batch is None:
            return
        for i in range(batch.num_rows):
            row += 1
            report.lines += 1
            try:
                yield f"{path}:row {row}", batch.slice(i, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                report.add_bad(f"{path}:row {row}", f"not UTF-8 ({error})")
