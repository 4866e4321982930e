"""Documents of text files: plain text, JSON lines, Parquet; cut into jobs, read in order.

A `Span` is a byte range of a file (row groups of a Parquet file). A document belongs to the span
in which it begins, so spans can be read in any process, and together they give every document
once. Nothing here holds more than one document, or `DOCUMENT_BYTES`, in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO

from jaxgpt.data.lines import as_object, check_text, field_of, parse_line, read_range
from jaxgpt.data.sources import Report, damage, kind_of, open_source, packing_of
from jaxgpt.data.tables import parquet_file, parquet_rows
from jaxgpt.errors import UserError

DOCUMENT_BYTES = 64 << 20
"""A .txt file is one document up to this size; a larger one is cut into documents of about it, at
the last line end before the cut."""
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Span:
    """Bytes (row groups of Parquet) from `start` up to `end` of a file."""

    path: str
    start: int
    end: int
    size: int
    """Bytes, for progress and for balancing jobs."""


# ------------------------------------------------------------------------------------ cutting files


def cut(path: str, size: int) -> list[Span]:
    """Spans of about `size` bytes that together hold every document of the file once."""
    kind, total = kind_of(path), Path(path).stat().st_size
    if packing_of(path):  # can only be read from its beginning
        return [Span(path, 0, total, total)]
    if kind == ".jsonl":
        starts = range(0, total, size)
        return [Span(path, s, min(s + size, total), min(size, total - s)) for s in starts]
    if kind == ".txt":
        edges = list(_text_edges(path, total))
        return [Span(path, a, b, b - a) for a, b in pairwise(edges)]
    meta = parquet_file(path).metadata
    share = total // max(1, meta.num_row_groups)
    return [Span(path, i, i + 1, share) for i in range(meta.num_row_groups)]


def _text_edges(path: str, total: int) -> Iterator[int]:
    edge = 0
    yield edge
    with open_source(path) as stream:
        while total - edge > DOCUMENT_BYTES:
            stream.seek(edge)
            edge += _whole(stream.read(DOCUMENT_BYTES))
            yield edge
    if edge < total:
        yield total


def _whole(data: bytes) -> int:
    """How much of the data, which goes on, is whole lines; else whole characters of UTF-8."""
    line = data.rfind(b"\n", len(data) // 2)
    if line >= 0:
        return line + 1
    for back in range(1, min(4, len(data)) + 1):
        if data[-back] >= 0xC0:  # the first byte of a character of 2 to 4
            return len(data) - back * (back < 2 + (data[-back] >= 0xE0) + (data[-back] >= 0xF0))
    return len(data)


# ------------------------------------------------------------------------------------ reading files


def read_documents(files: Iterable[str], *, field: str = "text", max_bad: float = 0.01) -> Iterator[str]:
    """Every document of the files; `UserError` at the end when too many lines were bad."""
    report = Report()
    for path in files:
        for span in cut(path, DOCUMENT_BYTES):
            yield from read_span(span, field, report)
    report.check(max_bad)


def read_span(span: Span, field: str, report: Report) -> Iterator[str]:
    """Documents that begin in the span; bad lines are counted in `report` and left out."""
    kind = kind_of(span.path)
    if kind == ".txt":
        texts = _read_text(span, report)
    elif kind == ".parquet":
        texts = _read_parquet(span, field, report)
    else:

        def text_of(line: bytes | None) -> str:
            return check_text(field_of(as_object(parse_line(line)), field), field)

        texts = read_range(span.path, report, text_of, span.start, span.end)
    for text in texts:
        if text:
            yield text
        else:
            report.empty += 1


def _read_text(span: Span, report: Report) -> Iterator[str]:
    with open_source(span.path) as stream:
        if packing_of(span.path):
            yield from _decoded(_cut_stream(span.path, stream), span.path, 0, report)
        else:
            stream.seek(span.start)
            yield from _decoded([stream.read(span.end - span.start)], span.path, span.start, report)


def _cut_stream(path: str, stream: IO[bytes]) -> Iterator[bytes]:
    """A compressed text as documents, cut where the same text uncompressed would be."""
    held, more = b"", True
    while more:
        try:
            piece = stream.read(DOCUMENT_BYTES + 1 - len(held))
        except Exception as error:
            raise damage(path, error) from None
        held, more = held + piece, bool(piece)
        if len(held) > DOCUMENT_BYTES:
            edge = _whole(held[:DOCUMENT_BYTES])
            yield held[:edge]
            held = held[edge:]
    if held:
        yield held


def _decoded(parts: Iterable[bytes], path: str, offset: int, report: Report) -> Iterator[str]:
    for data in parts:
        report.lines += 1
        try:
            yield (data if offset else data.removeprefix(_BOM)).decode("utf-8")
        except UnicodeDecodeError as error:
            at = error.start + (0 if offset or not data.startswith(_BOM) else len(_BOM))
            raise UserError(
                f"{path} is not UTF-8 (byte 0x{data[at]:02x} at offset {offset + at}); convert it, as with "
                "`iconv -f ENCODING -t UTF-8`."
            ) from None
        offset += len(data)


def _read_parquet(span: Span, field: str, report: Report) -> Iterator[str]:
    for where, row in parquet_rows(span.path, report, field, range(span.start, span.end)):
        try:
            yield check_text(field_of(row, field), field)
        except ValueError as error:
            report.add_bad(where, str(error))
