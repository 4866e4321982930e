"""The picture of a confusion matrix: every cell with its count, every row coloured by its shares."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jaxgpt.errors import UserError
from jaxgpt.report import Html
from jaxgpt.report.confusion import _short, confusion_picture


@pytest.mark.parametrize("size", [1, 2, 9, 40])
def test_the_picture_has_every_cell_and_every_label(size):
    labels = [f"<label&{i}>" for i in range(size)]
    counts = np.arange(size * size).reshape(size, size)
    counts[-1] = 0  # a label without gold examples divides nothing by zero
    picture = confusion_picture(labels, counts)
    assert isinstance(picture, Html) and "<label" not in picture
    assert picture.count("<rect") == size * size
    for i in range(size):
        assert picture.count(f">&lt;label&amp;{i}&gt;</text>") == 2
    tips = re.findall(r"gold &lt;label&amp;(\d+)&gt;, predicted &lt;label&amp;(\d+)&gt;: ([\d,]+) ", picture)
    found = {(int(a), int(b)): int(n.replace(",", "")) for a, b, n in tips}
    assert found == {(i, j): counts[i, j] for i, j in np.ndindex(size, size)}
    opacity = [float(v) for v in re.findall(r"fill-opacity:([\d.]+)", picture)]
    rows = np.array(opacity).reshape(size, size).sum(axis=1)
    assert np.allclose(rows, counts.any(axis=1), atol=0.03)  # colours of a row are shares of it


@given(st.integers(0, 999_499_999))
@example(999)
@example(9_950)
@example(999_499)
@example(999_500)
@example(9_999_999)
def test_short_counts_are_four_characters_and_near(count):
    shown = _short(count)
    value = float(shown.rstrip("kM")) * {"k": 1e3, "M": 1e6}.get(shown[-1], 1)
    assert len(shown) <= 4 and abs(value - count) <= 0.051 * count


def test_counts_of_another_shape_are_refused():
    with pytest.raises(UserError, match=r"the shape \(2, 2\) for 1 labels"):
        confusion_picture(("a",), np.zeros((2, 2), int))
