"""What a metric is: rows of statistics that add up, so that every one is resampled and compared alike.

Shapes: N examples (or groups of them), K statistics, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jaxgpt.errors import require


@dataclass(frozen=True)
class Prediction:
    """One example of a task and what a model made of it.

    Attributes:
      sample: the example (`config.tasks.Sample`): its right answers, choices and facts are what metrics read.
      prompt: what the model was asked, as text.
      text: its completion.
      answer: what the task extracted from it; empty where there was nothing.
      language: of the answers, which decides how metrics split text.
      logprobs: of the completion's tokens, in nats.
      choices: log-likelihood of each of the sample's choices, in nats; empty where they were not scored.
      reference: log-likelihood in nats and number of tokens of the first right answer; None where not scored.
    """

    sample: Any
    prompt: str
    text: str
    answer: str
    language: str = "en"
    logprobs: tuple[float, ...] = ()
    choices: tuple[float, ...] = ()
    reference: tuple[float, int] | None = None


class Metric(NamedTuple):
    """A metric of predictions.

    Attributes:
      title: its name in full.
      statistics: predictions to an array [N, K], a row for each or for each group of them.
      score: the metric, of the sum over rows [K], or of the rows [N, K] themselves where `whole`.
      higher_is_better: which way is better.
      whole: see `score`.
      resampled: whether an interval by resampling makes sense.
      signature: by language, what a published figure must name beside the metric.
      needs: `choices` or `reference` where predictions must have them.
    """

    title: str
    statistics: Callable[[Sequence[Prediction]], np.ndarray]
    score: Callable[[np.ndarray], float]
    higher_is_better: bool = True
    whole: bool = False
    resampled: bool = True
    signature: Callable[[str], str] = lambda language: ""
    needs: str = ""

    def of(self, rows: np.ndarray) -> float:
        """The value, of rows of statistics."""
        return float(self.score(rows if self.whole else rows.sum(0)))


class Interval(NamedTuple):
    """A value and the interval that resampling gives; None where a metric has none."""

    value: float
    low: float | None
    high: float | None


class Paired(NamedTuple):
    """How one model differs from another on the same examples.

    Attributes:
      difference: its value less the other's, with the interval of resampled examples.
      p: two-sided, of the permutation test that exchanges the models' predictions at random.
    """

    difference: Interval
    p: float


RESAMPLES = 1000
LEVEL = 0.95


def mean_of(value: Callable[[Prediction], float]) -> Callable[[Sequence[Prediction]], np.ndarray]:
    """Statistics of a mean over examples: the value and 1; what is NaN is left out of the mean."""

    def statistics(predictions: Sequence[Prediction]) -> np.ndarray:
        values = np.asarray([value(p) for p in predictions], np.float64).reshape(-1)
        known = ~np.isnan(values)
        return np.stack([np.where(known, values, 0.0), known], axis=1)

    return statistics


def ratio(sums: np.ndarray) -> float:
    """The first sum over the second; NaN where that is 0."""
    return float(sums[0] / sums[1]) if sums[1] else math.nan


def interval(metric: Metric, rows: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """The metric and its percentile interval over bootstrap samples of the rows (Efron 1979; for machine
    translation Koehn 2004).

    Args:
      metric: the metric.
      rows: its statistics [N, K].
      resamples: R; 0 for no interval.
      seed: of the samples.
    """
    value = metric.of(rows)
    if not (metric.resampled and resamples and len(rows) > 1):
        return Interval(value, None, None)
    found = np.asarray([metric.of(rows[at]) for at in _drawn(len(rows), resamples, seed)])
    return Interval(value, *_ends(found))


def compare(
    metric: Metric, ours: np.ndarray, theirs: np.ndarray, resamples: int = RESAMPLES, seed: int = 0
) -> Paired:
    """How one model's metric differs from another's, of statistics [N, K] of the same examples.

    The interval is a bootstrap's over examples; p is of an approximate randomisation test (Noreen 1989;
    Riezler and Maxwell 2005), as `scipy.stats.permutation_test` of paired samples has it.
    """
    require(
        ours.shape == theirs.shape,
        f"the two runs have statistics of shapes {ours.shape} and {theirs.shape}; compare predictions of the "
        "same examples.",
    )
    difference = metric.of(ours) - metric.of(theirs)
    if not (metric.resampled and resamples and len(ours) > 1):
        return Paired(Interval(difference, None, None), math.nan)
    found = [metric.of(ours[at]) - metric.of(theirs[at]) for at in _drawn(len(ours), resamples, seed)]
    rng, extreme = np.random.default_rng([seed, 1]), 0
    for _ in range(resamples):
        swap = rng.random(len(ours)) < 0.5
        a, b = np.where(swap[:, None], theirs, ours), np.where(swap[:, None], ours, theirs)
        extreme += abs(metric.of(a) - metric.of(b)) >= abs(difference) - 1e-12
    p = (1 + extreme) / (1 + resamples)
    return Paired(Interval(difference, *_ends(np.asarray(found))), p)


def _drawn(count: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """R times the places of N rows, drawn with replacement; one at a time, since R N places may not fit."""
    rng = np.random.default_rng(seed)
    return (rng.integers(count, size=count) for _ in range(resamples))


def _ends(values: np.ndarray) -> tuple[float, float]:
    if np.isnan(values).all():
        return math.nan, math.nan
    low, high = np.nanquantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
