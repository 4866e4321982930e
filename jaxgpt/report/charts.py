"""Line charts in SVG: an axis that chooses its ticks, and curves thinned to the visible resolution."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from jaxgpt.report.page import Html, drawable, escaped, shown

Point, Record, NAN = tuple[float, float], dict[str, Any], float("nan")


def axis(values: Sequence[float], start: float, end: float, zero: bool = False) -> tuple[Any, ...]:
    """The map from values to pixels, round values for ticks, and whether the axis is logarithmic.
    It is if the values span a factor of 3 or more, but never if it must start at `zero`.
    """
    low, high = min(values, default=0.0), max(values, default=1.0)
    low, high = (min(low, 0.0), max(high, 0.0)) if zero else (low, high)
    curved = low > 0 and high >= 3 * low
    scale: Callable[[float], float] = math.log if curved else float
    a, b = scale(low), scale(high)
    room = 0.05 * (b - a) or 0.1 * abs(b) or 1.0
    a, b = a if zero and low == 0 else a - room, b + room
    step = 10.0 ** math.floor(math.log10((b - a) / 6))
    step *= next(m for m in (1, 2, 5, 10, 20) if m * step >= (b - a) / 6)
    ticks = [i * step for i in range(math.ceil(a / step), math.floor(b / step) + 1)]
    if curved:
        digits = (1, 2, 3, 4, 5, 6, 8) if b - a < 2.4 else (1, 2, 5) if b - a < 5 else (1,)
        powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
        marks = [d * 10.0**p for p in powers for d in digits]  # 0 below the smallest float
        ticks = [mark for mark in marks if mark and a <= math.log(mark) <= b]
        ticks = ticks[:: 1 + len(ticks) // 8]
    return lambda value: start + (scale(value) - a) / (b - a) * (end - start), ticks, curved


def points(records: Iterable[Record], metric: str, factor: float = 1) -> list[Point]:
    """(step, value) of the records that have the metric; NaN if the value cannot be drawn."""
    return [(r["step"], factor * drawable(r[metric])) for r in records if metric in r]


def _runs(line: Sequence[Point]) -> list[list[Point]]:
    """The segments of a line between its gaps."""
    return [list(g) for gap, g in groupby(line, key=lambda p: math.isnan(p[1])) if not gap]


def smooth(line: Sequence[Point], half: int) -> list[Point]:
    """Running mean over `half` points on either side, at about 300 positions; gaps stay gaps.

    The window shrinks symmetrically at the start, where curves are steep, and is one-sided at the end.
    """
    means = []
    for run in _runs(line):
        values = [y for _, y in run]
        for i in sorted({*range(0, len(run), 1 + len(run) // 300), len(run) - 1}):
            near = values[i - min(half, i) : i + min(half, i) + 1]
            means.append((run[i][0], sum(near) / len(near)))
        means.append((run[-1][0], NAN))
    return means


def downsample(line: Sequence[Point], most: int = 600) -> list[Point]:
    """About `most` points: the first, the last, and the lowest and highest of each bucket."""
    size, kept = 1 + 2 * len(line) // most, {0, len(line) - 1}
    for start in range(0, len(line), size):
        values = [y for _, y in line[start : start + size]]
        kept |= {start + values.index(min(values)), start + values.index(max(values))}
    return list(line) if len(line) <= most else [line[i] for i in sorted(kept)]


def _tag(name: str, kind: str, inside: str = "", **values: str | float) -> str:
    shown = (f' {k}="{v:.1f}"' if isinstance(v, float) else f' {k}="{v}"' for k, v in values.items())
    return f'<{name} class="{kind}"{"".join(shown)}>{inside}</{name}>'


def chart(title: str, lines: Mapping[str, Sequence[Point]], zero: bool = False) -> Html:
    """An SVG chart over steps: `raw` is a faint line, `mean` a line with its last value, `dots` points
    with the lowest marked as the best, `skips` steps marked at the bottom; `zero` as in `axis`.
    """
    runs = {name: _runs(line) for name, line in lines.items() if name != "skips"}
    x, x_ticks, _ = axis([a for line in lines.values() for a, _ in line], 52, 608, zero=True)
    finite = [b for found in runs.values() for run in found for _, b in run]
    y, y_ticks, curved = axis(finite, 272, 22, zero)
    parts = [f"<title>{escaped(title)}</title><desc>{len(finite)} points</desc>"]
    parts += [_tag("path", "grid", d=f"M52 {y(tick):.1f}H582") for tick in y_ticks]
    parts += [_tag("text", "left", shown(t), x=45, y=y(t) + 4) for t in y_ticks]
    parts += [_tag("text", "mid", shown(t), x=x(t), y=292) for t in x_ticks]
    parts += [_tag("text", "left", "log", x=45, y=6)] if curved else []
    parts += [_tag("path", "bad", d=f"M{x(a):.1f} 272v-9") for a, _ in lines.get("skips", ())]
    for kind, run in [(name, run) for name, found in runs.items() for run in found]:
        kept = downsample(run, 8 + 600 * len(run) // len(lines[kind]))
        d = "L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in kept)
        parts.append(_tag("path", kind, d=f"M{d}" + "h0" * (len(run) == 1)))
        for a, b in kept if kind == "dots" else ():
            tip = f"<title>step {a:,}: {shown(b)}</title>"
            parts.append(_tag("circle", "dots", tip, cx=x(a), cy=y(b), r=3.2))
    ends = sorted((y(r[-1][-1][1]), k, r[-1][-1][1]) for k, r in runs.items() if r and k != "raw")
    for i, (at, kind, value) in enumerate(ends):
        at = max(at, ends[i - 1][0] + 17) if i else at
        parts.append(_tag("text", f"{kind} end", shown(value), x=588, y=at + 4))
    for run in runs.get("dots", [])[:1]:
        best, step = min((b, a) for run in runs["dots"] for a, b in run)
        parts.append(_tag("path", "best", d=f"M{x(step):.1f} 18V{y(best) - 7:.1f}"))
        parts.append(_tag("circle", "best", cx=x(step), cy=y(best), r=7))
        side = "right" if x(step) < 150 else "left" if x(step) > 480 else "mid"
        words = f"best {shown(best)} at step {step:,}"
        parts.append(_tag("text", f"dots {side}", words, x=x(step), y=13))
    return Html(f'<svg viewBox="0 0 664 300" role="img">{"".join(parts)}</svg>')
