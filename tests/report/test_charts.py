"""Curves: nothing missing breaks one, and what is drawn is what was measured."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markup import RECORDS, Parts, drawn

from jaxgpt.report import axis, chart, curves, downsample, points, smooth

NAN = float("nan")


def test_a_curve_goes_right_with_the_steps_and_down_with_the_loss() -> None:
    svg = chart("c", {"raw": [(0, 4.0), (10, 3.0), (20, 3.5)], "dots": [(10, 3.2), (20, 3.1)]})
    ((a, b, c),) = drawn(svg, "raw")
    assert a[0] < b[0] < c[0]
    assert b[0] - a[0] == pytest.approx(c[0] - b[0], abs=0.11)  # of a pixel
    assert b[1] > c[1] > a[1]  # y grows downwards
    assert (c[1] - a[1]) / (b[1] - a[1]) == pytest.approx(0.5, abs=0.01)
    (best,) = Parts(svg).of("circle", "best")
    assert float(best["cx"]) == c[0]
    assert "best 3.1 at step 20" in Parts(svg).words


@pytest.mark.parametrize("hole", [NAN, None, float("inf"), "high", [1]], ids=str)
def test_what_cannot_be_drawn_is_a_gap(hole: object) -> None:
    losses = [4.0, 3.0, hole, 2.0, 1.5]
    records = [{"step": i, "loss": loss, "mfu": hole} for i, loss in enumerate(losses)]
    page = curves(records)
    assert [len(line) for line in drawn(page, "raw")] == [2, 2]
    assert "nan" not in Parts(page).words.lower()
    assert "nan" not in page.replace("tabular-nums", "")


def test_a_missing_metric_is_no_gap() -> None:
    """Training and validation come in records of their own."""
    records = [{"step": 1, "loss": 4.0}, {"step": 1, "val_loss": 3.5}, {"step": 2, "loss": 3.0}, {"step": 3}]
    page = curves(records)
    assert [len(line) for line in drawn(page, "raw")] == [2]
    assert len(Parts(page).of("circle", "dots")) == 1


def test_skipped_updates_are_marked_where_their_number_grows() -> None:
    records = [{"step": i, "loss": 1.0, "skipped": n} for i, n in enumerate((0, 0, 2, 2, 3))]
    page = curves(records)
    assert len(Parts(page).of("path", "bad")) == 2
    assert "3 updates skipped" in Parts(page).words
    assert "skipped" not in Parts(curves(records[:2])).words


@settings(deadline=None, max_examples=150)
@given(RECORDS)
def test_any_metrics_make_a_picture_with_finite_coordinates(records: list[dict[str, Any]]) -> None:
    page = curves(records)
    parts = Parts(page)
    assert "nan" not in parts.words
    for tag, attributes in parts.elements:
        for name in ("d", "x", "y", "cx", "cy"):
            value = attributes.get(name) or "" if tag in ("path", "text", "circle") else ""
            assert not re.search("nan|inf|e", value), (tag, name, value)


NUMBERS = st.floats(-1e6, 1e6) | st.floats(1e-6, 1.0)


@settings(deadline=None)
@given(st.lists(NUMBERS, max_size=6), st.booleans())
@example([1.0, 5e-324], False)
def test_an_axis_keeps_order_and_holds_values_and_marks(values: list[float], zero: bool) -> None:
    place, ticks, curved = axis(values, 0.0, 100.0, zero)
    found = [place(v) for v in sorted(values)]
    assert found == sorted(found)
    assert all(-1e-6 <= p <= 100 + 1e-6 for p in found)
    assert all(-1e-6 <= place(t) <= 100 + 1e-6 for t in ticks)
    assert not (curved and (zero or min(values) <= 0))
    assert 1 <= len(ticks) <= 16


LINES = st.lists(st.floats(-1e3, 1e3) | st.just(NAN), max_size=60).map(lambda ys: list(enumerate(ys)))


@given(LINES, st.integers(0, 9))
def test_smoothing_is_the_mean_of_neighbours_within_a_stretch(line: list, half: int) -> None:
    kept = dict(p for p in smooth(line, half) if not math.isnan(p[1]))
    assert set(kept) == {x for x, y in line if not math.isnan(y)}
    for x, mean in kept.items():
        left, right = x, x
        while left and not math.isnan(line[left - 1][1]):
            left -= 1
        while right + 1 < len(line) and not math.isnan(line[right + 1][1]):
            right += 1
        reach = min(half, x - left)  # evenly at the start, one-sided at the end
        near = [y for _, y in line[x - reach : min(x + reach, right) + 1]]
        assert mean == pytest.approx(sum(near) / len(near), abs=1e-6)


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=3000), st.integers(10, 700))
@settings(deadline=None, max_examples=50)
def test_fewer_points_keep_ends_and_extremes(values: list[float], most: int) -> None:
    line = list(enumerate(values))
    kept = downsample(line, most)
    assert len(kept) <= most + 2
    assert kept == sorted(set(kept))
    assert set(kept) <= set(line)
    assert {line[0], line[-1]} <= set(kept)
    assert {min(values), max(values)} <= {y for _, y in kept}


def test_points_take_what_has_the_metric() -> None:
    records = [{"step": 1, "mfu": 0.5}, {"step": 2}, {"step": 3, "mfu": None}]
    assert points(records, "mfu", 100)[0] == (1, 50.0)
    assert [step for step, _ in points(records, "mfu")] == [1, 3]
