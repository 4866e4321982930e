"""Mistakes that their user can mend, each said in one sentence."""

from __future__ import annotations

import contextlib
import difflib
import errno
import re
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
    """A hint such as `; did you mean 'width'?`, or else what is allowed: of many names, a few like it."""
    names, name = sorted(allowed), name[:100]
    if hint := did_you_mean(name, names):
        return f"; {hint}"
    if len(names) <= MOST_LISTED:
        return f"; allowed: {', '.join(names)}"
    some = difflib.get_close_matches(name, names, n=5)
    return f"; allowed: {len(names):,} names" + (f", such as {', '.join(some)}" if some else "")


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """`did you mean 'width'?` where some of the names are near (at most three), else nothing."""
    near = [repr(one) for one in near_names(name, names)[:3]]
    return f"did you mean {' or '.join(filter(None, (', '.join(near[:-1]), near[-1])))}?" if near else ""


def near_names(name: str, names: Iterable[str]) -> list[str]:
    """The names that someone who wrote `name` may have meant, the nearest ones alone.

    Those are, in this order: names that are the same but for case, dashes and the groups before their last
    dot; names a few slips of the finger away; names that begin with it or have it as one of their words.
    """
    asked, own = _plain(name), _plain(name).rpartition(".")[2]
    most = 0 if len(own) < 3 else 1 if len(own) < 6 else 2 if len(own) < 12 else 3
    ranked: dict[str, int] = {}
    for other in names:
        whole = _plain(other)
        last = whole.rpartition(".")[2]
        if asked == whole or own == last:
            ranked[other] = 0 if asked == whole else 1
            continue
        slips = min(_slips(asked, whole, most), _slips(own, last, most) if "." not in asked else most + 1)
        if slips <= most:
            ranked[other] = 1 + slips
        elif len(own) > 2 and (last.startswith(own) or own in re.split(r"[_. ]", last)):
            ranked[other] = 9
    return [other for other, rank in ranked.items() if rank == min(ranked.values())]


def same_name(a: str, b: str) -> bool:
    """Whether two names differ in nothing but case, dashes and the groups before their last dot."""
    return _plain(a).rpartition(".")[2] == _plain(b).rpartition(".")[2]


def _plain(name: str) -> str:
    return name.lstrip("-").replace("-", "_").casefold()


def _slips(a: str, b: str, most: int) -> int:
    """Characters put in, left out, replaced, or exchanged with their neighbours; `most` + 1 for more."""
    if abs(len(a) - len(b)) > most:
        return most + 1
    before, row = list[int](), list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        older, before, row = before, row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (x != y)))
            if i > 1 and j > 1 and (x, a[i - 2]) == (b[j - 2], y):
                row[-1] = min(row[-1], older[j - 2] + 1)
    return min(row[-1], most + 1)


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
