"""A chart of several lines with their names at their ends: losses of runs, of seeds, of sources."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from jaxgpt.report.charts import Point, axis, downsample
from jaxgpt.report.page import Html, escaped, text

# Okabe & Ito's colours, darkened on white so that each keeps a contrast of 3 to the page.
STYLE = """<style>:root{--r0:#0072b2;--r1:#d55e00;--r2:#00805c;--r3:#b8478a;--r4:#a06a00;--r5:#4b5563}
@media (prefers-color-scheme:dark){:root{--r0:#56b4e9;--r1:#ff8c42;--r2:#2fc79a;--r3:#e79cc6;--r4:#f0c040;
--r5:#cbd5e1}}svg.runs{min-width:680px}svg.runs text{font-size:11px}svg.runs .name{fill:var(--ink)}
</style>"""
Band = tuple[float, float, float]
"""Tokens, and the lowest and the highest value there."""
COLOURS, DASHES = 6, ("none", "7 5", "2 5", "12 4 2 4")


def chart(
    curves: Mapping[str, Sequence[Point]],
    bands: Mapping[str, Sequence[Band]] | None = None,
    over: str = "tokens trained on",
) -> Html:
    """Validation losses over tokens, one line per run with its name and last loss at its end; of several
    seeds the mean, in a band from the lowest to the highest.

    Lines are distinguished by colour, then by dashes, and without either by their names. What lies above
    all that is measured in the last three quarters is cut off: there the runs are closest.
    """
    if not curves:
        return text("No run was evaluated yet.")
    most = max(x for line in curves.values() for x, _ in line)
    late = [y for line in curves.values() for x, y in line if x >= most / 4 or x == line[-1][0]]
    late += [y for name in bands or {} for x, *ends in (bands or {})[name] if x >= most / 4 for y in ends]
    height = max(300.0, 17.0 * len(curves) + 40)
    x, x_ticks, _ = axis([most], 46, 640, zero=True)
    y, y_ticks, curved = axis(late, height - 28, 12)
    parts = [f"<title>Validation loss</title><desc>{len(curves)} runs</desc>"]
    parts.append(f'<clipPath id="in"><path d="M46 4H642V{height - 28:.0f}H46z"/></clipPath>')
    for tick in y_ticks:
        parts.append(f'<path class="grid" d="M46 {y(tick):.1f}H640"/>')
        parts.append(f'<text class="left" x="40" y="{y(tick) + 4:.1f}">{tick:g}</text>')
    for tick in x_ticks:
        parts.append(f'<text class="mid" x="{x(tick):.1f}" y="{height - 10:.0f}">{_tokens(tick)}</text>')
    parts.append('<text class="left" x="40" y="8">log</text>' if curved else "")
    order = {name: i for i, name in enumerate(curves)}
    tops = _spread([(y(line[-1][1]), name) for name, line in curves.items()], 17, height - 28)
    for name, line in curves.items():
        end, top = line[-1], tops[name]
        pen = f'style="color:var(--r{order[name] % COLOURS})" stroke-dasharray="'
        pen += f'{DASHES[order[name] // COLOURS % len(DASHES)]}"'
        tip = f"<title>{escaped(name)}: {end[1]:.4f}</title>"
        band = (bands or {}).get(name, ())
        edge = [(a, low) for a, low, _ in band] + [(a, high) for a, _, high in reversed(band)]
        if edge:
            around = "L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in edge)
            place = f"color:var(--r{order[name] % COLOURS});fill:currentColor;stroke:none;opacity:.18"
            parts.append(f'<path style="{place}" clip-path="url(#in)" d="M{around}z"/>')
        points = "L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in downsample(line))
        parts.append(f'<path {pen} clip-path="url(#in)" d="M{points}h0">{tip}</path>')
        parts.append(f'<path class="grid" d="M{x(end[0]) + 3:.1f} {y(end[1]):.1f}L660 {top:.1f}"/>')
        parts.append(f'<path {pen} d="M664 {top:.1f}h30"/>')
        parts.append(f'<text class="name" x="700" y="{top + 4:.1f}">{escaped(name)} {end[1]:.4f}</text>')
    words = f"nats per target, over the {over}; at each line's end its last"
    picture = f'<svg class="runs" viewBox="0 0 900 {height:.0f}" role="img">{"".join(parts)}</svg>'
    head = f"<figcaption>Validation loss <small>{words}</small></figcaption>"
    return Html(f'<figure class="card">{head}{picture}</figure>')


def _spread(tops: list[tuple[float, str]], gap: float, floor: float) -> dict[str, float]:
    """Heights of labels near the wanted ones, at least `gap` apart and not below the floor."""
    placed: list[tuple[float, str]] = []
    at = -math.inf
    for top, name in sorted(tops):
        at = max(top, at + gap, 10)
        placed.append((at, name))
    found, limit = {}, floor
    for top, name in reversed(placed):
        found[name] = limit = min(top, limit)
        limit -= gap
    return found


def _tokens(count: float) -> str:
    """A number of tokens, short."""
    units = {"T": 1e12, "B": 1e9, "M": 1e6, "k": 1e3, "": 1.0}
    unit = next((u for u in "TBMk" if count >= units[u]), "")
    return f"{count / units[unit]:g}{unit}"
