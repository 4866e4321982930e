"""`jaxgpt lr-find CONFIG`: the learning-rate range test."""

from __future__ import annotations

import math
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from jaxgpt.config import Optim, Run
from jaxgpt.errors import UserError, require
from jaxgpt.files import require_writable, write_json
from jaxgpt.report import page
from jaxgpt.report.run import read_metrics
from jaxgpt.report.xy import xy_chart
from jaxgpt.train.command import read_args

LOWEST, HIGHEST, STEPS = "--lowest", "--highest", "--steps"
DEFAULTS = {LOWEST: 1e-6, HIGHEST: 1.0, STEPS: 100.0}
FEWEST = 20
"""Steps that a range needs."""
HELP = f"""Find a learning rate for a config: train it for a few steps while the rate rises exponentially, and
see where the loss falls fastest and where it breaks away (Smith 2017, section 3.3). {LOWEST}
{DEFAULTS[LOWEST]:g} and {HIGHEST} {DEFAULTS[HIGHEST]:g} are its ends, {STEPS} {DEFAULTS[STEPS]:.0f} its
length; every other option sets a field of the config. Nothing is trained in the run's own folder; the curve
is written beside it, as NAME-lr-find.html and .json.
"""


@dataclass(frozen=True)
class Found:
    """What a range test found.

    Attributes:
      steepest: the learning rate where the smoothed loss falls fastest.
      lowest: where it is lowest; well below it, training is stable.
      suggestion: peak learning rate to begin with: the smaller of `steepest` and a tenth of `lowest`.
      broke_at: the first rate with a loss of four times the lowest; None where none had.
    """

    steepest: float
    lowest: float
    suggestion: float
    broke_at: float | None


def lr_find(args: list[str]) -> int:
    """Run the test and write its curve."""
    values, args = _own_options(args)
    run = read_args(args, "lr-find", HELP)
    steps = int(values[STEPS])
    require(
        values[STEPS] == steps >= FEWEST,
        f"{STEPS} is {values[STEPS]:g}; give a whole number of at least {FEWEST}.",
    )
    require(
        0 < values[LOWEST] < values[HIGHEST] <= 1e6,
        f"{LOWEST} is {values[LOWEST]:g} and {HIGHEST} {values[HIGHEST]:g}; give 0 < lowest < highest.",
    )
    place = Path(run.runs) / f"{run.name}-lr-find"
    require_writable(place.parent)
    rates, losses = range_test(run, values[LOWEST], values[HIGHEST], steps)
    smoothed = smooth(losses)
    found = suggest(rates, smoothed)
    record = {"command": f"jaxgpt lr-find {' '.join(args)}", "learning_rate": rates, "loss": losses}
    write_json(place.with_suffix(".json"), record | {"smoothed": smoothed} | asdict(found))
    _write_page(place.with_suffix(".html"), run, rates, losses, smoothed, found)
    broke = f"broke away at {found.broke_at:.2g}" if found.broke_at else "never broke away"
    print(
        f"loss falls fastest at learning rate {found.steepest:.2g}, is lowest at {found.lowest:.2g} and "
        f"{broke}; "
        f"try --optim.peak-lr {found.suggestion:.2g} (see {place}.html)"
    )
    return 0


def _own_options(args: list[str]) -> tuple[dict[str, float], list[str]]:
    values, rest = dict(DEFAULTS), list(args)
    for name in DEFAULTS:
        if name in rest:
            at = rest.index(name)
            given = rest[at + 1] if at + 1 < len(rest) else ""
            try:
                values[name] = float(given)
            except ValueError:
                raise UserError(f"{name} is {given!r}; give a number.") from None
            rest = rest[:at] + rest[at + 2 :]
    return values, rest


def range_test(run: Run, lowest: float, highest: float, steps: int) -> tuple[list[float], list[float]]:
    """The learning rate and the training loss of each step, up to the one where the loss breaks away.

    Args:
      run: the config; its own schedule and length play no part.
      lowest, highest: learning rates of the first and the last step.
      steps: number of steps.
    """
    from jaxgpt.train import loop

    # Steps are real ones of the config's own program; nothing is evaluated, and what is saved goes away.
    optim = replace(run.optim, peak_lr=highest, final_lr=lowest, schedule="range", warmup_steps=0)
    quiet = {"log_every": 1, "eval_every": steps, "eval_batches": 1, "save_every": steps, "samples": 0}
    train = replace(
        run.train,
        steps=steps,
        epochs=None,
        patience=0,
        best_by="loss",
        best_holds="params",
        track=(),
        **quiet,
    )
    with tempfile.TemporaryDirectory(prefix="jaxgpt-lr-find-") as folder:
        trial = replace(run, runs=folder, optim=optim, train=train)
        try:
            loop.train(trial)
        except loop.Diverged as error:
            print(f"the range ends early: {error}", file=sys.stderr)
        records = [r for r in read_metrics(trial.folder / "metrics.jsonl") if "learning_rate" in r]
    pairs = [(r["learning_rate"], r["loss"]) for r in records if math.isfinite(r["loss"] or math.nan)]
    require(
        len(pairs) > 2,
        f"the loss was finite at {len(pairs)} steps alone; lower {LOWEST} or look at the data.",
    )
    rates, losses = map(list, zip(*pairs, strict=True))
    return rates, losses


def smooth(losses: list[float], half: int = 3) -> list[float]:
    """Of each place the median of the losses around it, then the mean of these, `half` on either side.

    Unlike a moving average over what is past, it neither lags behind nor drags a single spike along.
    """
    found = losses
    for middle in (np.median, np.mean):
        found = [float(middle(found[max(0, i - half) : i + half + 1])) for i in range(len(found))]
    return found


def suggest(rates: list[float], smoothed: list[float]) -> Found:
    """Read a smoothed curve of losses over learning rates."""
    at = int(np.argmin(smoothed))
    broke = next((r for r, y in zip(rates[at:], smoothed[at:], strict=True) if y > 4 * smoothed[at]), None)
    slope = np.gradient(np.asarray(smoothed), np.log(rates))
    steepest, lowest = rates[int(np.argmin(slope[: at + 1]))], rates[at]
    return Found(steepest, lowest, min(steepest, lowest / 10), broke)


def _write_page(
    path: Path, run: Run, rates: list[float], losses: list[float], smoothed: list[float], found: Found
) -> None:
    marks = {
        "steepest": (found.steepest, smoothed[rates.index(found.steepest)]),
        "lowest": (found.lowest, smoothed[rates.index(found.lowest)]),
    }
    top = 1.5 * max(smoothed[0], min(smoothed))
    shown = [(r, y) for r, y in zip(rates, smoothed, strict=True) if y <= top]
    faint = [(r, y) for r, y in zip(rates, losses, strict=True) if y <= top]
    chart = xy_chart("Training loss, smoothed", "learning rate", faint, shown, marks)
    default = Optim.__dataclass_fields__["peak_lr"].default
    facts = {
        "Suggested peak": found.suggestion,
        "The config has": (run.optim.peak_lr, "the default" if run.optim.peak_lr == default else ""),
        "Loss lowest at": found.lowest,
        "Breaks away at": found.broke_at,
    }
    how = (
        "The learning rate rises exponentially over the steps of one run. The suggestion is the smaller of "
        "the "
        "rate where the loss falls fastest and a tenth of the one where it is lowest: a place to begin, not "
        "an "
        "optimum. A longer run, a warm-up and a larger batch bear higher rates."
    )
    page.write(path, f"Learning-rate range of {run.name}", [("Range test", page.facts(facts), chart, how)])
