"""A confusion matrix for `report.html`: a heat map that is readable with 2 to 40 labels."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import numpy as np

from jaxgpt.errors import require
from jaxgpt.report.page import Html, escaped, figure, shown

LONGEST = 22
"""Maximum number of characters drawn per label; the cells' tooltips have the full label."""


def confusion_picture(labels: Sequence[str], counts: np.ndarray) -> Html:
    """The heat map of [labels, labels] counts, with gold labels as rows and predictions as columns.

    A cell's colour is its fraction of the row, so that rare labels are as visible as common ones. Its number
    is the count (none for 0); a tooltip gives the exact count and fraction.

    Raises:
      UserError: the counts have another shape, or there is no label.
    """
    n = len(labels)
    require(
        n > 0 and counts.shape == (n, n),
        f"counts have the shape {counts.shape} for {n} labels; give one row and one column per label.",
    )
    side = max(27.0, min(64.0, 640 / n))
    names = [name if len(name) <= LONGEST else name[: LONGEST - 1] + "…" for name in labels]
    longest = max(map(_width, names))
    flat = longest <= side - 6
    left, top = longest + 34.0, 28.0 + (16.0 if flat else 0.72 * longest + 12)
    right = 12.0 if flat else max(12.0, 0.72 * longest - side / 2 + 12)
    width, height = left + n * side + right, top + n * side + 8
    parts = [
        f"<title>Confusion matrix of {n} labels</title>",
        _text("predicted →", left, 14, "start", 12, bold=True),
        _text("← gold", 12, top, "end", 12, bold=True, turn=-90),
    ]
    for i, name in enumerate(names):
        middle = (i + 0.5) * side
        parts.append(_text(name, left - 7, top + middle + 4, "end", 12))
        at = ("middle", 0) if flat else ("start", -45)
        parts.append(_text(name, left + middle, top - 7, at[0], 12, turn=at[1]))
    totals = counts.sum(axis=1)
    for row, column in np.ndindex(n, n):
        count = int(counts[row, column])
        share = count / max(1, totals[row])
        what = f"gold {labels[row]}, predicted {labels[column]}: {count:,} ({share:.1%} of the row)"
        parts.append(_cell(left + column * side, top + row * side, side, count, share, what))
    style = f"width:{width:.0f}px;min-width:{width:.0f}px"
    box = f'<svg viewBox="0 0 {width:.0f} {height:.0f}" style="{style}" role="img">{"".join(parts)}</svg>'
    right_ones = int(np.trace(counts))
    words = f"{right_ones:,} of {int(counts.sum()):,} on the diagonal; colour: fraction of the row"
    return Html(figure("Confusion matrix", words, box))


def _cell(x: float, y: float, side: float, count: int, share: float, what: str) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" width="{side:.1f}" height="{side:.1f}"'
    paint = f"fill:var(--c0);fill-opacity:{share:.3f};stroke:var(--line);stroke-width:1"
    number = ""
    if count:
        size = 13.0 if side >= 44 else 10.5
        ink = "var(--card)" if share > 0.7 else "var(--ink)"
        digits = shown(count) if side >= 44 else _short(count)
        number = _text(digits, x + side / 2, y + side / 2 + 0.36 * size, "middle", size, ink=ink)
    return f'<g><title>{escaped(what)}</title><rect {place} style="{paint}"/>{number}</g>'


def _text(
    words: str,
    x: float,
    y: float,
    anchor: str,
    size: float,
    *,
    bold: bool = False,
    turn: int = 0,
    ink: str = "var(--ink)",
) -> str:
    """SVG text with inline style, because the page's rules are for charts that shrink."""
    style = f"font-size:{size:g}px;fill:{ink};text-anchor:{anchor}" + (";font-weight:600" if bold else "")
    turned = f' transform="rotate({turn} {x:.1f} {y:.1f})"' if turn else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{turned} style="{style}">{escaped(words)}</text>'


def _short(count: int) -> str:
    """A count in at most four characters (below a billion)."""
    if count < 1000:
        return str(count)
    size, unit = (10**6, "M") if count >= 999_500 else (10**3, "k")
    return f"{count / size:.{int(count < 9.95 * size)}f}{unit}"


def _width(words: str) -> float:
    """Approximate width in pixels of a label in a 12-pixel font."""
    return sum(12.5 if unicodedata.east_asian_width(c) in "WF" else 7.4 for c in words)
