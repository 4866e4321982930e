"""The text of one row as it is made: after its prompt, and up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from jaxgpt.errors import require
from jaxgpt.text.tokenizer import StreamDecoder, Tokenizer

Reason = Literal["stop", "length", "error"]
"""Why a row ended: a stop token or string, its length, or logits that were not finite."""


class Writer:
    """Text of a row's tokens, each piece as soon as nothing that follows can take it back.

    Held back are bytes that do not make a whole character yet, and text that may be the beginning of a
    stop string. Where stop strings overlap, the one that ends first counts, as if text came character
    by character.

    Args:
      tokenizer: of the ids.
      prompt: what the row goes on from.
      stop: strings that end the row; neither they nor what follows is ever given.

    Raises:
      UserError: an empty stop string.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        require(all(stop), "a stop string is empty; give at least one character.")
        self._decoder, self._stop = StreamDecoder(tokenizer, prompt), stop
        self._longest = max(map(len, stop), default=0)
        self._held = ""
        self.stopped = False
        """Whether a stop string has come."""

    def feed(self, token: int) -> str:
        """The text that is certain with this id; possibly none."""
        return self._certain(self._decoder.feed(token))

    def flush(self) -> str:
        """What is left at the end."""
        text = self._certain(self._decoder.flush()) + self._held
        self._held = ""
        return text

    def _certain(self, text: str) -> str:
        held = self._held + text
        found = [(at + len(stop), at) for stop in self._stop if (at := held.find(stop)) >= 0]
        if found or self.stopped:
            cut = min(found)[1] if found and not self.stopped else 0
            self.stopped, self._held = True, ""
            return held[:cut]
        cut = len(held) - self._overlap(held)
        self._held = held[cut:]
        return held[:cut]

    def _overlap(self, text: str) -> int:
        """Characters at the end that a stop string begins with."""
        sizes = range(min(self._longest - 1, len(text)), 0, -1)
        return next((n for n in sizes if any(stop.startswith(text[-n:]) for stop in self._stop)), 0)
