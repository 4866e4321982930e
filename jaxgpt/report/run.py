"""A run's `report.html`: key figures, curves, what was evaluated."""

from __future__ import annotations

import json
import logging
import math
import shlex
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from jaxgpt.report.charts import Record, chart, points, smooth
from jaxgpt.report.confusion import confusion_picture
from jaxgpt.report.page import Html, commands, drawable, escaped, facts, figure, shown, table, write

log = logging.getLogger(__name__)

LOSSES = {"loss": "Loss (nats a target)", "bits_per_byte": "Bits per byte"}
PANELS = {  # metric: title, factor, whether the axis is linear from zero
    "val_accuracy": ("Validation accuracy (%)", 100, False),
    "learning_rate": ("Learning rate", 1, True),
    "grad_norm": ("Gradient norm", 1, False),
    "tokens_per_second": ("Tokens per second", 1, True),
    "mfu": ("Model FLOPs utilisation (%)", 100, True),
}


def read_metrics(path: str | Path) -> list[Record]:
    """The records of a `metrics.jsonl` that have a step; cut or damaged lines are left out."""
    lines, records = list(filter(bytes.strip, Path(path).read_bytes().split(b"\n"))), []
    with suppress(ValueError, RecursionError):  # all at once takes two thirds of the time
        records = json.loads(b"[%b]" % b",".join(lines))
    if len(records) != len(lines):
        records = []
        for line in lines:
            with suppress(ValueError, RecursionError):
                records.append(json.loads(line))
    return [r for r in records if isinstance(r, dict) and drawable(r.get("step")) >= 0]


def curves(records: Sequence[Record], metric: str = "loss") -> Html:
    """A run's training and validation `loss` (or `bits_per_byte`), then small charts of learning
    rate, gradient norm, tokens a second and MFU.
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
        with suppress(OSError, ValueError):
            config = json.loads((folder / "config.json").read_bytes())
        config = config if isinstance(config, dict) else {}
        told, place = json.dumps(config), shlex.quote(str(folder))
        words = f"jaxgpt sample {place} --prompt 'Once upon a time'"
        if '"kind": "Chat"' in told:
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
    """What `jaxgpt eval` left in a run's folder, a table each; damaged files are left out."""
    tables = []
    for path in sorted(folder.glob("eval/*.json")):
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            found = json.loads(path.read_bytes())
            tables.append(table(list(found["figures"].values()), f"{found['title']}, step {found['step']}"))
            if found.get("report"):
                tables.append(Html(f'<pre class="card" tabindex="0">{escaped(found["report"])}</pre>'))
                labels, counts = found["confusion"]
                tables.append(confusion_picture(labels, np.asarray(counts)))
    return tables


def _figures(records: Sequence[Record], config: Record) -> dict[str, Any]:
    """What is known of validation, speed, compilation and size."""
    val = [r for r in records if not math.isnan(drawable(r.get("val_loss")))]
    best = min(val, key=lambda r: r["val_loss"], default={})
    accuracies = [p for p in points(records, "val_accuracy") if p[1] == p[1]]
    step, right = max(accuracies, key=lambda p: p[1], default=(0, None))
    speed = [v for _, v in points(records, "tokens_per_second") if v == v]
    found = {
        "Best validation loss": (best.get("val_loss"), f"nats a target, at step {shown(best.get('step'))}"),
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
