"""Words of any text, for comparing texts; tokenizers of models are elsewhere."""

from __future__ import annotations

import re

_IDEOGRAPH = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_IDEOGRAPH}]|[^\W_{_IDEOGRAPH}]+")


def words_of(text: str) -> list[str]:
    """Words in lower case, and Chinese characters one by one."""
    return _WORD.findall(text.lower())
