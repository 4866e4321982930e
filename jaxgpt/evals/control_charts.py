"""Control charts of a share: whether what is counted in a stream has become more frequent.

A window of n texts holds x that are counted, Binomial(n, p) while nothing changes. A chart turns the counts
into a statistic and alarms where that is above a limit. The limit is the one with which a false alarm comes
once in `run_length` windows on average while the share stays p (the in-control average run length, ARL0).
That is computed, by the Markov chain of Brook and Evans (1972, Biometrika 59) over a grid of the statistic.

Shapes: M points of the grid, K = n + 1 counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from math import lgamma, log
from typing import Annotated, Literal

import numpy as np

from jaxgpt.config.bounds import Bounds
from jaxgpt.config.check import check_types
from jaxgpt.errors import require

POINTS = 500
"""Of the grid: run lengths are within 10 % of simulated ones."""
ROUGH, MARGIN = 80, 0.15
"""Points of a first search, and the part of a limit by which it may be wrong."""
HALVINGS = 12
LONGEST = 1e12
"""Windows between alarms that can be told from never."""
Kind = Literal["p", "ewma", "cusum"]
RunLength = Annotated[float, Bounds(2, 1e6)]
Size = Annotated[int, Bounds(1, 10_000)]
Odds = Annotated[float, Bounds(1.01, 1000)]
Memory = Annotated[float, Bounds(0.01, 1)]


@dataclass(frozen=True, kw_only=True)
class Charting:
    """Which chart, and how often it may be wrong."""

    chart: Kind = "cusum"
    """`p` (Shewhart) looks at each window alone, `ewma` at a running mean, `cusum` at all that came since the
    share was last low (Steiner et al. 2000, Biostatistics 1, section 2)."""
    window: Size = 50
    """Texts of a window."""
    run_length: RunLength = 1000.0
    """Windows from one false alarm to the next, on average."""
    odds: Odds = 2.0
    """What `cusum` finds soonest: the odds of a counted text times this."""
    weight: Memory = 0.2
    """Of the newest window in the mean of `ewma`."""

    def __post_init__(self) -> None:
        check_types(self, "")


@dataclass(frozen=True)
class Chart:
    """A statistic of counts and its limit; `moved` and `start` know no limit.

    Attributes:
      moved: (statistic, count) to the next statistic, of arrays too.
      start: the statistic at the beginning, the lowest that it has.
      limit: it alarms above this.
      run_length: windows between false alarms on average, at most a little more than was asked for.
    """

    moved: Callable
    start: float
    limit: float
    run_length: float

    def add(self, statistic: float, count: int) -> float:
        """The statistic after one more window.

        It is held at twice the limit's height, so that an end shows soon, and begins anew where an alarm
        ends, so that what was left of it makes no other.
        """
        most = self.start + 2 * (self.limit - self.start)
        moved = float(min(self.moved(statistic, count), most))
        return self.start if moved <= self.limit < statistic else moved


def make_chart(how: Charting, share: float) -> Chart:
    """The chart of a share with the limit for its run length.

    Args:
      how: which one.
      share: of counted texts while nothing changes, between 0 and 1.

    Raises:
      UserError: no limit gives that run length with such windows.
    """
    require(0 < share < 1, f"the share is {share:g}; it must lie between 0 and 1.")
    moved, start, high = _statistic(how, share)
    counts_K = _binomial(how.window, share)

    def length(limit: float, points: int = POINTS) -> float:
        return average_run_length(moved, start, limit, counts_K, points)

    require(
        length(high, ROUGH) >= how.run_length,
        f"run_length is {how.run_length:g} but windows of {how.window} texts with a share of {share:.3g} are "
        f"full by chance more often than that; make them larger, or use the chart cusum.",
    )
    rough = _halve(lambda limit: length(limit, ROUGH), how.run_length, start, high) - start
    near = start + (1 + MARGIN) * rough
    high = near if length(near) >= how.run_length else high
    limit = _halve(length, how.run_length, start + (1 - MARGIN) * rough, high)
    return Chart(moved, start, limit, length(limit))


def _halve(length: Callable[[float], float], wanted: float, low: float, high: float) -> float:
    """The least limit with a run length of at least this, to a small part of the interval."""
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if length(middle) >= wanted else (middle, high)
    return high


def run_length_at(chart: Chart, how: Charting, share: float) -> float:
    """Windows to an alarm on average where the share is another one than the chart was made for."""
    return average_run_length(chart.moved, chart.start, chart.limit, _binomial(how.window, share))


def _statistic(how: Charting, share: float) -> tuple[Callable, float, float]:
    """How a statistic moves, its lowest value, and a limit that is surely high enough."""
    n = how.window
    if how.chart == "cusum":  # nats of evidence for the higher odds
        each, rest = log(how.odds), n * log(1 - share + how.odds * share)
        return lambda s, x: np.maximum(0.0, s + x * each - rest), 0.0, 4 * log(how.run_length) + n * each
    weight = 1.0 if how.chart == "p" else how.weight
    return lambda s, x: np.maximum(share, (1 - weight) * s + weight * x / n), share, 1.0 - 0.5 * weight / n


def average_run_length(
    moved: Callable, start: float, limit: float, counts_K: np.ndarray, points: int = POINTS
) -> float:
    """Windows until a statistic is above its limit, on average.

    Args:
      moved: see `Chart`.
      start: its lowest value, where it begins.
      limit: it ends above this.
      counts_K: probability of each count.
      points: of the grid.
    """
    step = max(limit - start, 1e-12) / (points - 1)
    points_M = start + step * np.arange(points)
    next_MK = moved(points_M[:, None], np.arange(len(counts_K))[None, :])
    place_MK = np.clip((next_MK - start) / step, 0, points - 1)
    below_MK = np.minimum(place_MK.astype(int), points - 2)  # its mass is split between two neighbours
    mass_MK = np.where(next_MK > limit, 0.0, counts_K)
    upper_MK = mass_MK * (place_MK - below_MK)
    moves_MM = np.zeros((points, points))
    rows_M1 = np.arange(points)[:, None]
    np.add.at(moves_MM, (rows_M1, below_MK), mass_MK - upper_MK)
    np.add.at(moves_MM, (rows_M1, below_MK + 1), upper_MK)
    stay_MM = np.eye(points) - moves_MM
    try:
        length = float(np.linalg.solve(stay_MM, np.ones(points))[0])
    except np.linalg.LinAlgError:  # no way out: it never ends
        return math.inf
    return length if 0 < length < LONGEST else math.inf  # beyond, rounding is all


def _binomial(n: int, p: float) -> np.ndarray:
    """Probability of each count from 0 to n."""
    logs = [
        lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1) + k * log(p) + (n - k) * log(1 - p)
        for k in range(n + 1)
    ]
    return np.exp(logs)
