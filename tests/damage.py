"""Folders damaged at random: what hypothesis draws is a list of edits, which `apply` makes in a copy.

@given(st.data())
def test(data):
    with damaged_copy(good, data.draw(damaged(good))) as folder:
        ...  # read it: right, or a UserError of one line
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import note
from hypothesis import strategies as st

from jaxgpt.errors import UserError

_VALUES = (
    "null", "true", "false", "0", "1", "-1", "2.5", "1e999", "NaN", "1000000000000", "4294967296",
    '""', '"x"', '"\\ud800"', '"a\\nb"', '"../../etc/passwd"', '"/dev/zero"', "[]", "{}", "[null]", "[[1]]",
    '{"a": 1}', '{"": []}', "[0, 1, 2, 3]",
)  # fmt: skip
VALUES = {value: value for value in _VALUES} | {
    "400 digits": "9" * 400,
    "300 deep": "[" * 300 + "]" * 300,
    "100,000 deep": "[" * 100_000 + "]" * 100_000,
}
"""JSON to put in place of other JSON, by its name; some of it is none."""
HOLE = "<the hole>"
MOST = 6
"""Entries of a list or an object whose insides are changed: the first and the last."""


class Edit(NamedTuple):
    """A change of one file: a kind of `_KINDS`, where in the file, and what stands there then."""

    kind: str
    name: str
    at: Any = None
    new: Any = None


@functools.cache
def damaged(folder: Path, most: int = 2) -> st.SearchStrategy[list[Edit]]:
    """Lists of at most `most` edits of the files of a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return st.lists(st.one_of([_edit(folder, path) for path in files]), min_size=1, max_size=most)


def apply(folder: Path, edits: list[Edit]) -> None:
    """Make the edits in a folder; what one has removed another leaves alone."""
    for kind, name, at, new in edits:
        path = folder / name
        if path.is_file():
            _KINDS[kind](path, at, new)


@contextlib.contextmanager
def damaged_copy(folder: Path, edits: list[Edit]) -> Iterator[Path]:
    """A copy of the folder, under its own name, with the edits made."""
    if edits:
        note("\n".join(map(repr, edits)))
    with tempfile.TemporaryDirectory() as work:
        copy = Path(work) / folder.name
        shutil.copytree(folder, copy)
        apply(copy, edits)
        yield copy


@contextlib.contextmanager
def right_or_refused() -> Iterator[None]:
    """Nothing but a `UserError` of one line may be raised."""
    try:
        yield
    except UserError as error:
        said = str(error)
        assert said and "\n" not in said and len(said) < 4000, said
        said.encode("ascii", "backslashreplace")


# ------------------------------------------------------------------------------------------ edits


def _edit(folder: Path, path: Path) -> st.SearchStrategy[Edit]:
    name, size = str(path.relative_to(folder)), path.stat().st_size
    plain = st.sampled_from(["remove", "empty", "folder", "garbage"])
    kinds = [plain.map(lambda kind: Edit(kind, name))]
    if size:
        places = st.integers(0, size - 1)
        kinds.append(places.map(lambda at: Edit("cut", name, at)))
        kinds.append(st.tuples(places, st.integers(0, 7)).map(lambda made: Edit("flip", name, *made)))
    data = path.read_bytes()
    for kind, text in (("json", data), ("line", data.split(b"\n")[0]), ("header", _header(data))):
        with contextlib.suppress(ValueError):
            changes = st.tuples(st.sampled_from(_places(json.loads(text))), st.sampled_from((None, *VALUES)))
            kinds += 3 * [
                changes.map(lambda made, kind=kind: Edit(kind, name, *made))
            ]  # the more telling ones
            break
    return st.one_of(kinds)


def _places(value: Any, place: tuple = ()) -> list[tuple]:
    """Where a JSON value may be changed: itself, and its parts."""
    found = [place]
    items = list(
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, part in items if len(items) <= 4 * MOST else items[:MOST] + items[-MOST:]:
        found += _places(part, (*place, key))
    return found


def _changed(value: Any, place: tuple, new: str | None) -> bytes:
    """JSON with one part replaced by JSON text, or removed."""
    if not place:
        return b"" if new is None else VALUES[new].encode()
    *inner, last = place
    part = value
    for key in inner:
        part = part[key]
    if new is None:
        del part[last]
    else:
        part[last] = HOLE
    return json.dumps(value).replace(json.dumps(HOLE), VALUES[new] if new else "").encode()


_CHANGED = (ValueError, LookupError, TypeError, RecursionError)
"""What comes of an edit of JSON that an edit before has changed."""


def _json(path: Path, at: tuple, new: str | None) -> None:
    with contextlib.suppress(*_CHANGED):
        path.write_bytes(_changed(json.loads(path.read_bytes()), at, new))


def _line(path: Path, at: tuple, new: str | None) -> None:
    with contextlib.suppress(*_CHANGED):
        first, *rest = path.read_bytes().split(b"\n")
        path.write_bytes(b"\n".join([_changed(json.loads(first), at, new), *rest]))


def _header(data: bytes) -> bytes:
    """The JSON that a safetensors file begins with."""
    return data[8 : 8 + int.from_bytes(data[:8], "little")] if data[8:9] == b"{" else b""


def _safetensors(path: Path, at: tuple, new: str | None) -> None:
    data = path.read_bytes()
    old = _header(data)
    with contextlib.suppress(*_CHANGED):
        made = _changed(json.loads(old), at, new)
        path.write_bytes(len(made).to_bytes(8, "little") + made + data[8 + len(old) :])


def _flip(path: Path, at: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    if at < len(data):
        data[at] ^= 1 << bit
        path.write_bytes(data)


def _to_folder(path: Path, at: None, new: None) -> None:
    path.unlink()
    path.mkdir()


_KINDS = {
    "remove": lambda path, at, new: path.unlink(),
    "empty": lambda path, at, new: path.write_bytes(b""),
    "garbage": lambda path, at, new: path.write_bytes(bytes(range(256)) * 4),
    "folder": _to_folder,
    "cut": lambda path, at, new: os.truncate(path, at),
    "flip": _flip,
    "json": _json,
    "line": _line,
    "header": _safetensors,
}
