"""Lines of text files and the JSON in them, one line in memory at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import IO, Any, TypeVar

from jaxgpt.data.sources import Report, damage, open_source, packing_of
from jaxgpt.errors import nearest

Parsed = TypeVar("Parsed")

LINE_BYTES = 64 << 20
"""A longer line is a bad line; of it no more than this is ever in memory."""
_BOM = b"\xef\xbb\xbf"
_STEPS = re.compile(r"[^.\[\]]+(?:\.[^.\[\]]+|\[\d+\])*")
_STEP = re.compile(r"\[(\d+)\]|([^.\[\]]+)")


def numbered_lines(path: str) -> Iterator[tuple[int, bytes | None]]:
    """(line number, line) for the lines that are not blank; None for a line too long to hold.

    Raises:
      UserError: the file cannot be read.
    """
    for number, line in _numbered(path, 0, None):
        yield number(), line


def _numbered(path: str, start: int, end: int | None) -> Iterator[tuple[Callable[[], int], bytes | None]]:
    """The same for lines that begin in [start, end); a compressed file is read whole.

    The number is a function because, in the middle of a file, it costs a pass over what is before.
    """
    with open_source(path) as stream:
        here = 0
        if start and not packing_of(path):
            stream.seek(start - 1)  # a line that begins exactly at the start is ours
            here = start - 1 + sum(map(len, _rest(stream)))
        count, begin = 0, here
        while end is None or packing_of(path) or here < end:
            try:
                line = stream.readline(LINE_BYTES)
                if not line:
                    return
                here += len(line)
                long = len(line) == LINE_BYTES and not line.endswith(b"\n")
                if long:
                    line = b""
                    here += sum(map(len, _rest(stream)))
            except Exception as error:
                raise damage(path, error, f" after line {count}") from None
            count += 1
            line = line.removeprefix(_BOM) if count == 1 and begin == 0 else line
            if long or line.strip():
                yield (lambda n=count: n + _lines_before(path, begin)), None if long else line


def _rest(stream: IO[bytes]) -> Iterator[bytes]:
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


def read_lines(
    path: str, report: Report, parse: Callable[[bytes | None], Parsed]
) -> Iterator[tuple[str, Parsed]]:
    """(FILE:LINE, what it was parsed to) of each line that is not blank; bad ones are counted and left out.

    Args:
      path: of a file of lines.
      report: counts lines and bad lines.
      parse: what a line stands for (None is one too long to hold); a `ValueError` says what is bad in it.
    """
    for number, value in _parsed(path, report, parse, 0, None):
        yield f"{path}:{number()}", value


def read_range(
    path: str, report: Report, parse: Callable[[bytes | None], Parsed], start: int, end: int
) -> Iterator[Parsed]:
    """`read_lines` of the lines that begin at the bytes [start, end), without where they stand."""
    for _, value in _parsed(path, report, parse, start, end):
        yield value


def _parsed(
    path: str, report: Report, parse: Callable[[bytes | None], Parsed], start: int, end: int | None
) -> Iterator[tuple[Callable[[], int], Parsed]]:
    for number, line in _numbered(path, start, end):
        report.lines += 1
        try:
            value = parse(line)
        except ValueError as error:
            report.add_bad(f"{path}:{number()}", str(error))
        else:
            yield number, value


# ------------------------------------------------------------------------------------------- values


def decode_line(line: bytes | None) -> str:
    """The text of a line; `ValueError` with a short reason."""
    if line is None:
        raise ValueError(f"the line is longer than {LINE_BYTES >> 20} MiB")
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte 0x{line[error.start]:02x} at column {error.start + 1})") from None


def parse_line(line: bytes | None) -> Any:
    """The JSON value of a line; `ValueError` with a short reason."""
    text = decode_line(line)
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("not JSON (nested too deeply)") from None
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from None


def kind_name(value: Any) -> str:
    """What a JSON value is, for messages."""
    return "null" if value is None else type(value).__name__


def as_object(value: Any) -> dict[str, Any]:
    """`value` if it is a JSON object, else `ValueError`."""
    if not isinstance(value, dict):
        raise ValueError(f"a JSON object was expected, not {kind_name(value)}")
    return value


def field_of(record: dict[str, Any], name: str) -> Any:
    """A record's field; `ValueError` with the nearest name it has where it lacks this one.

    Args:
      record: to look in.
      name: of the field; else a path such as `a.b` or `messages[1].content`.
    """
    if name in record:
        return record[name]
    steps = _STEP.findall(name) if _STEPS.fullmatch(name) else [("", name)]
    value: Any = record
    for depth, (index, key) in enumerate(steps):
        if index and isinstance(value, list) and int(index) < len(value):
            value = value[int(index)]
        elif key and isinstance(value, dict) and key in value:
            value = value[key]
        elif key and isinstance(value, dict):
            raise ValueError(f"no field {name!r}{nearest(key, map(str, value))}")
        else:
            held = f"list of {len(value)}" if index and isinstance(value, list) else kind_name(value)
            raise ValueError(f"no field {name!r}: step {depth} of it is {held}")
    return value


def check_text(text: Any, name: str) -> str:
    """`text` if it is a string of real characters, else `ValueError`."""
    if not isinstance(text, str):
        raise ValueError(f"field {name!r} is {kind_name(text)}, not a string")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"field {name!r} holds a lone surrogate, which is not text") from None
    return text
