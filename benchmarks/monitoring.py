"""How soon a surge of negative texts is noticed, and how often there is a false alarm, on SST-2.

    python -m benchmarks.monitoring ../shared/data --run runs/classify_sst2 [--out FILE]

The run is that of configs/classify_sst2.py. It labels SST-2's test file once. A stream draws from these
texts, a share of 0.25 of them negative by their gold label; in a surge, 1,000 texts long, a larger
share. The monitor sees predicted labels alone. Each stream first shows 2,000 texts from which the
monitor learns what is usual (or it is told what share the classifier finds in such texts), then 10,000
quiet ones, then the surge, then 2,000 quiet ones. All charts have the same windows (50) and in-control
run length (1,000 windows) and see the same streams.

An alarm is true when it begins in the surge or in the window after it. Precision is the share of true
ones among all alarms; delay is counted in texts from the first one of the surge to the end of the window
that alarmed.
"""

from __future__ import annotations

import functools
import json
import math
import sys
import time
from pathlib import Path
from statistics import mean, median
from typing import Annotated, Any

import numpy as np
import tyro

from benchmarks.common import machine
from jaxgpt.data.readers.labelled import read_labelled
from jaxgpt.evals.control_charts import Charting, make_chart, run_length_at
from jaxgpt.evals.predict import classify
from jaxgpt.sample.load import load_trained

NEGATIVE, USUAL, WINDOW, RUN_LENGTH = "0", 0.25, 50, 1000.0
LEARN, QUIET, SURGE, AFTER = 2000, 10_000, 1000, 2000
SURGES = (0.35, 0.45, 0.6)
CHARTS = ("p", "ewma", "cusum")


def counts(drawn: np.random.Generator, rates: tuple[float, float], share: float, windows: int) -> np.ndarray:
    """Predicted negatives in each window of a stream with a share of gold negatives.

    Args:
      drawn: where chance comes from.
      rates: shares of gold negatives and of gold positives that the classifier calls negative.
      share: of gold negatives.
      windows: how many.
    """
    gold = drawn.binomial(WINDOW, share, windows)
    return drawn.binomial(gold, rates[0]) + drawn.binomial(WINDOW - gold, rates[1])


chart_of = functools.cache(make_chart)


def one_stream(stream: np.ndarray, how: Charting, usual: float) -> list[int]:
    """Numbers of the windows in which an alarm began."""
    chart = chart_of(how, usual)
    statistic, alarm, begun = chart.start, False, list[int]()
    for i, count in enumerate(stream):
        statistic, before = chart.add(statistic, int(count)), alarm
        alarm = statistic > chart.limit
        begun += [i] * (alarm and not before)
    return begun


def measure(
    kind: str, surge: float, rates: tuple[float, float], streams: int, learned: bool, seed: int
) -> dict[str, Any]:
    """The figures of a chart on so many streams with such a surge."""
    how = Charting(chart=kind, window=WINDOW, run_length=RUN_LENGTH)  # type: ignore[arg-type]
    truth = USUAL * rates[0] + (1 - USUAL) * rates[1]
    first, last = QUIET // WINDOW, (QUIET + SURGE) // WINDOW
    false, true, delays, missed = 0, 0, list[int](), 0
    for number in range(streams):
        drawn = np.random.default_rng((seed, number))
        found = drawn.binomial(LEARN, truth)
        parts = ((USUAL, first), (surge, last - first), (USUAL, AFTER // WINDOW))
        stream = np.concatenate([counts(drawn, rates, share, windows) for share, windows in parts])
        usual = round((found + 0.5) / (LEARN + 1), 3) if learned else truth
        begun = one_stream(stream, how, usual)
        right = [i for i in begun if first <= i <= last]
        true, false = true + len(right), false + len(begun) - len(right)
        delays += [(right[0] - first + 1) * WINDOW] if right else []
        missed += not right
    quiet = streams * (QUIET + AFTER) / WINDOW
    return {
        "chart": kind, "usual share": "learned" if learned else "known", "surge": surge,
        "precision": 100 * true / max(1, true + false), "found": 100 * (1 - missed / streams),
        "mean delay": mean(delays) if delays else math.nan,
        "median delay": median(delays) if delays else math.nan,
        "p90 delay": float(np.quantile(delays, 0.9)) if delays else math.nan,
        "windows per false alarm": quiet / false if false else math.inf,
    }  # fmt: skip


def labelled(data: Path, run: Path) -> tuple[tuple[float, float], float]:
    """Shares of gold negatives and of gold positives that the run calls negative, and its accuracy."""
    examples = read_labelled([data / "sst2" / "test.tsv"])
    found = classify(load_trained(run), [e.text for e in examples])
    by = {
        gold: [f.label == NEGATIVE for e, f in zip(examples, found, strict=True) if e.label == gold]
        for gold in ("0", "1")
    }
    accuracy = mean(e.label == f.label for e, f in zip(examples, found, strict=True))
    return (mean(by["0"]), mean(by["1"])), accuracy


def main(
    data: Annotated[Path, tyro.conf.Positional],
    *,
    run: Path,
    streams: int = 200,
    seed: int = 0,
    out: str = "",
) -> None:
    begun = time.perf_counter()
    rates, accuracy = labelled(data, run)
    usual = USUAL * rates[0] + (1 - USUAL) * rates[1]
    about = {"command": " ".join(sys.argv), **machine(), "accuracy": accuracy, "called negative": rates}
    print(
        f"\n`{about['command']}`\n{about['cpu']}, load {about['load']}\naccuracy {accuracy:.3f}; negative are"
    )
    print(f"{rates[0]:.3f} of negatives, {rates[1]:.3f} of positives, {usual:.3f} of a quiet stream\n")
    print(f"| chart | own run length | windows to an alarm in a surge of {SURGES} |\n|---|---:|---|")
    for kind in CHARTS:
        how = Charting(chart=kind, window=WINDOW, run_length=RUN_LENGTH)  # type: ignore[arg-type]
        chart = make_chart(how, usual)
        lengths = [run_length_at(chart, how, s * rates[0] + (1 - s) * rates[1]) for s in SURGES]
        print(f"| {kind} | {chart.run_length:.0f} | {', '.join(f'{x:.1f}' for x in lengths)} |")
    rows = [
        measure(kind, surge, rates, streams, learned, seed)
        for learned in (False, True)
        for surge in SURGES
        for kind in CHARTS
    ]
    print("\n| " + " | ".join(rows[0]) + " |\n|---|---|" + "---:|" * (len(rows[0]) - 2))
    for row in rows:
        print("| " + " | ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()) + " |")
    print(f"\n{time.perf_counter() - begun:.0f} s")
    if out:
        with Path(out).open("a", encoding="utf-8") as file:
            file.write(json.dumps(about | {"rows": rows}) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
