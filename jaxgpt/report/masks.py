"""What the loss sees: packed rows as text."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from jaxgpt.report.page import Html, escaped


def mask_picture(examples: Iterable[Mapping], piece: Callable | None = None) -> Html:
    """Packed rows as text: trained tokens highlighted, the others dimmed, segments separated.

    `examples` come from `jaxgpt.data.show.examples`. `piece` maps a token's id to the name (str) of a control
    token or to the bytes of another token. Instead of `tokens`, examples may have a list `pieces`.
    """
    parts = ["<p><mark>Highlighted</mark> tokens are trained; dimmed tokens are only context. Each "]
    parts.append("bar on the left is one segment: attention never crosses into another.</p>")
    for number, row in enumerate(examples, 1):
        pieces = [piece(token) for token in row["tokens"]] if piece else row["pieces"]
        names = (isinstance(p, str) and p[:2] == "<|" for p in pieces)
        kinds = list(zip(row["segments"], (w > 0 for w in row["weights"]), names, strict=True))
        trained, segments = sum(kind[1] for kind in kinds), len({kind[0] for kind in kinds})
        title = f"Row {number}: {len(kinds)} tokens, {trained} trained, {segments} segments"
        parts.append(f'<figure class="card"><figcaption>{title}</figcaption>')
        for _, part in groupby(zip(kinds, pieces, strict=True), key=lambda pair: pair[0][0]):
            parts.append('<div class="row">')
            for (_, on, named), run in groupby(part, key=lambda pair: pair[0]):
                words = _words([p for _, p in run], named)
                parts.append(f"<mark>{words}</mark>" if on else words)
            parts.append("</div>")
        parts.append("</figure>")
    return Html("".join(parts))


def _words(pieces: Sequence[Any], named: bool) -> str:
    """Tokens as text; whitespace is made visible where it is easy to miss: at edges, doubled, tabs."""
    if named:
        return "".join(f"<kbd>{escaped(name)}</kbd>" for name in pieces)
    data = b"".join(p if isinstance(p, bytes) else p.encode("utf-8", "replace") for p in pieces)
    words = re.sub(r"(?<!\S) | (?!\S)", "\0", escaped(data.decode("utf-8", "replace")))
    for sign, seen in (("\0", "·"), ("\t", "→\t"), ("\n", "↵\n")):
        words = words.replace(sign, f"<s>{seen}</s>")
    return words
