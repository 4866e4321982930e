"""The page of a sweep: runs are distinguished, and their names do not overlap."""

from __future__ import annotations

import re
from itertools import pairwise

from jaxgpt.report.lines import chart


def test_twelve_runs_are_told_apart_without_colour() -> None:
    curves = {f"run {i:02}": [(x, 4 - x / 100 + i / 1000) for x in range(10, 101, 10)] for i in range(12)}
    picture = chart(curves)
    tops = re.findall(r'class="name" x="700" y="([\d.]+)">(run \d\d) [\d.]+<', picture)
    assert [name for _, name in tops] == list(curves)
    heights = sorted(float(top) for top, _ in tops)
    assert all(b - a >= 16.9 for a, b in pairwise(heights))
    pens = re.findall(r'(style="color[^"]*" stroke-dasharray="[^"]*") clip-path', picture)
    assert len(set(pens)) == len(pens) == 12
    bottom = float(re.search(r'viewBox="0 0 900 (\d+)"', picture)[1])
    assert 0 < heights[0] < heights[-1] < bottom


def test_a_page_without_any_loss_says_so() -> None:
    assert "No run was evaluated yet." in chart({})
    assert "<svg" in chart({"one": [(5.0, 2.0)]})
