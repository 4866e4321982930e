"""What a browser would make of a page."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

from hypothesis import strategies as st


class Parts(HTMLParser):
    """What a browser would see: elements with their attributes, and the words between them."""

    def __init__(self, markup: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.ends: list[str] = []
        self.words = ""
        self.feed(markup)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        self.ends.append(tag)

    def handle_data(self, data: str) -> None:
        self.words += data

    def of(self, tag: str, kind: str | None = None) -> list[dict[str, str | None]]:
        """Attributes of the elements of this tag, and of this class where one is given."""
        found = [attributes for name, attributes in self.elements if name == tag]
        return [a for a in found if kind is None or kind in (a.get("class") or "").split()]

    @property
    def skeleton(self) -> list[Any]:
        """Elements without their words; <s> marks whitespace, which words have more or less of."""
        return [e for e in self.elements if e[0] != "s"] + [e for e in self.ends if e != "s"]


def drawn(markup: str, kind: str) -> list[list[tuple[float, float]]]:
    """Coordinates of the paths of a class."""
    paths = [re.findall(r"[ML]([\d.-]+) ([\d.-]+)", a["d"] or "") for a in Parts(markup).of("path", kind)]
    return [[(float(x), float(y)) for x, y in path] for path in paths]


VALUES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.lists(st.integers())
)
NAMES = st.sampled_from(["loss", "val_loss", "skipped", "grad_norm", "mfu", "tokens_per_second", "event"])
STEPS = st.integers(0, 10**9) | st.floats(0, 1e9)
RECORDS = st.lists(
    st.builds(lambda step, rest: {"step": step, **rest}, STEPS, st.dictionaries(NAMES, VALUES)), max_size=12
)
