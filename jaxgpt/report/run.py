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

from jaxgpt.config import changed_fields, load
from jaxgpt.errors import UserError
from jaxgpt.files import Count, check_json, parse_json, read_json, to_json, write_text
from jaxgpt.report.charts import Point, Record, chart, points, smooth
from jaxgpt.report.confusion import confusion_picture
from jaxgpt.report.lines import STYLE
from jaxgpt.report.lines import chart as lines_chart
from jaxgpt.report.page import Html, commands, drawable, escaped, facts, figure, render, shown, table, text
from jaxgpt.report.profiled import PROFILES, Profiled, profile_section
from jaxgpt.report.reliability import reliability_picture

log = logging.getLogger(__name__)
T = TypeVar("T")

LOSSES = {"loss": "Loss (nats per target)", "bits_per_byte": "Bits per byte"}
PANELS = {  # metric: title, factor, whether the axis is linear from zero
    "val_accuracy": ("Validation accuracy (%)", 100, False),
    "reward": ("Mean reward of rollouts", 1, False),
    "val_reward": ("Mean reward of validation prompts", 1, False),
    "completion_length": ("Tokens of a completion", 1, True),
    "entropy": ("Entropy of the policy (nats)", 1, True),
    "learning_rate": ("Learning rate", 1, True),
    "grad_norm": ("Gradient norm", 1, False),
    "noise_scale": ("Gradient noise scale (rows)", 1, False),
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


class Start(TypedDict):
    """What training leaves in `provenance/N.json`, as far as it is shown."""

    time: str
    host: str
    command: str
    environment: dict[str, Any]


class Sample(TypedDict):
    """A line of samples.jsonl."""

    step: Count
    prompt: str
    text: str


class Class(TypedDict):
    """What `jaxgpt eval` counts of one label."""

    label: str
    precision: float
    recall: float
    f1: float
    support: Count


class Evaluation(TypedDict):
    """What `jaxgpt eval` leaves in `eval/NAME.json`, as far as it is shown."""

    title: str
    step: Count
    figures: dict[str, Figure]
    report: NotRequired[str]
    classes: NotRequired[list[Class]]
    reliability: NotRequired[dict[str, list[tuple[Count, float, float]]]]
    confusion: NotRequired[tuple[list[str], list[list[Count]]]]


class Best(TypedDict):
    """What training leaves in best.json."""

    by: str
    higher_is_better: bool
    value: float
    step: Count


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
    """A run's training and validation `loss` (or `bits_per_byte`), the validation losses of a mixture's
    sources, then small charts of learning rate, gradient norm, tokens per second and MFU.
    """
    train = points(records, metric)
    counts = [(0, 0.0), *(p for p in points(records, "skipped") if not math.isnan(p[1]))]
    half, skips = len(train) // 40, [b for a, b in pairwise(counts) if b[1] > a[1]]
    lines = {"raw": train, "mean": smooth(train, half), "dots": points(records, f"val_{metric}")}
    words = f"<span class=mean>━ training, mean of {2 * half + 1} records (faint: each)</span> "
    words += "<span class=dots>● validation</span> " if lines["dots"] else ""
    words += f"<span class=bad>┃ {counts[-1][1]:.0f} updates skipped</span>" if skips else ""
    whole = [Html(figure(LOSSES[metric], words, chart(LOSSES[metric], lines | {"skips": skips})))]
    sources = dict.fromkeys(name for r in records for name in r if name.startswith("val_loss/"))
    if sources:
        own = {name.removeprefix("val_loss/"): _real(points(records, name)) for name in sources}
        whole += [Html(STYLE), lines_chart({k: v for k, v in own.items() if v}, over="steps")]
    parts = ['<div class="pair">']
    scores = dict.fromkeys(n for r in records for n in r if n.startswith("val_") and "/" in n)
    scores = {n: (_title(n), 1, False) for n in scores if not n.startswith(("val_loss/", "val_accuracy/"))}
    for name, (title, factor, zero) in (scores | PANELS).items():
        line = points(records, name, factor)
        lines = {"raw": line, "mean": smooth(line, len(line) // 40)}
        parts.append(figure(title, "", chart(title, lines, zero)) if line else "")
    return Html("".join([*whole, *parts]) + "</div>")


def _title(name: str) -> str:
    """What `val_METRIC/SOURCE` is."""
    metric, _, source = name.removeprefix("val_").partition("/")
    return f"{metric} of {source} (validation)"


def _real(line: Sequence[Point]) -> list[Point]:
    return [point for point in line if point[1] == point[1]]


def run_report(folder: str | Path) -> Path | None:
    """Write `report.html` into a run's folder; None, with a warning in the log, where there is
    nothing to write or no way to: a picture must never stop a training run.
    """
    folder = Path(folder)
    try:
        path = folder / "report.html"
        write_text(path, run_page(folder))
        return path
    except Exception as error:
        log.warning("no report of %s: %s", folder, error)
        return None


def run_page(folder: Path) -> str:
    """The page of a run, from what is in its folder by now.

    Raises:
      OSError: it has no metrics yet.
    """
    records, config = read_metrics(folder / "metrics.jsonl"), Record()
    if (path := folder / "config.json").exists():
        config = _left_out_if_damaged(path, dict[str, Any]) or {}
    told, place = to_json(config), shlex.quote(str(folder))
    words = f"jaxgpt sample {place} --prompt 'Once upon a time'"
    asked = ('"kind": "Chat"', '"kind": "Prompts"', '"held_out": ')  # the last of tasks
    if any(word in told for word in asked) and '"template": "none"' not in told:
        words = f"jaxgpt chat {place}"
    elif '"kind": "Classification"' in told or '"kind": "MaskedLM"' in told:
        words = f"jaxgpt eval {place}"
    sections: list[Any] = [
        ("Key figures", facts(_best(folder) | _figures(records, config))),
        ("Curves", curves(records)),
    ]
    if made := _samples(folder):
        sections.append(("Samples during training", made))
    if tables := _evaluations(folder):
        sections.append(("Evaluations", *tables))
    profiles = [_left_out_if_damaged(path, Profiled) for path in sorted(folder.glob(PROFILES))]
    if made := [profile_section(found) for found in profiles if found and found["operations"]]:
        sections.append(("Where the time goes", *made))
    if about := _what_it_was(folder):
        sections.append(("What it was", *about))
    return render(f"Run {folder.resolve().name}", [*sections, ("Try it", commands(words))])


def _what_it_was(folder: Path) -> list[Html]:
    """The settings that are not the default ones, and where the last start was."""
    parts = []
    if not (folder / "config.json").is_file():
        return parts
    try:
        fields = changed_fields(load(folder))
        rows = [{"Field": name, "Value": to_json(value)} for name, value in fields.items()]
        parts.append(table(rows, "Settings that differ from the defaults") if rows else text("All defaults."))
    except UserError as error:
        log.warning("%s", error)
    starts = sorted(folder.glob("provenance/*.json"), key=lambda p: int(p.stem) if p.stem.isdecimal() else 0)
    held = _left_out_if_damaged(starts[-1], Start) if starts else None
    if held:
        about = held["environment"]
        versions = about.get("versions") or {}
        shown_versions = ", ".join(f"{n} {v}" for n, v in versions.items() if v)
        rows = [
            {"": "Started", "Value": f"{held['time']} on {held['host']}, the {_nth(len(starts))} start"},
            {"": "Command", "Value": held["command"]},
            {"": "Devices", "Value": f"{about.get('devices')} x {about.get('device')}"},
            {"": "Git revision", "Value": about.get("git") or "none"},
            {"": "Python", "Value": f"{about.get('python')}; {shown_versions}"},
        ]
        parts.append(table(rows, "Environment"))
    return parts


def _nth(number: int) -> str:
    return {1: "first", 2: "second", 3: "third"}.get(number, f"{number}th")


def _samples(folder: Path) -> Html | None:
    """What was written for each prompt at the first, the middle and the last evaluations."""
    path = folder / "samples.jsonl"
    if not path.is_file():
        return None
    found: dict[str, list[Sample]] = {}
    for line in path.read_bytes().split(b"\n"):
        with suppress(UserError):  # the last line may be cut off
            one = parse_json(line, Sample, path, "it is left out") if line.strip() else None
            found.setdefault(one["prompt"] if one else "", []).extend([one] if one else [])
    rows = [
        {"Prompt": prompt, "Step": one["step"], "Written": one["text"]}
        for prompt, made in found.items()
        for one in _few(made)
    ]
    return table(rows, "Greedy continuations of validation data") if rows else None


def _few(made: Sequence[T], most: int = 4) -> list[T]:
    """The first, the last, and some between."""
    if len(made) <= most:
        return list(made)
    return [made[round(i * (len(made) - 1) / (most - 1))] for i in range(most)]


def _evaluations(folder: Path) -> list[Html]:
    """What `jaxgpt eval` left in a run's folder, a table each."""
    tables = []
    for path in sorted(folder.glob("eval/*.json")):
        found = _left_out_if_damaged(path, Evaluation)
        if found is None:
            continue
        figures: list[Any] = list(found["figures"].values())
        tables.append(table(figures, f"{found['title']}, step {found['step']}"))
        if classes := found.get("classes"):
            rows = [{name.capitalize(): value for name, value in row.items()} for row in classes]
            tables.append(table(rows, "Each label", shares=("Precision", "Recall", "F1")))
        elif report := found.get("report"):  # of an older version
            tables.append(Html(f'<pre class="card" tabindex="0">{escaped(report)}</pre>'))
        tables += [reliability_picture(t, bins) for t, bins in found.get("reliability", {}).items()]
        labels, counts = found.get("confusion", ([], []))
        if [len(row) for row in counts] != [len(labels)] * len(labels):
            log.warning("%s has no row and column of counts for each label; the picture is left out", path)
        elif labels:
            tables.append(confusion_picture(labels, np.asarray(counts)))
    return tables


def _best(folder: Path) -> dict[str, Any]:
    """By which metric of a task the best checkpoint was chosen, if by one."""
    found = _left_out_if_damaged(folder / "best.json", Best) if (folder / "best.json").exists() else None
    if found is None or ":" not in found["by"]:
        return {}
    way = "highest" if found["higher_is_better"] else "lowest"
    return {f"Best {found['by']}": (found["value"], f"the {way}, at step {found['step']:,}")}


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
    rewards = [p for p in points(records, "val_reward") if p[1] == p[1]]
    at, earned = max(rewards, key=lambda p: p[1], default=(0, None))
    speed = [v for _, v in points(records, "tokens_per_second") if v == v]
    compiled = [r for r in records if r.get("event") == "compiled"]
    size = next((r["parameters"] for r in reversed(compiled) if "parameters" in r), config.get("parameters"))
    per_step = next((r["tokens_per_step"] for r in reversed(compiled) if "tokens_per_step" in r), None)
    steps = max((step for step, _ in points(records, "loss")), default=0)
    epochs = [v for _, v in points(records, "epoch") if v == v]
    found = {
        "Best validation loss": (best.get("val_loss"), f"nats per target, at step {shown(best.get('step'))}"),
        "Best validation reward": (earned, f"mean of completions, at step {at:,}"),
        "Best validation accuracy": (right, f"share of targets that were likeliest, at step {step:,}"),
        "Bits per byte": (best.get("val_bits_per_byte"), "of validation text, at that step"),
        "Tokens per second": (median(speed) if speed else None, "median"),
        "Parameters": (size, ""),
        "Tokens trained on": (
            None if per_step is None else steps * per_step,
            f"{epochs[-1]:.3g} epochs" if epochs else "",
        ),
    }
    for record in compiled:
        seconds = [drawable(v) for k, v in record.items() if k.endswith("_seconds")]
        found["Seconds to compile"] = sum(seconds), "trace, lower and compile"
    return {name: pair for name, pair in found.items() if pair[0] is not None}
