"""What the metrics of runs say, one row for each run, and one for those that differ in their seed alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from jaxgpt.config import Run
from jaxgpt.report.charts import points
from jaxgpt.report.page import drawable
from jaxgpt.report.run import read_metrics

Row = dict[str, Any]
"""What is known of one run, as `sweep.json` has it: `name`, `run`, `differs` (field to value), `state`
(finished, patience, stopped, failed, or waiting), `reason`, `parameters` and what `measure` finds. A row of
several seeds has means, `spread` (the standard deviation of each) and `band` (the extremes of a curve)."""
NUMBERS = ("parameters", "steps", "tokens", "val_loss", "val_accuracy", "val_bits_per_byte", "seconds")
NUMBERS += ("tokens_per_second", "val_reward")
SEED = ("name", "runs", "train.seed", "train.samples", "train.track", "train.log_every", "train.save_every")
"""Fields in which runs of one group may differ: the seed, and what no number depends on."""


def measure(run: Run, folder: Path | None = None) -> Row:
    """What the metrics in a run's folder say.

    Args:
      run: the config.
      folder: where the run is, if not where its config says.

    Returns:
      `steps`, `tokens`, `val_loss` (the lowest, nats per target) and its `val_bits_per_byte`, `val_accuracy`
      (the highest, of runs that are best by error), `val_reward` (the highest mean), `seconds` (of training,
      without compiling and evaluating), `tokens_per_second` (the median) and `curve` ([tokens, validation
      loss] pairs);
      without what was not measured.
    """
    records: list[Row] = []
    with suppress(OSError):
        records = read_metrics((folder or run.folder) / "metrics.jsonl")
    logged = [(step, seconds) for step, seconds in points(records, "step_seconds") if seconds == seconds]
    if not logged:
        return {}
    tokens = run.train.batch_size * run.length
    steps = [0, *(step for step, _ in logged)]
    spent = [(b - a) * seconds for a, (b, seconds) in zip(steps, logged, strict=False)]
    speeds = [v for _, v in points(records, "tokens_per_second") if v == v]
    curve = [(step * tokens, loss) for step, loss in points(records, "val_loss") if loss == loss]
    found = {
        "steps": steps[-1],
        "tokens": steps[-1] * tokens,
        "seconds": round(sum(spent), 1),
        **({"tokens_per_second": round(median(speeds))} if speeds else {}),
        "curve": curve,
    }
    if curve:
        best = min((r for r in records if _measured(r, "val_loss")), key=lambda r: r["val_loss"])
        found |= {name: best[name] for name in ("val_loss", "val_bits_per_byte") if _measured(best, name)}
        accuracies = [a for _, a in points(records, "val_accuracy") if a == a]
        if run.train.best_by == "error" and accuracies:
            found["val_accuracy"] = max(accuracies)
    if rewards := [r for _, r in points(records, "val_reward") if r == r]:
        found["val_reward"] = max(rewards)
    return found


def _measured(record: Row, name: str) -> bool:
    return not math.isnan(drawable(record.get(name)))


def differences(first: Any, run: Any, prefix: str = "") -> dict[str, Any]:
    """Fields of a config whose values are not those of another, by dotted names, as JSON."""
    if isinstance(first, dict) and isinstance(run, dict) and first["kind"] == run["kind"]:
        parts = (differences(first[name], run[name], f"{prefix}{name}.") for name in run)
        return {name: value for part in parts for name, value in part.items()}
    return {} if first == run else {prefix.removesuffix("."): run}


def by_seed(rows: Sequence[Row]) -> list[Row]:
    """The rows, those of runs that differ in `SEED` alone as one, in order of the first of each."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(repr(_without_seed(row.get("run", row["name"]))), []).append(row)
    return [group[0] if len(group) == 1 else _mean(group) for group in groups.values()]


def _without_seed(value: Any, prefix: str = "") -> Any:
    if not isinstance(value, Mapping):
        return value
    kept = [name for name in value if f"{prefix}{name}" not in SEED]
    return {name: _without_seed(value[name], f"{prefix}{name}.") for name in kept}


def _mean(group: Sequence[Row]) -> Row:
    """The row of several seeds: means of what all of them measured."""
    states = dict.fromkeys(row["state"] for row in group)
    count = {state: sum(row["state"] == state for row in group) for state in states}
    first = group[0]
    seed = str((first.get("run") or {}).get("train", {}).get("seed", ""))
    made: Row = {
        "name": f"{first['name'].removesuffix(f'-s{seed}')} ({len(group)} seeds)",
        "run": first.get("run"),
        "differs": {name: value for name, value in first["differs"].items() if name not in SEED},
        "state": next(iter(states)) if len(states) == 1 else ", ".join(f"{n} {s}" for s, n in count.items()),
        "reason": "",
        "spread": {},
    }
    for name in NUMBERS:
        values = [row[name] for row in group if row.get(name) is not None]
        if len(values) == len(group):
            made[name] = type(values[0])(mean(values))
            made["spread"][name] = stdev(values)
    figures = [row.get("figures", {}) for row in group]
    if shared := [name for name in figures[0] if all(name in other for other in figures)]:
        made["figures"] = {name: mean(other[name] for other in figures) for name in shared}
        made["spread"] |= {name: stdev(other[name] for other in figures) for name in shared}
    curves = [dict(map(tuple, row["curve"])) for row in group if row.get("curve")]
    if curves:
        places = sorted(set.intersection(*map(set, curves)))
        columns = [[curve[x] for curve in curves] for x in places]
        made["curve"] = [(x, mean(column)) for x, column in zip(places, columns, strict=True)]
        made["band"] = [(x, min(column), max(column)) for x, column in zip(places, columns, strict=True)]
    return made
