"""A reliability diagram: the share of right answers over confidence."""

from __future__ import annotations

from collections.abc import Sequence

from jaxgpt.report.page import Html, escaped

SIDE = 300


def reliability_picture(title: str, bins: Sequence[Sequence[float]]) -> Html:
    """Bars of accuracy at the mean confidence of each bin, their width by how many predictions it holds.

    Args:
      title: of the picture.
      bins: (count, mean confidence, accuracy) of each.
    """
    total = sum(count for count, _, _ in bins) or 1
    x, y = (lambda v: 40 + v * SIDE), (lambda v: 12 + (1 - v) * SIDE)
    parts = [f"<title>{escaped(title)}</title><desc>{len(bins)} bins</desc>"]
    for tick in (0, 0.25, 0.5, 0.75, 1):
        parts.append(f'<path class="grid" d="M{x(0):.1f} {y(tick):.1f}H{x(1):.1f}"/>')
        parts.append(f'<text class="left" x="34" y="{y(tick) + 4:.1f}">{tick:g}</text>')
        parts.append(f'<text class="mid" x="{x(tick):.1f}" y="{y(0) + 18:.1f}">{tick:g}</text>')
    parts.append(f'<path class="best" d="M{x(0):.1f} {y(0):.1f}L{x(1):.1f} {y(1):.1f}"/>')
    for count, confidence, accuracy in bins:
        half = 3 + 12 * (count / total) ** 0.5
        tip = f"<title>{count:,.0f} predictions: confidence {confidence:.3f}, right {accuracy:.3f}</title>"
        gap = f"M{x(confidence):.1f} {y(confidence):.1f}V{y(accuracy):.1f}"
        parts.append(f'<path class="bad" d="{gap}"/>')
        place = f'cx="{x(confidence):.1f}" cy="{y(accuracy):.1f}" r="{half:.1f}"'
        parts.append(f'<circle class="mean" {place}>{tip}</circle>')
    words = "share of right answers over confidence; larger dots hold more predictions"
    picture = f'<svg viewBox="0 0 {SIDE + 60} {SIDE + 44}" role="img">{"".join(parts)}</svg>'
    head = f"<figcaption>{escaped(title)} <small>{words}</small></figcaption>"
    return Html(f'<figure class="card" style="max-width:460px">{head}{picture}</figure>')
