"""How the runs of a sweep compare: a table for terminal and Markdown, and a page with their curves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxgpt.report.lines import STYLE, chart
from jaxgpt.report.measure import Row, by_seed
from jaxgpt.report.page import Html, commands, table, write

WORDS = ("Run", "Differs in", "State")
"""The columns of words; the others are numbers."""
MEASURED = ("Best validation loss", "Best validation accuracy", "Bits per byte")
"""Those of them that the terminal shows too."""

WIDE = """<style>main{max-width:1180px}table{font-size:.84rem}td,th{overflow-wrap:normal}
td:nth-child(2){min-width:13em}td:nth-child(n+3):not(:last-child),th:nth-child(n+3):not(:last-child){
text-align:right;font-variant-numeric:tabular-nums}td:last-child{min-width:11em}</style>"""
"""Of a page whose tables have many columns of numbers between words."""


def write_sweep(path: Path, title: str, rows: list[Row], words: str) -> Path:
    """Write the page of a sweep or a comparison: the runs' curves, their tables, the command that made them.

    Args:
      path: of the page.
      title: its heading.
      rows: one for each run.
      words: the command.
    """
    groups = by_seed(rows)
    lines = {row["name"]: row["curve"] for row in groups if row.get("curve")}
    bands = {row["name"]: row["band"] for row in groups if row.get("band")}
    words_of = "What differs, and what came of it"
    if len(groups) < len(rows):
        words_of += "; of several seeds the mean and the standard deviation"
    parts: list[Any] = [table([cells(row, groups) for row in groups], words_of)]
    if figures := evaluations(groups):
        parts.append(table(figures, "Evaluations that the runs share"))
    sections: list[Any] = [("Validation loss", Html(STYLE + WIDE), chart(lines, bands)), ("Runs", *parts)]
    if len(groups) < len(rows):
        sections.append(("Each seed", table([cells(row, rows) for row in rows], "The runs one by one")))
    return write(path, title, [*sections, ("Run it", commands(words))])


def evaluations(rows: Sequence[Row]) -> list[dict[str, str]]:
    """A row of cells for each run with what `jaxgpt eval` measured of several of them."""
    held = [row.get("figures", {}) for row in rows]
    names = list(dict.fromkeys(name for one in held for name in one))
    shared = [name for name in names if sum(name in one for one in held) > 1 or len(rows) == 1]
    if not shared:
        return []
    return [{"Run": row["name"]} | {n: _spread_of(row, n, one.get(n), ".4f") for n in shared}
            for row, one in zip(rows, held, strict=True)]  # fmt: skip


def _spread_of(row: Row, name: str, value: Any, form: str) -> str:
    """A number, with the standard deviation over seeds if there is one."""
    if value is None:
        return "–"
    spread = row.get("spread", {}).get(name) or 0
    return format(value, form) + (f" ± {spread:{',.0f' if spread >= 100 else '.2g'}}" if spread else "")


def print_rows(rows: list[Row]) -> None:
    """Print the table to the terminal: the columns that say what differs, and what was measured."""
    from rich.console import Console

    shown = [cells(row, rows) for row in rows]
    columns = [c for c in shown[0] if c in (*WORDS, *MEASURED) and any(line[c] != "–" for line in shown)]
    Console().print(_grid(shown, columns))
    if figures := evaluations(rows):
        Console().print(_grid(figures, list(figures[0])))


def _grid(lines: Sequence[Mapping[str, str]], columns: Sequence[str]) -> Any:
    from rich.table import Table

    grid = Table(*columns)
    for column in grid.columns:
        column.justify = "left" if column.header in WORDS else "right"
    for line in lines:
        grid.add_row(*(line[c] for c in columns))
    return grid


def cells(row: Row, rows: list[Row]) -> dict[str, str]:
    """A row of the tables: what a person reads of a run. The first shows what the others change."""
    differs = row["differs"]
    if row is rows[0]:
        varied = dict.fromkeys(name for other in rows for name in other["differs"])
        differs = {name: value for name in varied if (value := _field(row.get("run"), name)) is not None}
    words = ", ".join(f"{name} {_value(value)}" for name, value in differs.items())
    labels, rewarded = (any(f"val_{name}" in other for other in rows) for name in ("accuracy", "reward"))

    def number(name: str, form: str = ",") -> str:
        return _spread_of(row, name, row.get(name), form)

    return {
        "Run": row["name"],
        "Differs in": words or "nothing",
        "Parameters": number("parameters"),
        "Steps": number("steps"),
        "Tokens": number("tokens"),
        "Best validation loss": number("val_loss", ".4f"),
        **({"Best validation accuracy": number("val_accuracy", ".4f")} if labels else {}),
        **({"Best validation reward": number("val_reward", ".4f")} if rewarded else {}),
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
