"""Files that people name: found, each once, and opened, compressed or not; what reading them found.

A file's kind is the last part of its name, or the part before `.gz` or `.zst`.
"""

from __future__ import annotations

import glob
import gzip
import importlib
import logging
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import IO, Annotated, Any

import tyro

from jaxgpt.errors import UserError, require

log = logging.getLogger(__name__)

PACKED = (".gz", ".zst")
"""Endings of compressed files."""
REPORTED = 20
"""Bad lines named one by one; the rest are only counted."""
_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


def endings(*kinds: str) -> tuple[str, ...]:
    """The endings of files of these kinds, compressed ones too (Parquet compresses by itself)."""
    return tuple(kind + p for kind in kinds for p in ("", *PACKED) if not p or kind != ".parquet")


Sources = Annotated[
    list[str], tyro.conf.Positional, tyro.conf.arg(metavar="SOURCES", help_behavior_hint="(required)")
]
"""The argument of a command that names files, folders or globs."""
SUFFIXES = endings(".txt", ".jsonl", ".ndjson", ".parquet")
"""Of documents."""


def kind_of(path: str, suffixes: tuple[str, ...] = SUFFIXES) -> str:
    """The ending of a file of one of these kinds less its compression, `.jsonl` for `.ndjson`; else ""."""
    name = path.lower()
    if not name.endswith(suffixes):
        return ""
    plain = Path(name.removesuffix(packing_of(path))).suffix
    return ".jsonl" if plain == ".ndjson" else plain


def packing_of(path: str) -> str:
    """The ending of a compressed file, else an empty string."""
    return next((p for p in PACKED if path.lower().endswith(p)), "")


def total_size(files: Iterable[str]) -> int:
    """Bytes on disk of all files."""
    return sum(Path(f).stat().st_size for f in files)


# ----------------------------------------------------------------------------------------- finding


def expand(sources: Iterable[str | Path], suffixes: tuple[str, ...] = SUFFIXES) -> list[str]:
    """Files that names, globs and folders (searched to the bottom) stand for, sorted, each once.

    Files of other kinds in folders and globs are counted in one warning; so are those named twice, be it
    by a link or by another spelling.

    Raises:
      UserError: nothing there, a file of another kind, an empty or an unreadable file.
    """
    found, left = list[str](), Counter[str]()
    for source in map(str, sources):
        require(bool(source), "a source is empty; give files, folders or globs.")
        inside = _inside(source, suffixes)
        for name, kind in sorted(inside.items()):
            if kind:
                left[kind] += 1
            else:
                found.append(name)
        if all(inside.values()):
            held = f" (but {_counted(Counter(inside.values()))})" if inside else ""
            raise UserError(f"{source} holds no file ending in {spoken(suffixes)}{held}; name others.")
    require(bool(found), "no source is named; give files, folders or globs.")
    if left:
        say_once(f"{left.total()} files are of other kinds and are not read: {_counted(left)}")
    return _each_once(found)


def spoken(suffixes: tuple[str, ...]) -> str:
    """Endings as words, those of compressed files together."""
    plain = ", ".join(s for s in suffixes if not s.endswith(PACKED))
    return f"{plain} (or these and {', '.join(PACKED)})" if len(plain) < len(", ".join(suffixes)) else plain


def _counted(kinds: Counter[str]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(8))


@lru_cache(maxsize=1024)
def say_once(message: str) -> None:
    """Warn, but once in a process, however often a file is read."""
    log.warning("%s", message)


def _inside(source: str, suffixes: tuple[str, ...]) -> dict[str, str]:
    """Each file that a source stands for -> what keeps it from being read, "" for nothing."""
    path = os.path.expanduser(source)
    if os.path.lexists(path) or not glob.has_magic(path):
        info = _look(path, source)
        if not stat.S_ISDIR(info.st_mode):
            _check_regular(info, source)
            require(
                path.lower().endswith(suffixes),
                f"{source} is of a kind this command does not read; use {spoken(suffixes)}.",
            )
            return {path: ""}
        return dict(_walk(path, suffixes, set()))
    matches = glob.glob(path, recursive=True)
    if not matches:
        folder = path[: next(i for i in range(len(path)) if glob.has_magic(path[: i + 1]))]
        folder = os.path.dirname(folder) or "."
        require(stat.S_ISDIR(_look(folder, folder).st_mode), f"{folder} is not a folder; name another.")
        _list(folder)
        raise UserError(f"{source} matches no file; name others.")
    found: dict[str, str] = {}
    for name in matches:
        if Path(name).is_dir():
            found |= {} if "**" in path else dict(_walk(name, suffixes, set()))
        else:
            found[name] = _why_not(name, suffixes)
    return found


def _walk(folder: str, suffixes: tuple[str, ...], above: set[tuple[int, int]]) -> Iterator[tuple[str, str]]:
    """The files of a folder and of those below it, links to folders too; hidden ones are left out."""
    info = Path(folder).stat()
    here = (info.st_dev, info.st_ino)
    if here in above:  # a link back
        return
    for name in _list(folder):
        path = str(Path(folder) / name)
        if name.startswith("."):
            continue
        if Path(path).is_dir():
            yield from _walk(path, suffixes, above | {here})
        else:
            yield path, _why_not(path, suffixes)


def _list(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise UserError(
            f"folder {folder} cannot be listed ({error.strerror}); change its rights or leave it out."
        ) from None


def _why_not(path: str, suffixes: tuple[str, ...]) -> str:
    """What keeps a file of a folder or glob from being read: its ending, or what it is; else ""."""
    if not path.lower().endswith(suffixes):
        name = Path(path.lower().removesuffix(packing_of(path))).suffix + packing_of(path)
        return name or "without an ending"
    try:
        _check_regular(_look(path, path), path)
    except UserError as error:
        return str(error).removeprefix(f"{path} is ").partition(";")[0]
    return ""


def _look(path: str, said: str) -> os.stat_result:
    """What stands at a path; `UserError` saying why where nothing can be read."""
    try:
        return Path(path).stat()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        why = getattr(error, "strerror", None) or str(error)
        if isinstance(error, FileNotFoundError) and not os.path.lexists(path):
            raise UserError(f"{said} does not exist; check the path.") from None
        if os.path.lexists(path):
            target = Path(path).readlink()
            raise UserError(f"{said} is a broken link (to {target}: {why}); fix or remove it.") from None
        raise UserError(f"{said!r} cannot be looked at ({why}); check the path and its rights.") from None


def _check_regular(info: os.stat_result, said: str) -> None:
    kind = _KINDS.get(stat.S_IFMT(info.st_mode))
    require(kind is None, f"{said} is {kind}, not a file; write what it gives into a file first.")


def file_key(path: str) -> tuple[int, int]:
    """What is the same for all names of one file."""
    info = Path(path).stat()
    return info.st_dev, info.st_ino


def _each_once(found: list[str]) -> list[str]:
    """The files sorted, one for each that there is on the disk; checks that something is in each."""
    kept, again, named = dict[tuple[int, int], str](), list[str](), Counter(found)
    for name in sorted(named):
        with open_raw(name) as stream:
            require(bool(stream.read(1)), f"{name} is empty; remove it or fill it.")
        if kept.setdefault(file_key(name), name) != name or named[name] > 1:
            again.append(name)
    if again:
        few = ", ".join(again[:3]) + (f" and {len(again) - 3} more" if len(again) > 3 else "")
        say_once(f"named more than once and read once: {few}")
    return list(kept.values())


# ----------------------------------------------------------------------------------------- opening


def open_raw(path: str) -> IO[bytes]:
    """The file opened for reading its bytes as they are; `UserError` saying why where it cannot be."""
    try:
        return open(path, "rb")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check the path and its rights.") from None


def open_source(path: str) -> IO[bytes]:
    """The file opened for reading bytes, decompressed by its ending; `UserError` where it cannot be."""
    raw, packing = open_raw(path), packing_of(path)
    if not packing:
        return raw
    raw.close()
    opened: Any = gzip.open(path, "rb") if packing == ".gz" else _zstd(path).open(path, "rb")  # noqa: SIM115
    return opened


def read_all(path: str) -> bytes:
    """A whole file, decompressed; `UserError` where it cannot be read."""
    with open_source(path) as stream:
        try:
            return stream.read()
        except Exception as error:
            raise damage(path, error) from None


def damage(path: str, error: Exception, after: str = "") -> UserError:
    """What to raise where the library that decompresses a file raised `error`; each has its own classes."""
    return UserError(f"{path} is damaged{after} ({error}); fetch it again.")


def _zstd(path: str) -> Any:
    for name in ("compression.zstd", "backports.zstd"):  # the former since Python 3.14
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise UserError(
        f"{path} needs a Zstandard library, which is not installed; run `pip install 'jaxgpt[zstd]'`, or "
        "decompress the file."
    )


# --------------------------------------------------------------------------------------- reporting


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

    def check(self, max_bad: float, fix: str = "fix them or raise --max-bad") -> None:
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
