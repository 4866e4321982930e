"""One process owns a folder for as long as it lives."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

from jaxgpt.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

log = logging.getLogger(__name__)

LOCK = ".lock"
"""The file in a folder that is locked, and says by whom."""
_TAKEN = (errno.EACCES, errno.EAGAIN)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_held: set[Path] = set()
"""Folders of this process: the system's lock does not keep a process from itself."""


@contextlib.contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Own a folder, which is made where it is not there.

    By a POSIX lock of `LOCK` in it: the system lets go of it whenever the process ends, it holds between
    hosts of a shared file system, and child processes do not inherit it. The file says who has it.

    Raises:
      UserError: another process owns it, by its host and number.
    """
    folder.mkdir(parents=True, exist_ok=True)
    place = folder.resolve()
    if place in _held:  # opening and closing the file once more would let go of the lock
        raise _taken(folder, f"{socket.gethostname()} {os.getpid()}")
    file = os.open(place / LOCK, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o644)
    try:
        _lock(file, folder)
        _held.add(place)
        _write(file, f"{socket.gethostname()} {os.getpid()}\n")
        yield
        _write(file, "")
    finally:
        _held.discard(place)
        os.close(file)


def _lock(file: int, folder: Path) -> None:
    if fcntl is None:
        return
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _TAKEN:
            raise _taken(folder, os.read(file, 300).decode(errors="replace")) from None
        if error.errno not in _NO_LOCKS:
            raise
        log.warning("%s: its file system has no locks; start no second process there", folder)


def _taken(folder: Path, owner: str) -> UserError:
    found = re.fullmatch(r"([\w.-]{1,255}) (\d{1,10})\s*", owner)
    who = f"process {found[2]} on {found[1]}" if found else "another process"
    return UserError(f"{folder} is in use by {who}; wait for it, stop it, or name another folder.")


def _write(file: int, words: str) -> None:
    with contextlib.suppress(OSError):  # a full disk: the lock holds without words
        os.ftruncate(file, 0)
        os.pwrite(file, words.encode(), 0)
