"""What a service takes at most. Without jax or a web framework, so that `--help` is quick."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from jaxgpt.config.bounds import Bounds, Tokens, TokensOr0, check_bounds

Seconds = Annotated[float, Bounds(0.01, 86_400)]
Some = Annotated[int, Bounds(1, 2**16)]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Each with the status that a request beyond it gets."""

    body_bytes: Annotated[int, Bounds(1024, 2**31)] = 4 * 2**20
    """Bytes of a request's body (413)."""
    answer_tokens: TokensOr0 = 0
    """New tokens of a completion: more are refused (400), and as many are made where a request does not say;
    0 means what the context leaves."""
    choices: Some = 16
    """Completions of a request, `n` times its prompts, those that `best_of` drops included (400)."""
    inputs: Tokens = 256
    """Texts of a request for embeddings, classes or scores (400)."""
    requests: Some = 1024
    """Requests at a time, waiting ones included (429)."""
    body_seconds: Seconds = 30.0
    """For a request's body to arrive (408)."""
    seconds: Seconds = 600.0
    """For a whole request (504; a stream ends with an error)."""
    drain_seconds: Seconds = 60.0
    """For running requests to end after SIGTERM."""

    def __post_init__(self) -> None:
        from typing import get_type_hints

        for name, hint in get_type_hints(Limits, include_extras=True).items():
            check_bounds(hint, getattr(self, name), f"limits.{name}")
