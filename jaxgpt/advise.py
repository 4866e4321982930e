"""`jaxgpt advise RUN`: what a run's curves say, and what to try next.

A rule looks at one thing and answers with a finding, which names its numbers, and with what to try.
Thresholds are rules of thumb, each given where it is used; they decide what is said, not what is done.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from jaxgpt.config import Run, load_run
from jaxgpt.errors import require
from jaxgpt.files import to_json
from jaxgpt.report.charts import Point, points
from jaxgpt.report.run import read_metrics

Folder = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
Switch = Annotated[bool, tyro.conf.FlagCreatePairsOff]


@dataclass(frozen=True)
class Advice:
    """One finding.

    Attributes:
      about: what it is about: a part of training in a word or two.
      finding: what was seen, with its numbers.
      attempt: what to try, by fields of the config; empty where nothing needs to change.
    """

    about: str
    finding: str
    attempt: str = ""


class Curves:
    """A run's config and the lines in its metrics.

    Attributes:
      train: (step, training loss) of the log records.
      smoothed: the same, each a mean over a tenth of all records around it.
      validation: (step, validation loss) of the evaluations.
    """

    def __init__(self, run: Run, records: Sequence[dict[str, Any]]) -> None:
        self.run, self.records = run, records
        self.train = self.line("loss")
        self.smoothed = _smoothed(self.train)
        self.validation = self.line("val_loss")

    def line(self, name: str) -> list[Point]:
        """(step, value) of the records where it is a number."""
        return [(step, y) for step, y in points(self.records, name) if math.isfinite(y)]

    @property
    def last(self) -> int:
        """The last step on record."""
        return max((int(step) for step, _ in self.train), default=0)

    def rate(self, step: float) -> float:
        """The learning rate at a step, as a share of the peak."""
        at = [y for s, y in self.line("learning_rate") if s <= step]
        return at[-1] / self.run.optim.peak_lr if at else math.nan


def _smoothed(line: Sequence[Point]) -> list[Point]:
    half = max(1, len(line) // 20)
    values = [y for _, y in line]
    return [
        (step, statistics.fmean(values[max(0, i - half) : i + half + 1])) for i, (step, _) in enumerate(line)
    ]


def _part(line: Sequence[Point], start: float, end: float) -> list[float]:
    """The values between two shares of a line's steps."""
    last = line[-1][0] if line else 0
    return [y for step, y in line if start * last <= step <= end * last]


# ------------------------------------------------------------------------------------------- the rules


def skipped(c: Curves) -> Advice | None:
    """Any update that was left out, since its loss or gradient was not finite."""
    count = max((y for _, y in c.line("skipped")), default=0.0)
    if not count:
        return None
    return Advice(
        "skipped updates",
        f"{count:.0f} of {c.last} updates were skipped, their loss or gradient not being finite",
        f"lower optim.peak_lr ({c.run.optim.peak_lr:g}) or lengthen optim.warmup_steps "
        f"({c.run.optim.warmup_steps}); `jaxgpt lr-find` shows how far it may rise",
    )


def spikes(c: Curves) -> Advice | None:
    """A record half as high again as the median of the ten before it, at least two of them."""
    values = [y for _, y in c.train]
    found = [
        (step, y)
        for i, (step, y) in enumerate(c.train)
        if i >= 10 and y > 1.5 * statistics.median(values[i - 10 : i])
    ]
    if len(found) < 2:
        return None
    step, y = max(found, key=lambda p: p[1])
    clip = c.run.optim.clip_norm
    more = "" if clip else ", and set optim.clip_norm (now 0, off) to 1"
    return Advice(
        "loss spikes",
        f"the training loss jumped to 1.5 times what it was or more {len(found)} times, to {y:.3g} at step "
        f"{step:.0f} at the highest",
        f"lower optim.peak_lr ({c.run.optim.peak_lr:g}) or lengthen optim.warmup_steps "
        f"({c.run.optim.warmup_steps}){more}",
    )


def divergence(c: Curves) -> Advice | None:
    """The smoothed training loss ends a tenth above its lowest value."""
    if len(c.smoothed) < 5:
        return None
    step, low = min(c.smoothed, key=lambda p: p[1])
    end = c.smoothed[-1][1]
    if end < 1.1 * low or low <= 0:
        return None
    return Advice(
        "divergence",
        f"the smoothed training loss rose from {low:.4g} at step {step:.0f} to {end:.4g} at step {c.last}",
        f"lower optim.peak_lr ({c.run.optim.peak_lr:g}) and go on from before step {step:.0f}; "
        "`jaxgpt lr-find` shows where the loss breaks away",
    )


def plateau(c: Curves) -> Advice | None:
    """The smoothed loss fell by less than 0.5 % over the last third, at a rate above 30 % of the peak."""
    late = _part(c.smoothed, 2 / 3, 1)
    rate = c.rate(c.last)
    falls = c.run.optim.schedule in ("cosine", "linear")  # by itself
    if falls or len(late) < 5 or not rate > 0.3 or late[0] <= 0 or late[-1] < 0.995 * late[0]:
        return None
    if late[-1] > 1.05 * late[0]:  # that is divergence
        return None
    return Advice(
        "plateau",
        f"the smoothed training loss was {late[0]:.4g} at two thirds and {late[-1]:.4g} at the end, while "
        f"the learning rate still was {rate:.0%} of its peak",
        f"let the rate fall: optim.schedule 'cosine', or 'wsd' over the last steps (now "
        f"{c.run.optim.schedule!r}); if it never fell fast either, find a rate with `jaxgpt lr-find`",
    )


def still_falling(c: Curves) -> Advice | None:
    """Training and validation loss fell by 2 % or more over the last fifth."""
    drops = []
    for line in (c.smoothed, c.validation):
        part = _part(line, 0.8, 1)
        if len(part) < 2 or part[0] <= 0:
            return None
        drops.append((part[0] - part[-1]) / part[0])
    if min(drops) < 0.02:
        return None
    return Advice(
        "too few steps",
        f"over the last fifth the training loss still fell by {drops[0]:.1%} and the validation loss by "
        f"{drops[1]:.1%}",
        f"train longer: raise train.steps ({c.run.train.steps})",
    )


def overfitting(c: Curves) -> Advice | None:
    """Two evaluations or more after the lowest validation loss it is 1 % higher, the training loss lower."""
    if len(c.validation) < 3 or not c.smoothed:
        return None
    at = min(range(len(c.validation)), key=lambda i: c.validation[i][1])
    (step, low), end = c.validation[at], c.validation[-1][1]
    before = [y for s, y in c.smoothed if s <= step] or [c.smoothed[0][1]]
    if len(c.validation) - 1 - at < 2 or end < 1.01 * low or c.smoothed[-1][1] >= before[-1]:
        return None
    patience = "" if c.run.train.patience else "; train.patience=3 stops in time"
    on = ", ".join(type(m).__name__ for m in getattr(c.run, "measures", ()))
    return Advice(
        "overfitting",
        f"the validation loss was lowest, {low:.4g}, at step {step:.0f} and ended at {end:.4g}, while the "
        f"training loss fell from {before[-1]:.4g} to {c.smoothed[-1][1]:.4g}",
        "more data (or fewer passes over them), model.dropout, a tune other than Full, or measures: label "
        f"smoothing, R-Drop, NEFTune, EMA, FGM (now: {on or 'none'}; docs/measures.md){patience}. The best "
        "checkpoint was kept, so the run is not lost",
    )


def noisy_evaluation(c: Curves) -> Advice | None:
    """Successive validation losses differ by more than twice what they gained over the last half."""
    late = _part(c.validation, 0.5, 1)
    if len(late) < 5 or not c.run.train.eval_batches:
        return None
    half = len(late) // 2
    noise = statistics.median(abs(b - a) for a, b in itertools.pairwise(late))
    gain = statistics.fmean(late[:half]) - statistics.fmean(late[half:])
    if noise < 0.002 * late[-1] or noise < 2 * abs(gain):
        return None
    return Advice(
        "evaluation",
        f"neighbouring validation losses differ by {noise:.3g}, more than was gained in the last half "
        f"({gain:.3g}), so the best checkpoint is partly chosen by chance",
        f"raise train.eval_batches ({c.run.train.eval_batches}), or set it to 0 for all of the data",
    )


def batch_size(c: Curves) -> Advice:
    """The batch against the gradient noise scale (McCandlish et al. 2018): far below, or far above."""
    found = [y for _, y in c.line("noise_scale") if y > 0]
    size = c.run.train.batch_size
    if not found:
        return Advice("batch size", "the gradient noise scale was not measured (train.noise_scale)")
    scale = statistics.median(found[len(found) // 2 :])
    seen = f"the gradient noise scale is about {scale:.3g} rows and the batch has {size}"
    if size < scale / 4:
        return Advice(
            "batch size", seen + ", so a step follows mostly noise",
            "a larger train.batch_size takes fewer steps at almost no more data, and bears a higher rate",
        )  # fmt: skip
    if size > 4 * scale:
        return Advice(
            "batch size", seen + ", so most of its rows say the same",
            "a smaller train.batch_size reaches the same loss with less data",
        )  # fmt: skip
    return Advice("batch size", seen + ", which is well chosen")


def data_wait(c: Curves) -> Advice | None:
    """More than a tenth of the time went into waiting for data."""
    waits = [y for _, y in c.line("data_wait")]
    if len(waits) < 3 or statistics.median(waits) < 0.1:
        return None
    return Advice(
        "input",
        f"{statistics.median(waits):.0%} of a step is spent waiting for data",
        f"raise data.workers ({getattr(c.run.data, 'workers', 0)}), or put the data on a faster disk",
    )


def slower(c: Curves) -> Advice | None:
    """The last quarter was slower than the first by a fifth."""
    speeds = c.line("tokens_per_second")
    first, last = _part(speeds, 0, 0.25), _part(speeds, 0.75, 1)
    if min(len(first), len(last)) < 3:
        return None
    a, b = statistics.median(first), statistics.median(last)
    if b > 0.8 * a:
        return None
    return Advice(
        "speed",
        f"{b:,.0f} tokens per second in the last quarter, {a:,.0f} in the first",
        "look for other work on the machine, or for heat; the run itself does the same in every step",
    )


RULES: tuple[Callable[[Curves], Advice | None], ...] = (
    skipped, divergence, spikes, plateau, still_falling, overfitting, noisy_evaluation, batch_size, data_wait,
    slower,
)  # fmt: skip


def advice_on(run: Run, records: Sequence[dict[str, Any]]) -> list[Advice]:
    """What the records of a `metrics.jsonl` say about its run, by every rule in turn."""
    curves = Curves(run, records)
    return [found for rule in RULES if (found := rule(curves)) is not None]


def advise(run: Folder, *, json: Switch = False) -> None:
    """Read a run's curves and say what to try next, with the numbers that each advice rests on.

    Args:
      run: folder of the run; it may still be training.
      json: print one JSON object per finding instead.

    Raises:
      UserError: the folder is none of a run, or nothing is on record.
    """
    config, path = load_run(run), Path(run) / "metrics.jsonl"
    require(path.is_file(), f"{path} does not exist, so nothing can be read; name a run that was trained.")
    records = read_metrics(path)
    found = advice_on(config, records)
    require(
        any("loss" in record for record in records),
        f"{path} holds no training loss yet; train on for a few steps.",
    )
    for one in found:
        if json:
            print(to_json(asdict(one)))
            continue
        print(f"{one.about}: {one.finding}." + (f"\n    Try: {one.attempt}." if one.attempt else ""))
    if not json and not any(one.attempt for one in found):
        print("Nothing in the curves asks for a change.")
