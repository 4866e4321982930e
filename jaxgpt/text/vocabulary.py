"""What objectives know of a tokenizer: facts about its ids, as arrays. Shapes: V ids."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jaxgpt.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Vocabulary:
    """Facts about the ids of a tokenizer.

    Attributes:
      bytes_V: UTF-8 bytes that each id stands for; 0 for control tokens.
      starts_V: whether an id begins a word.
      mask: the id that hides a token in masked language modelling, if there is one.
    """

    bytes_V: np.ndarray
    starts_V: np.ndarray
    mask: int | None = None

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Vocabulary:
        """That of a tokenizer."""
        return cls(tokenizer.token_bytes(), tokenizer.word_starts(), tokenizer.control.get("<|mask|>"))

    @classmethod
    def plain(cls, size: int) -> Vocabulary:
        """One of one-byte words whose last id is the mask, for programs that are only traced."""
        return cls(np.arange(size) < size - 1, np.ones(size, bool), size - 1)
