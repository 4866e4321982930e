"""Mistakes that their user can mend, each said in one sentence."""

from __future__ import annotations

import contextlib
import difflib
import errno
from collections.abc import Collection, Iterable, Iterator
from typing import Any


class UserError(ValueError):
    """A mistake its user can mend: the command line prints it as one sentence, with no traceback."""

    exit_code = 2


class NotFinite(UserError):
    """A model gives NaN or infinity where a result is due.

    Args:
      what: subject and verb of the sentence, such as `the loss is`.
    """

    exit_code = 3

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what} not finite (NaN or infinity): the model's parameters are damaged or its training "
            "diverged; take another checkpoint (--checkpoint), or train it again."
        )


def shown(value: Any, most: int = 80) -> str:
    """A value for a message: its beginning where it is long."""
    try:
        return f"{value!r:.{most}}"
    except ValueError:  # Python writes no integer of more than 4300 digits
        return f"an integer of {value.bit_length()} bits" if isinstance(value, int) else "a value"


MOST_LISTED = 100
"""Names in a message."""


def nearest(name: str, allowed: Iterable[str]) -> str:
    """A hint such as `; did you mean 'width'?`, or else what is allowed: of many names, a few."""
    names, name = sorted(allowed), name[:100]
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    if len(names) <= MOST_LISTED:
        return f"; allowed: {', '.join(names)}"
    some = difflib.get_close_matches(name, names, n=5, cutoff=0.0)
    return f"; allowed: {len(names):,} names, the nearest being {', '.join(some)}"


def require(condition: bool, message: str) -> None:
    """Raise `UserError(message)` unless the condition holds."""
    if not condition:
        raise UserError(message)


def require_known(name: Any, allowed: Collection[Any], message: str) -> None:
    """Raise `UserError(message)` with a hint unless the name is allowed; the hint is slow to find."""
    if name not in allowed:
        raise UserError(f"{message}{nearest(str(name), map(str, allowed))}")


@contextlib.contextmanager
def library_errors(what: str, fix: str) -> Iterator[None]:
    """Say in one sentence whatever a library makes of a damaged file.

    Libraries raise no class of their own, and a panic of Rust code is no `Exception` even.
    """
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{what} ({why:.300}); {fix}.") from None


_SPACE, _LIMIT = "free some space", "raise the limit of open files (`ulimit -n 65536`)"
_AGAIN = "look at the file system, or try again"
_FIXES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), _SPACE),
    errno.EFBIG: f"{_SPACE}, or raise the limit of a file's size (`ulimit -f`)",
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), _LIMIT),
    **dict.fromkeys((errno.EIO, errno.ESTALE, errno.ENOLCK, errno.ETIMEDOUT, errno.EBUSY), _AGAIN),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "check its rights"),
    errno.ENOMEM: "free some memory",
}


def system_fix(number: int | None) -> str:
    """What to do about an error of the operating system, by its number."""
    return _FIXES.get(number or 0, "check the path")
