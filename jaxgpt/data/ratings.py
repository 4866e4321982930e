"""Ratings of items by users in MovieLens's layouts, and their leave-last-out split."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from jaxgpt.data.lines import LINE_BYTES, read_lines
from jaxgpt.data.sources import Report, endings, kind_of
from jaxgpt.data.tables import TABLES, named_rows

SUFFIXES = (*TABLES, *endings(".dat"))
"""Of ratings and items: tables with a header, or MovieLens 1M's lines with `::` between their cells."""
MIN_LIKED = 4
"""Items that a user must have liked to be asked about: one as history, one for each split."""


class Rating(NamedTuple):
    """What a user gave an item."""

    time: float
    where: str
    item: str
    value: float


def rows_of(
    path: str, report: Report, names: Sequence[str], header: Sequence[str] = ()
) -> Iterator[tuple[str, dict[str, str]]]:
    """(where it stands, name to cell) of each row.

    Args:
      path: of a .csv, .tsv or .dat file.
      report: counts rows and bad rows.
      names: of the cells of a .dat file, in their order.
      header: see `tables.named_rows`.

    Raises:
      UserError: it cannot be read.
    """
    if kind_of(path, SUFFIXES) != ".dat":
        yield from named_rows(path, report, header)
        return
    for where, cells in read_lines(path, report, _cells):
        if len(cells) == len(names):
            yield where, dict(zip(names, cells, strict=True))
        else:
            report.add_bad(where, f"{len(cells)} cells, not {', '.join(names)}")


def _cells(line: bytes | None) -> list[str]:
    if line is None:
        raise ValueError(f"the line is longer than {LINE_BYTES >> 20} MiB")
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError:
        text = line.decode("latin-1")  # as MovieLens 1M has its titles
    return text.rstrip("\r\n").split("::")


def read_ratings(
    path: str, report: Report, names: tuple[str, str, str, str], header: Sequence[str] = ()
) -> dict[str, list[Rating]]:
    """The ratings of each user in order of time; those of one time stay in the order of the file.

    Args:
      path: of a .csv, .tsv or .dat file.
      report: counts rows and bad rows.
      names: of the user, the item, the rating and its time.
      header: see `tables.named_rows`.

    Raises:
      UserError: it cannot be read.
    """
    user_at, item_at, value_at, time_at = names
    users: dict[str, list[Rating]] = {}
    for where, row in rows_of(path, report, names, header):
        try:
            user, item = _text(row, user_at), _text(row, item_at)
            time, value = (_number(_text(row, name), name) for name in (time_at, value_at))
        except ValueError as error:
            report.add_bad(where, str(error))
            continue
        users.setdefault(user, []).append(Rating(time, where, item, value))
    for rated in users.values():
        rated.sort(key=lambda one: one.time)
    return users


def _text(row: dict[str, str], name: str) -> str:
    if name not in row:
        raise ValueError(f"no column {name!r}")
    if not row[name].strip():
        raise ValueError(f"field {name!r} is empty")
    return row[name]


def _number(text: str, name: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"field {name!r} is {text}")
    return value


def leave_last_out(
    users: dict[str, list[Rating]], *, liked: float, negatives: int, beside: int, most: int, seed: int
) -> dict[str, list[dict[str, Any]]]:
    """Records `user`, `history`, `candidate`, `click` of each split.

    The last item that a user liked is asked for in `test`, the one before in `validation`, those before that
    in `train`, each after what was liked before it. Beside it stand items that the user never rated, drawn
    evenly; candidates are in an order of chance, so that ties favour none.

    Args:
      users: the ratings of each.
      liked: ratings from here on are clicks.
      negatives: items drawn beside each of `validation` and `test`; 0 takes all.
      beside: the same of `train`.
      most: items of a user in `train`, the last ones.
      seed: of the draws.
    """
    found: dict[str, list[dict[str, Any]]] = {"train": [], "validation": [], "test": []}
    items = sorted({one.item for rated in users.values() for one in rated})
    for user, rated in users.items():
        clicked = list(dict.fromkeys(one.item for one in rated if one.value >= liked))
        if len(clicked) < MIN_LIKED:
            continue
        drawn, seen = random.Random(f"{seed} {user}"), {one.item for one in rated}
        unseen = [item for item in items if item not in seen]
        last = len(clicked) - 1
        for at in range(max(1, last - 1 - most), last + 1):
            split = {last: "test", last - 1: "validation"}.get(at, "train")
            count = beside if split == "train" else negatives or len(unseen)
            candidates = [clicked[at], *drawn.sample(unseen, min(count, len(unseen)))]
            drawn.shuffle(candidates)
            found[split] += [
                {"user": user, "history": clicked[:at], "candidate": item, "click": int(item == clicked[at])}
                for item in candidates
            ]
    return found
