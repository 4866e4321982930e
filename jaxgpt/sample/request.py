"""What an engine is asked, and the pieces of its answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from jaxgpt.config import Sampling
from jaxgpt.errors import UserError
from jaxgpt.sample.constrained import Rule
from jaxgpt.sample.writer import Reason

MOST_ALTERNATIVES = 20
"""Of a token, whose log-probabilities can be asked for."""

End = Reason | Literal["cancelled"]
"""Why a request ended."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt to go on with.

    Attributes:
      prompt: token ids, at least one.
      max_new_tokens: most tokens of the answer; cut to what the context leaves.
      sampling: how tokens are chosen.
      seed: of the choice; the same seed gives the same tokens, alone and in any company.
      stop: ids that end it; None means the tokenizer's.
      stop_strings: texts that end it and are not part of it.
      apart: whether the answer's text stands for itself, as a turn of a dialogue does, and does not go on
        from the prompt's.
      adapter: name of a loaded adapter; None means the model alone.
      rule: what the answer must follow (`sample.constrained`); None for nothing.
      alternatives: number of likeliest tokens whose log-probabilities are given at each place.
      owner: whose it is; owners are served in turn.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    sampling: Sampling
    seed: int = 0
    stop: Sequence[int] | None = None
    stop_strings: Sequence[str] = ()
    apart: bool = False
    adapter: str | None = None
    rule: Rule | None = None
    alternatives: int = 0
    owner: str = ""


class Alternative(NamedTuple):
    """A token that might have come, and its log-probability under the model itself."""

    id: int
    logprob: float


class Piece(NamedTuple):
    """A token of an answer, or its end."""

    id: int
    """-1 where the request ends and no token was made: it failed, was cancelled, or nothing could follow."""
    logprob: float
    """Under the model itself, before temperature and truncation."""
    text: str
    """Characters that are certain with this token: joined, they are the answer's text."""
    finish_reason: End | None
    """None until the last piece."""
    alternatives: tuple[Alternative, ...] = ()


Emit = Callable[[Piece], None]
"""Takes each piece as it is made, in the engine's thread: it must return soon."""


class Full(UserError):
    """The queue holds as many requests as it may."""


class Load(NamedTuple):
    """What an engine is busy with."""

    queued: int
    running: int
    slots: int
    pages_used: int
    """Held by running requests; pages kept for later prompts are free for use."""
    pages: int
    steps: int
    """Decode steps since the start."""
    prompt_tokens: int
    shared_tokens: int
    """Of these, not computed since another prompt began with them."""
    new_tokens: int
    preemptions: int
    proposed: int
    """Tokens proposed by speculation."""
    accepted: int
    """Of these, kept."""
