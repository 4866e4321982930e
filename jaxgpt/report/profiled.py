"""What `jaxgpt train --profile` leaves in a run's folder, as lines of text and as a section of a page."""

from __future__ import annotations

from typing import TypedDict

from jaxgpt.files import Count
from jaxgpt.report.page import Html, table

PROFILES = "profile/*/operations.json"
"""Where it is in a run's folder."""
SHOWN = 10
"""Operations that are shown."""
NOTED = 0.01
"""Share of a step from which on another program is named."""
UNKNOWN = "?"
"""Stands for a number that is not known."""
Operation = TypedDict(
    "Operation",
    {
        "scope": str,
        "pass": str,
        "what": str,
        "product": bool,
        "runs": float,
        "seconds": float,
        "share": float,
        "bytes": float | None,
        "flops": float | None,
        "instructions": list[str],
    },
)
"""A row: instructions of one scope and pass, of a step. `what` has a product's factors, or the primitives
that took longest; `bytes` and `flops` are null where they are not known.
"""


class Profiled(TypedDict):
    """Of the steps `first` to `last`; all numbers are of one step and one device."""

    first: Count
    last: Count
    device: str
    devices: Count
    seconds: float
    idle: float
    """Seconds in which no operation ran."""
    others: dict[str, float]
    """Seconds of a step by name of other programs that ran meanwhile; they are no part of `seconds`."""
    operations: list[Operation]


def heading(found: Profiled) -> str:
    """Which steps, how long, and how much of that was in no operation."""
    first, last = found["first"], found["last"]
    steps = f"step {first}" if first == last else f"steps {first} to {last}"
    step = max(found["seconds"], 1e-12)
    words = f"{steps}: {scaled(step)}s a step on {found['devices']} x {found['device']}, "
    words += f"{found['idle'] / step:.1%} of it in no operation (host, data, waiting)"
    long = {name: seconds for name, seconds in found["others"].items() if seconds > NOTED * step}
    if long:
        each = ", ".join(f"{name} {scaled(seconds)}s" for name, seconds in long.items())
        words += f"; other programs ran beside it and are left out: {each} a step"
    return words


def lines(found: Profiled) -> list[str]:
    """The costliest operations as lines of text."""
    if not found["operations"]:
        return [heading(found), "the trace names no operation of the step"]
    heads = ("share", "time", "runs", "bytes", "FLOPs", "bytes/s", "FLOP/s")
    rows = [" ".join(f"{head:>8}" for head in heads) + "  operation"]
    chosen, rest = found["operations"][:SHOWN], found["operations"][SHOWN:]
    for row in chosen:
        cells = (f"{row['share']:.1%}", f"{scaled(row['seconds'])}s", f"{row['runs']:.4g}", *_numbers(row))
        rows.append(" ".join(f"{cell:>8}" for cell in cells) + f"  {operation(row)}")
    if rest:
        share, seconds = sum(row["share"] for row in rest), sum(row["seconds"] for row in rest)
        cells = (f"{share:.1%}", f"{scaled(seconds)}s", *[""] * 5)
        rows.append(" ".join(f"{cell:>8}" for cell in cells) + f"  {len(rest)} others")
    return [heading(found), *rows]


def operation(row: Operation) -> str:
    """What a row is: `layers/mlp, forward: 1024x768 · 768x3072`."""
    return f"{row['scope']}{', ' if row['pass'] else ''}{row['pass']}: {row['what']}"


def _numbers(row: Operation) -> tuple[str, ...]:
    counts, seconds = (row["bytes"], row["flops"]), max(row["seconds"], 1e-12)
    rates = (None if count is None else count / seconds for count in counts)
    return tuple(UNKNOWN if one is None else scaled(one) for one in (*counts, *rates))


def scaled(value: float) -> str:
    """A number with three digits and a unit's prefix: `12.3 G`."""
    prefixes = zip("PTGMk m", (1e15, 1e12, 1e9, 1e6, 1e3, 1.0, 1e-3), strict=True)
    for prefix, scale in prefixes:
        if abs(value) >= 0.9995 * scale:
            return f"{value / scale:.3g} {prefix.strip()}"
    return f"{value * 1e6:.3g} µ" if value else "0 "


def profile_section(found: Profiled) -> Html:
    """The costliest operations as a table."""
    rows = [
        {
            "Operation": operation(row),
            "Share": row["share"],
            "Time": f"{scaled(row['seconds'])}s",
            "Runs": row["runs"],
            **dict(zip(("Bytes", "FLOPs", "Bytes/s", "FLOP/s"), _numbers(row), strict=True)),
        }
        for row in found["operations"][:SHOWN]
    ]
    return table(rows, heading(found), shares=("Share",))
