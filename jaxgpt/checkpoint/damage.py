"""What a checkpoint that cannot be read means: damage, a mismatch, or something that says nothing of it.

Only damage lets a step be set aside: files are missing or cannot be decoded, or hold other numbers than
were saved. A checkpoint that is whole but of another structure than the config's is refused with both
named. What the machine lacked (memory, file descriptors, rights, a file server) is the machine's.
"""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import Any

import jax

from jaxgpt.checkpoint.checksum import Leaves
from jaxgpt.errors import UserError

_OF_FILES = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL)
"""Errors of the system that mean that files are missing, or that others name them wrongly."""
_PASSING = re.compile(
    r"(RESOURCE_EXHAUSTED|UNAVAILABLE|DEADLINE_EXCEEDED|PERMISSION_DENIED|ABORTED|CANCELLED):"
)
"""How TensorStore begins what says nothing of the files."""
_SHOWN = 3
"""Arrays named in one sentence."""

Shapes = dict[str, tuple[tuple[int, ...], str]]
"""Shape and type by path."""


class Damaged(Exception):
    """Files of a checkpoint are missing or undecodable, or hold other numbers than were saved."""


def errno_of(error: BaseException | None) -> int | None:
    """The operating system's number of an error, or of what caused it; TensorStore writes it into words."""
    while error is not None:
        if isinstance(error, OSError) and error.errno:
            return error.errno
        if found := re.search(r"os_error_code='(\d+)'|\[OS error (\d+)", str(error)):
            return int(found[1] or found[2])
        error = error.__cause__ or error.__context__
    return None


def as_damage(error: Exception, where: Path) -> Exception:
    """`Damaged`, or what is to be raised instead, for an error that reading raised.

    Args:
      error: of a library.
      where: what was read.
    """
    number = errno_of(error)
    if number in _OF_FILES or (number is None and isinstance(error, FileNotFoundError)):
        return Damaged(first_line(error))
    if number is not None:
        return OSError(number, os.strerror(number), str(where))
    if isinstance(error, MemoryError | OSError | jax.errors.JaxRuntimeError) or _PASSING.match(str(error)):
        return error
    return Damaged(f"{type(error).__name__}: {first_line(error)}")


def first_line(error: BaseException) -> str:
    """The first line of what an error says."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def require_fit(held: Shapes, wanted: Shapes, what: str) -> None:
    """Refuse a whole checkpoint of another structure, naming the arrays that differ.

    Raises:
      UserError: the paths, shapes or types are not the same.
    """
    if held == wanted:
        return
    differ = [
        f"{path} is {_named(held.get(path))} there and {_named(wanted.get(path))} here"
        for path in sorted(held.keys() | wanted.keys())
        if held.get(path) != wanted.get(path)
    ]
    more = f" and {len(differ) - _SHOWN} more" if len(differ) > _SHOWN else ""
    raise UserError(
        f"{what} is whole but of another structure than this config and code make: "
        f"{'; '.join(differ[:_SHOWN])}{more} ({len(held)} arrays there, {len(wanted)} here); it is left as "
        "it is: bring back the config and the versions that made it (config.json names them), or give this "
        "run another name."
    )


def _named(leaf: tuple[tuple[int, ...], str] | None) -> str:
    return f"{leaf[1]}[{', '.join(map(str, leaf[0]))}]" if leaf else "absent"


def not_finite(leaves: Leaves) -> str:
    """Names the arrays that hold NaN or infinity, empty where none does."""
    bad = [f"{path} ({leaf.bad:,})" for path, leaf in leaves.items() if leaf.bad]
    return ", ".join(bad[:_SHOWN]) + (f" and {len(bad) - _SHOWN} more arrays" if len(bad) > _SHOWN else "")


def changed(found: Leaves, saved: Leaves) -> str:
    """Names the arrays whose checksums are not those that were saved, empty where none is."""
    differ: list[Any] = [path for path, leaf in found.items() if leaf.sum != saved[path].sum]
    return ", ".join(differ[:_SHOWN]) + (f" and {len(differ) - _SHOWN} more" if len(differ) > _SHOWN else "")
