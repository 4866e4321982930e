"""A log of what was let through and why, as JSON lines that are chained by hashes.

Each line holds its number and the SHA-256 of the line before, so that a line that was changed, removed,
added or moved breaks the chain from there on. Beside the log, `FILE.head` holds the number and hash of the
last line, so that missing lines at the end show too. Who can write both files can forge both: a hash that was
written down elsewhere (as `jaxgpt serve audit verify` prints it) is the only proof against that.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import hashlib
import itertools
import os
import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypedDict, TypeVar

import msgspec

from jaxgpt.errors import UserError, require
from jaxgpt.files import Count, parse_json, to_json
from jaxgpt.lock import owned

Digest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
NOTHING = "0" * 64
"""The hash before the first line."""
_FIX = "restore it from a copy"
_CLOSE_ON_EXEC = getattr(os, "O_CLOEXEC", 0)


class Head(NamedTuple):
    """The last line of a log: its number, from 1, and its hash."""

    number: int
    digest: str

    def __str__(self) -> str:
        return f"{self.number}:{self.digest}"


START = Head(0, NOTHING)


class Link(TypedDict):
    """What every line holds; the rest is the record."""

    number: Count
    time: str
    previous: Digest


def read_head(text: str, where: str) -> Head:
    """The head that `NUMBER:HASH` means.

    Raises:
      UserError: it is none.
    """
    found = re.fullmatch(r"(\d{1,15}):([0-9a-f]{64})\s*", text)
    if not found:
        raise UserError(
            f"{where} is {text!r:.100}; it must be NUMBER:HASH, as `jaxgpt serve audit verify` prints."
        )
    return Head(int(found[1]), found[2])


def _digest(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()


class AuditLog:
    """A log that one process appends to; each line is on the disk when `append` returns.

    It goes on where it ended, also after the file was moved away or emptied (`logrotate`, with or without
    `copytruncate`), in a running process and between two: the chain then goes on in a new file. A line that a
    crash cut short is dropped, since nobody was told that it was written.

    Args:
      path: of the log.

    Raises:
      UserError: another process writes to it, or it is damaged.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._guard = path, threading.Lock()
        with contextlib.ExitStack() as stack:
            stack.enter_context(owned(path.with_name(f"{path.name}.lock")))
            self.head = self._last()
            self._file = self._open()
            self._held = stack.pop_all()

    def append(self, record: dict[str, Any]) -> None:
        """Write a line.

        Raises:
          OSError: it cannot be written; the log is as it was.
        """
        with self._guard:
            size = self._follow()
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
            link = {"number": self.head.number + 1, "time": now, "previous": self.head.digest}
            line = to_json({**link, **record}).encode("utf-8", "replace")
            try:
                written = os.write(self._file, line + b"\n")
                if written <= len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
                os.fsync(self._file)
            except OSError:
                os.ftruncate(self._file, size)
                raise
            self.head = Head(self.head.number + 1, _digest(line))
            self._write_head()

    def close(self) -> None:
        """Let another process write to it."""
        os.close(self._file)
        self._held.close()

    def _open(self) -> int:
        file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | _CLOSE_ON_EXEC, 0o640)
        folder = os.open(self._path.parent, os.O_RDONLY | _CLOSE_ON_EXEC)
        try:
            os.fsync(folder)  # so that a new file's name is there after a crash too
        finally:
            os.close(folder)
        return file

    def _follow(self) -> int:
        """Bytes of the file, which is opened anew if it was moved."""
        own = os.fstat(self._file)
        with contextlib.suppress(FileNotFoundError):
            there = self._path.stat()
            if (there.st_dev, there.st_ino) == (own.st_dev, own.st_ino):
                return own.st_size
        os.close(self._file)
        self._file = self._open()
        return os.fstat(self._file).st_size

    def _write_head(self) -> None:
        place = _head_of(self._path)
        file = os.open(place, os.O_WRONLY | os.O_CREAT, 0o640)
        try:
            os.pwrite(file, f"{self.head.number:015d}:{self.head.digest}\n".encode(), 0)
        finally:
            os.close(file)

    def _last(self) -> Head:
        """Where the log ended, after a line that was cut short is dropped."""
        noted = _noted(self._path)
        if not self._path.exists():
            return noted  # moved away
        with open(self._path, "r+b") as file:
            whole, last = _last_line(file)
            file.truncate(whole)
        if last is None:
            return noted  # emptied
        head = Head(_link(last, str(self._path))["number"], _digest(last))
        fits = noted == head if noted.number == head.number else noted.number < head.number
        require(
            fits,
            f"{self._path} ends at number {head.number}, but {_head_of(self._path)} says {noted}: lines are "
            "missing; keep both as evidence, and begin another log.",
        )
        return head


def _head_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.head")


def _noted(path: Path) -> Head:
    """The last line of a log as `FILE.head` says."""
    place = _head_of(path)
    return read_head(place.read_text(), str(place)) if place.exists() else START


def _last_line(file: Any) -> tuple[int, bytes | None]:
    """Bytes of the whole lines of a file, and the last of these without its end."""
    size = file.seek(0, os.SEEK_END)
    tail = b""
    while size and tail.count(b"\n") < 2:
        step = min(size, 2**16)
        size = file.seek(size - step)
        tail = file.read(step) + tail
    lines = tail.split(b"\n")
    if len(lines) < 2:
        return 0, None
    return size + len(tail) - len(lines[-1]), lines[-2]


# ------------------------------------------------------------------------------------------ verifying


class Verified(NamedTuple):
    """What a log holds.

    Attributes:
      first: the line before its first: where it begins.
      head: its last line.
    """

    first: Head
    head: Head


class Tampered(UserError):
    """A log is not as it was written."""

    exit_code = 6


def verify(paths: Sequence[Path], known: Head = START) -> Verified:
    """Whether logs are as they were written.

    Args:
      paths: a log's files in order, the oldest first.
      known: a line that they must hold, as it was written down elsewhere.

    Raises:
      Tampered: naming the first line that is not, or the first that is missing.
      UserError: a file cannot be read.
    """
    noted = _noted(paths[-1])  # before the log, which may grow
    first, head, before = START, START, ""
    lines = _ahead(line for path in paths for line in _lines(path))
    for (place, line), after in lines:
        link = _link(line, place)
        said = Head(link["number"] - 1, link["previous"])
        if not before:
            first = head = said
            _check(said.number > 0 or said == START, f"{place} is no first line")
        _check(
            said.number == head.number, f"{place} is number {said.number + 1} where {head.number + 1} is due"
        )
        head, expected = Head(link["number"], _digest(line)), head
        whole = after is None or _link(after[1], after[0])["previous"] == head.digest
        _check(said == expected, f"{before if whole else place} is not as it was written")
        for one in (known, noted):
            _check(one.number != head.number or one == head, f"{place} is not as it was written ({one})")
        before = place
    for one in (known, noted):
        _check(
            one.number <= head.number,
            f"{paths[-1]} ends at number {head.number}, but {one.number} lines were written (name the older "
            "files before it, if it was rotated)",
        )
    _check(not known.number or known.number > first.number, f"{paths[0]} begins behind number {known.number}")
    return Verified(first, head)


def _check(holds: bool, what: str) -> None:
    if not holds:
        raise Tampered(f"{what}: the log was tampered with or damaged; {_FIX}.")


T = TypeVar("T")


def _ahead(items: Iterable[T]) -> Iterator[tuple[T, T | None]]:
    """Each with the one after it."""
    items, after = itertools.tee(items)
    next(after, None)
    return zip(items, itertools.chain(after, [None]), strict=False)


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """Lines of a file without their ends, and where each stands."""
    require(path.is_file(), f"{path} is no file; name an audit log.")
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            place = f"{path}:{number}"
            _check(line.endswith(b"\n"), f"{place} is cut short")
            yield place, line[:-1]


def _link(line: bytes, place: str) -> Link:
    try:
        return parse_json(line, Link, place, _FIX, once=True)
    except UserError:
        raise Tampered(f"{place} is no line of an audit log; {_FIX}.") from None
