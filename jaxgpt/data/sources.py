"""Documents of text files: plain text, JSON lines, Parquet; found, cut into jobs, read in order.

A `Span` is a byte range of a file (row groups of a Parquet file). A document belongs to the span
in which it begins, so spans can be read in any process, and together they give every document
once. Nothing here holds more than one document, or `DOCUMENT_BYTES`, in memory.
"""

from __future__ import annotations

import glob
import gzip
import json
import logging
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, TypeVar

from jaxgpt.errors import UserError, nearest, require, require_known

log = logging.getLogger(__name__)
Parsed = TypeVar("Parsed")

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet")
DOCUMENT_BYTES = 64 << 20
"""A .txt file is one document up to this size; a larger one is cut into documents of about it, at
the last line end before the cut. A longer JSON line is a bad line."""
REPORTED = 20
"""Bad lines named one by one; the rest are only counted."""
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Span:
    """Bytes (row groups of Parquet) from `start` up to `end` of a file."""

    path: str
    start: int
    end: int
    size: int
    """Bytes, for progress and for balancing jobs."""


@dataclass
class Report:
    """What reading found: lines read, lines that gave nothing, and the first of the bad ones."""

    lines: int = 0
    empty: int = 0
    bad: int = 0
    examples: list[str] = field(default_factory=list)

    def add_bad(self, where: str, why: str) -> None:
        """Count a bad line and keep it if it is among the first."""
        self.bad += 1
        if len(self.examples) < REPORTED:
            self.examples.append(f"{where}: {why}")

    def merge(self, other: Report) -> None:
        """Add another report's counts to this one."""
        self.lines, self.empty = self.lines + other.lines, self.empty + other.empty
        self.bad += other.bad
        self.examples = (self.examples + other.examples)[:REPORTED]

    def check(self, max_bad: float, fix: str = "mend them or raise --max-bad") -> None:
        """Log the bad lines; `UserError` when they are more than the share `max_bad` of all."""
        for example in self.examples:
            log.warning("%s", example)
        if self.bad:
            log.warning("%d of %d lines are bad and were left out", self.bad, self.lines)
        require(
            self.bad <= max_bad * self.lines,
            f"{self.bad} of {self.lines} lines are bad, more than the allowed share {max_bad:g} "
            f"(first: {self.examples[0] if self.examples else ''}); {fix}.",
        )


def kind_of(path: str) -> str:
    """The suffix in `SUFFIXES` that a file name ends in, or an empty string."""
    return next((s for s in SUFFIXES if path.lower().endswith(s)), "")


def expand(sources: Iterable[str | Path], suffixes: tuple[str, ...] = SUFFIXES) -> list[str]:
    """Files that names, globs and folders (searched to the bottom) stand for, sorted, each once.

    Raises:
      UserError: nothing there, a file of another kind, an empty or an unreadable file.
    """
    found: set[str] = set()
    for source in map(str, sources):
        path = Path(source).expanduser()
        if path.is_dir():
            inside = [p for p in path.rglob("*") if p.is_file() and _visible(p, path)]
            files = [str(p) for p in inside if p.name.lower().endswith(suffixes)]
            require(bool(files), f"folder {source} holds no file ending in {', '.join(suffixes)}.")
        elif path.is_file():
            files = [str(path)]
            require(
                path.name.lower().endswith(suffixes),
                f"{source} is of a kind this command does not read; use {', '.join(suffixes)}.",
            )
        else:
            named = [p for p in glob.glob(str(path), recursive=True) if Path(p).is_file()]
            files = [p for p in named if p.lower().endswith(suffixes)]
            what = f"matches {Path(named[0]).name} and no" if named else "does not exist or matches no"
            require(bool(files), f"{source} {what} {', '.join(suffixes)} file; rename or name others.")
        found.update(files)
    require(bool(found), "no source is named; give files, folders or globs.")
    for name in sorted(found):
        with open_source(name) as stream:
            require(bool(stream.read(1)), f"{name} is empty; remove it or fill it.")
    return sorted(found)


def _visible(path: Path, root: Path) -> bool:
    return not any(part.startswith(".") for part in path.relative_to(root).parts)


def open_source(path: str) -> IO[bytes]:
    """The file opened for reading bytes; `UserError` saying why where it cannot be."""
    try:
        return open(path, "rb")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check the path and its rights.") from None


def total_size(files: Iterable[str]) -> int:
    """Bytes on disk of all files."""
    return sum(Path(f).stat().st_size for f in files)


# ------------------------------------------------------------------------------------ cutting files


def cut(path: str, size: int) -> list[Span]:
    """Spans of about `size` bytes that together hold every document of the file once."""
    kind, total = kind_of(path), Path(path).stat().st_size
    if kind == ".jsonl":
        starts = range(0, total, size)
        return [Span(path, s, min(s + size, total), min(size, total - s)) for s in starts]
    if kind == ".txt":
        edges = list(_text_edges(path, total))
        return [Span(path, a, b, b - a) for a, b in pairwise(edges)]
    if kind == ".parquet":
        meta = _parquet(path).metadata
        share = total // max(1, meta.num_row_groups)
        return [Span(path, i, i + 1, share) for i in range(meta.num_row_groups)]
    return [Span(path, 0, total, total)]  # gzip can only be read from its beginning


def _text_edges(path: str, total: int) -> Iterator[int]:
    edge = 0
    yield edge
    with open_source(path) as stream:
        while total - edge > DOCUMENT_BYTES:
            half = DOCUMENT_BYTES // 2
            stream.seek(edge + half)
            line = stream.read(half).rfind(b"\n")
            edge += half + line + 1 if line >= 0 else DOCUMENT_BYTES
            if line < 0:
                edge -= _torn(stream, edge)
            yield edge
    if edge < total:
        yield total


def _torn(stream: IO[bytes], edge: int) -> int:
    """How many bytes before `edge` belong to a UTF-8 character that ends after it."""
    for back in range(4):
        stream.seek(edge - back)
        byte = stream.read(1)
        if not byte or byte[0] & 0xC0 != 0x80:
            return back
    return 0


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
        yield from _read_text(span, report)
    elif kind == ".parquet":
        yield from _read_parquet(span, field, report)
    else:

        def text_of(line: bytes | None) -> str:
            return check_text(field_of(as_object(parse_line(line)), field), field)

        for _, text in _parsed(span, report, text_of):
            if text:
                yield text
            else:
                report.empty += 1


def _read_text(span: Span, report: Report) -> Iterator[str]:
    with open_source(span.path) as stream:
        stream.seek(span.start)
        data = stream.read(span.end - span.start)
    report.lines += 1
    try:
        text = data.removeprefix(_BOM).decode("utf-8") if span.start == 0 else data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{span.path} is not UTF-8 (byte 0x{data[error.start]:02x} at offset "
            f"{span.start + error.start}); convert it, as with `iconv -f ENCODING -t UTF-8`."
        ) from None
    if text:
        yield text
    else:
        report.empty += 1


def parse_line(line: bytes | None) -> Any:
    """The JSON value of a line; `ValueError` with a short reason."""
    if line is None:
        raise ValueError(f"the line is longer than {DOCUMENT_BYTES >> 20} MiB")
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte 0x{line[error.start]:02x} at column {error.start + 1})") from None
    except RecursionError:
        raise ValueError("not JSON (nested too deeply)") from None
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from None


def as_object(value: Any) -> dict[str, Any]:
    """`value` if it is a JSON object, else `ValueError`."""
    if not isinstance(value, dict):
        raise ValueError(f"a JSON object was expected, not {type(value).__name__}")
    return value


def field_of(record: dict[str, Any], name: str) -> Any:
    """A record's field; `ValueError` with the nearest name it has where it lacks this one."""
    if name not in record:
        raise ValueError(f"no field {name!r}{nearest(name, map(str, record))}")
    return record[name]


def check_text(text: Any, name: str) -> str:
    """`text` if it is a string of real characters, else `ValueError`."""
    if not isinstance(text, str):
        raise ValueError(f"field {name!r} is {type(text).__name__}, not a string")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"field {name!r} holds a lone surrogate, which is not text") from None
    return text


def numbered_lines(path: str) -> Iterator[tuple[int, bytes | None]]:
    """(line number, line) of a .jsonl or .jsonl.gz file; None for a line too long to hold."""
    for number, line in _numbered(Span(path, 0, Path(path).stat().st_size, 0)):
        yield number(), line


def read_lines(
    path: str, report: Report, parse: Callable[[bytes | None], Parsed]
) -> Iterator[tuple[str, Parsed]]:
    """(FILE:LINE, what it was parsed to) of each line that is not blank; bad ones are counted and left out.

    Args:
      path: of a text file, or one of .jsonl.gz.
      report: counts lines and bad lines.
      parse: what a line stands for (None is one too long to hold); a `ValueError` says what is bad in it.
    """
    for number, value in _parsed(Span(path, 0, Path(path).stat().st_size, 0), report, parse):
        yield f"{path}:{number()}", value


def _parsed(
    span: Span, report: Report, parse: Callable[[bytes | None], Parsed]
) -> Iterator[tuple[Callable[[], int], Parsed]]:
    for number, line in _numbered(span):
        report.lines += 1
        try:
            value = parse(line)
        except ValueError as error:
            report.add_bad(f"{span.path}:{number()}", str(error))
        else:
            yield number, value


def _numbered(span: Span) -> Iterator[tuple[Any, bytes | None]]:
    """(function that gives the line number, line) for the non-blank lines that begin in the span.

    The number is a function because, in the middle of a file, it costs a pass over what is before.
    """
    zipped = kind_of(span.path) == ".jsonl.gz"
    with open_source(span.path) as raw, gzip.open(raw) if zipped else raw as stream:
        here = 0
        if span.start and not zipped:
            stream.seek(span.start - 1)  # a line that begins exactly at the start is ours
            here = span.start - 1 + sum(map(len, _rest(stream)))
        count, begin = 0, here
        while zipped or here < span.end:
            try:
                line = stream.readline(DOCUMENT_BYTES)
                if not line:
                    return
                here += len(line)
                long = len(line) == DOCUMENT_BYTES and not line.endswith(b"\n")
                here += sum(map(len, _rest(stream))) if long else 0
            except (OSError, EOFError, zlib.error) as error:
                raise UserError(
                    f"{span.path} is damaged after line {count} ({error}); fetch it again."
                ) from None
            count += 1
            line = line.removeprefix(_BOM) if count == 1 and begin == 0 else line
            if long or line.strip():
                yield (lambda n=count: n + _lines_before(span.path, begin)), None if long else line


def _rest(stream: Any) -> Iterator[bytes]:
    """The rest of the current line, in pieces."""
    while piece := stream.readline(1 << 20):
        yield piece
        if piece.endswith(b"\n"):
            return


def _lines_before(path: str, offset: int) -> int:
    lines = 0
    if not offset:
        return lines  # as for every line of a file read from its beginning
    with open_source(path) as stream:
        while offset > 0 and (block := stream.read(min(offset, 1 << 22))):
            lines += block.count(b"\n")
            offset -= len(block)
    return lines


def _parquet(path: str) -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path} needs pyarrow, which is not installed; run `pip install pyarrow`.") from None
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a Parquet file ({error}); fetch it again.") from None


def _read_parquet(span: Span, field: str, report: Report) -> Iterator[str]:
    file = _parquet(span.path)
    names = file.schema_arrow.names
    require_known(field, names, f"{span.path} has no column {field!r}")
    row = sum(file.metadata.row_group(i).num_rows for i in range(span.start))
    groups = list(range(span.start, span.end))
    try:
        for batch in file.iter_batches(batch_size=256, row_groups=groups, columns=[field]):
            for value in batch.column(0):
                row += 1
                report.lines += 1
                try:
                    text = check_text(value.as_py(), field)
                except ValueError as error:  # UnicodeDecodeError is one
                    report.add_bad(f"{span.path}:row {row}", str(error))
                    continue
                if text:
                    yield text
                else:
                    report.empty += 1
    except OSError as error:
        raise UserError(f"{span.path} is damaged ({error}); fetch it again.") from None
