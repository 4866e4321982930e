"""How the runs of a sweep compare: a table for terminal and Markdown, and a page with their curves."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxgpt.report.charts import Point, axis, downsample
from jaxgpt.report.page import Html, commands, escaped, table, text, write

Row = dict[str, Any]
"""What is known of one run, as `sweep.json` has it: `name`, `run`, `differs` (field to value), `state`
(finished, patience, stopped, failed, or waiting), `reason`, `parameters` and what `measure` finds."""
WORDS = ("Run", "Differs in", "State")
"""The columns of words; the others are numbers."""
MEASURED = ("Best validation loss", "Best validation accuracy", "Bits per byte")
"""Those of them that the terminal shows too."""


def write_sweep(path: Path, title: str, rows: list[Row], words: str) -> Path:
    """Write the page of a sweep: the runs' curves, their table, and the command that made them.

    Args:
      path: of the page.
      title: its heading.
      rows: one a run.
      words: the command's arguments.
    """
    lines = {row["name"]: row["curve"] for row in rows if row.get("curve")}
    drawn = table([cells(row, rows) for row in rows], "What differs, and what came of it")
    parts = [
        ("Validation loss", Html(STYLE), chart(lines)),
        ("Runs", drawn),
        ("Run it", commands(f"jaxgpt sweep {words}")),
    ]
    return write(path, title, parts)


def print_rows(rows: list[Row]) -> None:
    """Print the table to the terminal: the columns that say what differs, and what was measured."""
    from rich.console import Console
    from rich.table import Table

    shown = [cells(row, rows) for row in rows]
    columns = [c for c in shown[0] if c in (*WORDS, *MEASURED) and any(line[c] != "–" for line in shown)]
    grid = Table(*columns)
    for column in grid.columns:
        column.justify = "left" if column.header in WORDS else "right"
    for line in shown:
        grid.add_row(*(line[c] for c in columns))
    Console().print(grid)


def cells(row: Row, rows: list[Row]) -> dict[str, str]:
    """A row of the tables: what a person reads of a run. The first shows what the others change."""
    differs = row["differs"]
    if row is rows[0]:
        varied = dict.fromkeys(name for other in rows for name in other["differs"])
        differs = {name: value for name in varied if (value := _field(row.get("run"), name)) is not None}
    words = ", ".join(f"{name} {_value(value)}" for name, value in differs.items())
    labels = any("val_accuracy" in other for other in rows)

    def number(name: str, form: str = ",") -> str:
        return format(row[name], form) if name in row else "–"

    return {
        "Run": row["name"],
        "Differs in": words or "nothing",
        "Parameters": number("parameters"),
        "Steps": number("steps"),
        "Tokens": number("tokens"),
        "Best validation loss": number("val_loss", ".4f"),
        **({"Best validation accuracy": number("val_accuracy", ".4f")} if labels else {}),
        "Bits per byte": number("val_bits_per_byte", ".4f"),
        "Seconds": number("seconds", ",.1f"),
        "Tokens/s": number("tokens_per_second"),
        "State": f"{row['state']}: {row['reason']}" if row["reason"] else row["state"],
    }


def _field(config: Any, name: str) -> Any:
    """The value of a dotted name in a config as JSON; None where it has none, or a part of another kind."""
    for part in name.split("."):
        config = config.get(part) if isinstance(config, dict) else None
    return config


def _value(value: Any) -> str:
    """A field's value on one line; a part of another kind by its kind and fields."""
    if isinstance(value, dict):
        fields = ", ".join(f"{k}={_value(v)}" for k, v in value.items() if k != "kind")
        return f"{value['kind']}({fields})"
    return str(tuple(value)) if isinstance(value, list) else str(value)


def markdown(rows: list[Row]) -> str:
    """The table in Markdown."""
    shown = [cells(row, rows) for row in rows]
    bar = "\\|"  # escaped, it does not end a cell

    def line(row: Iterable[str]) -> str:
        return f"| {' | '.join(' '.join(c.replace('|', bar).split()) for c in row)} |\n"

    rule = line("---" if name in WORDS else "---:" for name in shown[0])
    return line(shown[0]) + rule + "".join(line(row.values()) for row in shown)


# Okabe & Ito's colours, darkened on white so that each keeps a contrast of 3 to the page.
STYLE = """<style>:root{--r0:#0072b2;--r1:#d55e00;--r2:#00805c;--r3:#b8478a;--r4:#a06a00;--r5:#4b5563}
@media (prefers-color-scheme:dark){:root{--r0:#56b4e9;--r1:#ff8c42;--r2:#2fc79a;--r3:#e79cc6;--r4:#f0c040;
--r5:#cbd5e1}}svg.runs text{font-size:11px}svg.runs .name{fill:var(--ink)}main{max-width:1180px}table{
font-size:.84rem}td,th{overflow-wrap:normal}td:nth-child(2){min-width:13em}td:nth-child(n+3):not(:last-child),th:nth-child(n+3):not(:last-child){
text-align:right;font-variant-numeric:tabular-nums}td:last-child{min-width:11em}</style>"""
COLOURS, DASHES = 6, ("none", "7 5", "2 5", "12 4 2 4")


def chart(curves: Mapping[str, Sequence[Point]]) -> Html:
    """Validation losses over tokens, one line per run with its name and last loss at its end.

    Lines are distinguished by colour, then by dashes, and without either by their names. What lies above
    all that is measured in the last three quarters is cut off: there the runs are closest.
    """
    if not curves:
        return text("No run was evaluated yet.")
    most = max(x for line in curves.values() for x, _ in line)
    late = [y for line in curves.values() for x, y in line if x >= most / 4 or x == line[-1][0]]
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
        points = "L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in downsample(line))
        parts.append(f'<path {pen} clip-path="url(#in)" d="M{points}h0">{tip}</path>')
        parts.append(f'<path class="grid" d="M{x(end[0]) + 3:.1f} {y(end[1]):.1f}L660 {top:.1f}"/>')
        parts.append(f'<path {pen} d="M664 {top:.1f}h30"/>')
        parts.append(f'<text class="name" x="700" y="{top + 4:.1f}">{escaped(name)} {end[1]:.4f}</text>')
    words = "nats per target, over the tokens trained on; at each line's end its last"
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
