"""Tokens and their log-probabilities as OpenAI writes them."""

from __future__ import annotations

from collections.abc import Sequence
from math import isnan
from typing import Any

from jaxgpt.sample.request import Alternative, Piece
from jaxgpt.text.tokenizer import Tokenizer


class TokenNames:
    """Token ids as texts.

    Args:
      tokenizer: of the ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._control = tokenizer, tokenizer.names
        self._stops = frozenset(tokenizer.stop_ids)

    def name(self, token: int) -> str:
        """The text of a token; a part of a character is U+FFFD."""
        return self._control.get(token) or self._tokenizer.piece_bytes(token).decode(errors="replace")

    def plain(self, token: int) -> str:
        """The text of a token; parts of characters are told apart by their bytes, as OpenAI does."""
        try:
            return self._control.get(token) or self._tokenizer.piece_bytes(token).decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self._tokenizer.piece_bytes(token))

    def width(self, token: int) -> int:
        """Characters of a token in a text, where control tokens are none."""
        return 0 if token in self._control else len(self.name(token))

    def is_end(self, piece: Piece) -> bool:
        """Whether a token ended its answer and is no part of its text."""
        return piece.finish_reason == "stop" and piece.id in self._stops

    def chat(self, pieces: Sequence[Piece], alternatives: int) -> list[dict[str, Any]]:
        """Log-probabilities of a chat's tokens."""
        return [
            {
                **self._entry(piece.id, piece.logprob),
                "top_logprobs": [self._entry(*other) for other in piece.alternatives[:alternatives]],
            }
            for piece in pieces
            if not self.is_end(piece)
        ]

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        data = None if token in self._control else [*self._tokenizer.piece_bytes(token)]
        return {"token": self.name(token), "logprob": _finite(logprob), "bytes": data}

    def completion(self, pieces: Sequence[Piece], alternatives: int, offset: int) -> dict[str, Any]:
        """Log-probabilities of a completion's tokens, that which ended it included.

        Args:
          pieces: the tokens.
          alternatives: of each.
          offset: characters of the text before them.
        """
        offsets = list[int]()
        for piece in pieces:
            offsets.append(offset)
            offset += self.width(piece.id)
        tops = [self._tops(piece.alternatives[:alternatives]) for piece in pieces]
        return {
            "tokens": [self.plain(piece.id) for piece in pieces],
            "token_logprobs": [None if isnan(piece.logprob) else _finite(piece.logprob) for piece in pieces],
            "top_logprobs": [top or None for top in tops] if alternatives else None,
            "text_offset": offsets,
        }

    def _tops(self, alternatives: Sequence[Alternative]) -> dict[str, float]:
        """By their names; where several have one, the likeliest."""
        found = dict[str, float]()
        for token, logprob in alternatives:
            found.setdefault(self.plain(token), _finite(logprob))
        return found


def _finite(logprob: float) -> float:
    """JSON has no infinity: what cannot come is given as OpenAI gives it."""
    return max(logprob, -9999.0)
