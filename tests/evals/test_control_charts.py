"""Control charts: false alarms as seldom as asked for, and sooner alarms where the share rose."""

from __future__ import annotations

import math

import numpy as np
import pytest

from jaxgpt.errors import UserError
from jaxgpt.evals.control_charts import Charting, make_chart, run_length_at

SHARE, WINDOW, LENGTH = 0.3, 40, 60.0


def simulated(chart, share: float, rows: int = 4000, seed: int = 0) -> tuple[float, float]:
    """Mean and standard error of the windows to an alarm."""
    drawn = np.random.default_rng(seed)
    state, alive, length = np.full(rows, chart.start), np.ones(rows, bool), np.zeros(rows)
    while alive.any():
        state = chart.moved(state, drawn.binomial(WINDOW, share, rows))
        length += alive
        alive &= ~(state > chart.limit)
    return float(length.mean()), float(length.std() / math.sqrt(rows))


@pytest.mark.parametrize("kind", ["p", "ewma", "cusum"])
def test_alarms_come_as_often_as_computed(kind: str) -> None:
    how = Charting(chart=kind, window=WINDOW, run_length=LENGTH)
    chart = make_chart(how, SHARE)
    assert LENGTH <= chart.run_length < 3 * LENGTH  # counts are whole, so a limit cannot be any number
    for share in (SHARE, 0.4):
        mean, error = simulated(chart, share)
        assert run_length_at(chart, how, share) == pytest.approx(mean, abs=4 * error + 0.1 * mean)
    assert run_length_at(chart, how, 0.45) < 6


def test_the_p_chart_is_the_exact_binomial_tail() -> None:
    chart = make_chart(Charting(chart="p", window=WINDOW, run_length=LENGTH), SHARE)
    pmf = [math.comb(WINDOW, k) * SHARE**k * (1 - SHARE) ** (WINDOW - k) for k in range(WINDOW + 1)]
    first = math.floor(chart.limit * WINDOW) + 1
    assert chart.run_length == pytest.approx(1 / sum(pmf[first:]))
    assert 1 / sum(pmf[first - 1 :]) < LENGTH  # one count less would alarm too often


def test_a_small_rise_is_found_sooner_by_those_that_remember() -> None:
    lengths = {}
    for kind in ("p", "ewma", "cusum"):
        how = Charting(chart=kind, window=WINDOW, run_length=200.0)
        lengths[kind] = run_length_at(make_chart(how, SHARE), how, 0.4)
    assert max(lengths["ewma"], lengths["cusum"]) < lengths["p"] / 1.5


def test_an_end_shows_soon_after_a_long_alarm() -> None:
    chart = make_chart(Charting(window=WINDOW, run_length=LENGTH), SHARE)
    state = chart.start
    for _ in range(100):
        state = chart.add(state, WINDOW)
    quiet = 0
    while state > chart.limit:
        state, quiet = chart.add(state, round(SHARE * WINDOW)), quiet + 1
    assert quiet < 10


def test_what_no_limit_can_do_is_said() -> None:
    with pytest.raises(UserError, match="run_length is 200 but windows of 1 texts"):
        make_chart(Charting(chart="p", window=1, run_length=200.0), SHARE)
    with pytest.raises(UserError, match="the share is 1; it must lie between 0 and 1"):
        make_chart(Charting(), 1.0)
