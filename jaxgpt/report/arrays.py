"""Arrays to look into, drawn by treescope: maps with sliders, and each number under the mouse."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from jaxgpt.report.page import Html

_SCRIPT = re.compile("<script>(.*?)</script>", re.DOTALL)
_ID = re.compile("treescope_out_[0-9a-f]{32}")
WIDEST = 760
"""Pixels up to which maps are put side by side rather than behind a slider."""
LARGEST, CELL, SMALLEST = 14, 7, 3
"""Pixels of a number's side: at most, at least in a grid, and at least of one map alone."""


def maps(values: Any, axes: Sequence[str], labels: Mapping[int, Sequence[str]]) -> tuple[Html, str]:
    """Matrices over two leading axes: as a grid where it is small, else one at a time with sliders.

    Args:
      values: shares between 0 and 1, of four axes: outer rows, outer columns, rows, columns.
      axes: names of the four.
      labels: names of what lies along an axis, by its number.

    Returns:
      The picture, and the script that it needs (`page.render`); nothing of it is loaded from anywhere.
    """
    import treescope
    from treescope import lowering

    rows, columns, height, width = values.shape
    cell = max(CELL, min(LARGEST, WIDEST // max(1, columns * width)))
    grid = columns * width * cell <= WIDEST and rows * height * cell <= 2 * WIDEST
    where: dict[str, Any] = {"rows": [2, 0], "columns": [3, 1]}
    if not grid:
        many = [axis for axis in (0, 1) if values.shape[axis] > 1]
        where = {"rows": [2], "columns": [3, *({0, 1} - {*many})], "sliders": many}
        cell = max(SMALLEST, min(LARGEST, WIDEST // width))
    # what is markup in a text shall not be markup in a tooltip
    items = {i: [name.replace("<", "‹") for name in names] for i, names in labels.items()}
    how: dict[str, Any] = where | {"vmin": 0.0, "vmax": 1.0, "around_zero": False, "pixels_per_cell": cell}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it looks at every name of numpy
        figure: Any = treescope.render_array(
            values, axis_labels=dict(enumerate(axes)), axis_item_labels=items, **how
        )
        drawn = lowering.render_to_html_as_root(figure.treescope_part, compressed=True)
    # Its id is random; one of what is drawn makes equal pages of equal arrays.
    blank = _ID.sub("treescope_out_", drawn)
    drawn = _ID.sub(f"treescope_out_{hashlib.md5(blank.encode(), usedforsecurity=False).hexdigest()}", drawn)
    (script,) = _SCRIPT.findall(drawn)
    return Html(f'<div class="card array">{drawn}</div>'), script
