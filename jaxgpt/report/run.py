"""A run's `report.html`: key figures, curves, what was evaluated."""

from __future__ import annotations

import logging
import math
import shlex
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, NotRequired, TypedDict, TypeVar

import numpy as np

from jaxgpt.errors import UserError
from jaxgpt.files import Count, check_json, parse_json, read_json, to_json
from jaxgpt.report.charts import Record, chart, points, smooth
from jaxgpt.report.confusion import confusion_picture
from jaxgpt.report.page import Html, commands, drawable, escaped, facts, figure, shown, table, write

log = logging.getLogger(__name__)
T = TypeVar("T")

LOSSES = {"loss": "Loss (nats per target)", "bits_per_byte": "Bits per byte"}
PANELS = {  # metric: title, factor, whether the axis is linear from zero
    "val_accuracy": ("Validation accuracy (%)", 100, False),
    "learning_rate": ("Learning rate", 1, True),
    "grad_norm": ("Gradient norm", 1, False),
    "tokens_per_second": ("Tokens per second", 1, True),
    "mfu": ("Model FLOPs utilisation (%)", 100, True),
}


class Step(TypedDict):
    """What every record of `metrics.jsonl` has; its numbers are read by `drawable`, whatever they are."""

    step: Count


class Figure(TypedDict):
    """A number of an evaluation."""

    name: str
    value: float | None
    standard_error: float | None


class Evaluation(TypedDict):
    """What `jaxgpt eval` leaves in `eval/NAME.json`, as far as it is shown."""

    title: str
    step: Count
    figures: dict[str, Figure]
    report: NotRequired[str]
    confusion: NotRequired[tuple[list[str], list[list[Count]]]]


def read_metrics(path: str | Path) -> list[Record]:
    """The records of a `metrics.jsonl` that have a step.

    Lines that are cut or damaged are left out, with one warning that counts them.
    """
    lines = list(filter(bytes.strip, Path(path).read_bytes().split(b"\n")))
    with suppress(UserError):  # all at once takes half the time
        if len(records := _records(b",".join(lines))) == len(lines):
            return records
    kept = list[Record]()
    for line in lines:
        with suppress(UserError):
            made = _records(line)
            kept += made if len(made) == 1 else []  # two on a line are none
    log.warning("%s: %d damaged lines of %d are left out", path, len(lines) - len(kept), len(lines))
    return kept


def _records(lines: bytes) -> list[Record]:
    records = parse_json(b"[%b]" % lines, list[dict[str, Any]], "records", "")
    check_json(records, list[Step], "records", "")
    return records


def curves(records: Sequence[Record], metric: str = "loss") -> Html:
    """A run's training and validation `loss` (or `bits_per_byte`), then small charts of learning
    rate, gradient norm, tokens per second and MFU.
    """
    train = points(records, metric)
    counts = [(0, 0.0), *(p for p in points(records, "skipped") if not math.isnan(p[1]))]
    half, skips = len(train) // 40, [b for a, b in pairwise(counts) if b[1] > a[1]]
    lines = {"raw": train, "mean": smooth(train, half), "dots": points(records, f"val_{metric}")}
    words = f"<span class=mean>━ training, mean of {2 * half + 1} records (faint: each)</span> "
    words += "<span class=dots>● validation</span> " if lines["dots"] else ""
    words += f"<span class=bad>┃ {counts[-1][1]:.0f} updates skipped</span>" if skips else ""
    parts = [figure(LOSSES[metric], words, chart(LOSSES[metric], lines | {"skips": skips}))]
    parts.append('<div class="pair">')
    for name, (title, factor, zero) in PANELS.items():
        line = points(records, name, factor)
        lines = {"raw": line, "mean": smooth(line, len(line) // 40)}
        parts.append(figure(title, "", chart(title, lines, zero)) if line else "")
    return Html("".join(parts) + "</div>")


def run_report(folder: str | Path) -> Path | None:
    """Write `report.html` into a run's folder; None, with a warning in the log, where there is
    nothing to write or no way to: a picture must never stop a training run.
    """
    folder, config = Path(folder), {}
    try:
        records = read_metrics(folder / "metrics.jsonl")
        if (path := folder / "config.json").exists():
            config = _left_out_if_damaged(path, dict[str, Any]) or {}
        told, place = to_json(config), shlex.quote(str(folder))
        words = f"jaxgpt sample {place} --prompt 'Once upon a time'"
        if '"kind": "Chat"' in told and '"template": "none"' not in told:
            words = f"jaxgpt chat {place}"
        elif '"kind": "Classification"' in told or '"kind": "MaskedLM"' in told:
            words = f"jaxgpt eval {place}"
        figures = facts(_figures(records, config))
        evals = [("Evaluations", *tables)] if (tables := _evaluations(folder)) else []
        parts = ("Key figures", figures), ("Curves", curves(records)), *evals, ("Try it", commands(words))
        return write(folder / "report.html", f"Run {folder.resolve().name}", parts)
    except Exception as error:
        log.warning("no report of %s: %s", folder, error)
        return None


def _evaluations(folder: Path) -> list[Html]:
    """What `jaxgpt eval` left in a run's folder, a table each."""
    tables = []
    for path in sorted(folder.glob("eval/*.json")):
        found = _left_out_if_damaged(path, Evaluation)
        if found is None:
            continue
        figures: list[Any] = list(found["figures"].values())
        tables.append(table(figures, f"{found['title']}, step {found['step']}"))
        if report := found.get("report"):
            tables.append(Html(f'<pre class="card" tabindex="0">{escaped(report)}</pre>'))
        labels, counts = found.get("confusion", ([], []))
        if [len(row) for row in counts] != [len(labels)] * len(labels):
            log.warning("%s has no row and column of counts for each label; the picture is left out", path)
        elif labels:
            tables.append(confusion_picture(labels, np.asarray(counts)))
    return tables


def _left_out_if_damaged(path: Path, kind: type[T]) -> T | None:
    """A file's value; None, with a warning, where it is damaged: the rest of the page is worth having."""
    try:
        return read_json(path, kind, "the report leaves it out")
    except UserError as error:
        log.warning("%s", error)
        return None


def _figures(records: Sequence[Record], config: Record) -> dict[str, Any]:
    """What is known of validation, speed, compilation and size."""
    val = [r for r in records if not math.isnan(drawable(r.get("val_loss")))]
    best = min(val, key=lambda r: r["val_loss"], default={})
    accuracies = [p for p in points(records, "val_accuracy") if p[1] == p[1]]
    step, right = max(accuracies, key=lambda p: p[1], default=(0, None))
    speed = [v for _, v in points(records, "tokens_per_second") if v == v]
    found = {
        "Best validation loss": (best.get("val_loss"), f"nats per target, at step {shown(best.get('step'))}"),
        "Best validation accuracy": (right, f"share of targets that were likeliest, at step {step:,}"),
        "Bits per byte": (best.get("val_bits_per_byte"), "of validation text, at that step"),
        "Tokens per second": (median(speed) if speed else None, "median"),
        "Parameters": (config.get("parameters"), ""),
    }
    for record in records:
        if record.get("event") == "compiled":
            seconds = [drawable(v) for k, v in record.items() if k.endswith("_seconds")]
            found["Seconds to compile"] = sum(seconds), "trace, lower and compile"
    return {name: pair for name, pair in found.items() if pair[0] is not None}
