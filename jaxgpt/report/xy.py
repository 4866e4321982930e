"""A chart of one line over any quantity, with marks on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jaxgpt.report.charts import Point, axis
from jaxgpt.report.page import Html, escaped, shown

WIDTH, HEIGHT = 640, 330


def xy_chart(
    title: str, over: str, faint: Sequence[Point], line: Sequence[Point], marks: Mapping[str, Point]
) -> Html:
    """A line over x, what it smooths behind it, and named points; axes are logarithmic where they span much.

    Args:
      title: of the picture.
      over: what x is.
      faint: points behind the line; those far above it are cut off.
      line: at least one point.
      marks: from names to points.
    """
    floor = HEIGHT - 40
    x, x_ticks, _ = axis([a for a, _ in line], 52, WIDTH - 20)
    y, y_ticks, curved = axis([b for _, b in line], floor, 24)
    parts = [f"<title>{escaped(title)}</title><desc>{len(line)} points over {escaped(over)}</desc>"]
    parts.append(f'<clipPath id="in"><path d="M52 4H{WIDTH}V{floor}H52z"/></clipPath>')
    for tick in y_ticks:
        parts.append(f'<path class="grid" d="M52 {y(tick):.1f}H{WIDTH - 20}"/>')
        parts.append(f'<text class="left" x="46" y="{y(tick) + 4:.1f}">{shown(tick)}</text>')
    parts += [f'<text class="mid" x="{x(t):.1f}" y="{floor + 18}">{shown(t)}</text>' for t in x_ticks]
    parts.append(f'<text class="mid" x="{WIDTH / 2}" y="{HEIGHT - 4}">{escaped(over)}</text>')
    parts.append('<text class="left" x="46" y="12">log</text>' if curved else "")
    for kind, points in (("raw", faint), ("mean", line)):
        path = "L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in points)
        parts.append(f'<path class="{kind}" clip-path="url(#in)" d="M{path}"/>' if points else "")
    for i, (name, (a, b)) in enumerate(marks.items()):
        side = "left" if x(a) > WIDTH / 2 else "right"
        parts.append(f'<path class="best" d="M{x(a):.1f} 24V{floor}"/>')
        parts.append(f'<circle class="dots" cx="{x(a):.1f}" cy="{y(b):.1f}" r="4"/>')
        words = f"{escaped(name)} {shown(a)}"
        shift = -6 if side == "left" else 6
        parts.append(f'<text class="dots {side}" x="{x(a) + shift:.1f}" y="{22 + 16 * i}">{words}</text>')
    picture = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(parts)}</svg>'
    return Html(f'<figure class="card"><figcaption>{escaped(title)}</figcaption>{picture}</figure>')
