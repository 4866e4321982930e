"""Words of any text, for comparing texts; tokenizers of models are elsewhere."""

from __future__ import annotations

import re
from typing import NamedTuple

_IDEOGRAPH = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_IDEOGRAPH}]|[^\W_{_IDEOGRAPH}]+")


def words_of(text: str) -> list[str]:
    """Words in lower case, and Chinese characters one by one."""
    return _WORD.findall(text.lower())


class Word(NamedTuple):
    """A word in lower case, which stands at `text[start:end]`."""

    text: str
    start: int
    end: int


def placed_words(text: str) -> list[Word]:
    """As `words_of`, with where they stand."""
    return [Word(m[0].lower(), m.start(), m.end()) for m in _WORD.finditer(text)]
