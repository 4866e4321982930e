"""What `jaxgpt sample` and `chat` write: completions to standard output, all else to standard error."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from jaxgpt.errors import NotFinite
from jaxgpt.files import to_json

if TYPE_CHECKING:
    from jaxgpt.sample.generate import Generator, Token
    from jaxgpt.sample.judge import Judge

SEPARATOR = "---"
"""A line of its own between completions, when there are several."""


def show_json(generator: Generator, calls: list[dict[str, Any]], about: list[dict[str, Any]]) -> int:
    """Write a line for each completion, with what is said about it; returns how many failed."""
    failed, said = 0, iter(about)
    for call in calls:
        for completion in generator.generate(**call):
            write(to_json(next(said) | {"text": completion.text} | completion.record) + "\n")
            failed += completion.finish_reason == "error"
    return failed


def show_best(
    generator: Generator,
    calls: list[dict[str, Any]],
    asked: list[list[dict[str, str]]],
    judge: Judge,
    about: list[dict[str, Any]] | None,
) -> int:
    """Write the completion of each prompt that a judge likes best, as JSON with what is said about it if
    that is given; returns how many failed.
    """
    made = [completion for call in calls for completion in generator.generate(**call)]
    for i, (_, best, reward) in enumerate(judge.best(asked, made)):
        if about:
            told = about[i] | {"text": best.text, "reward": reward}
            write(to_json(told | best.record) + "\n")
        else:
            write((f"{SEPARATOR}\n" if i else "") + best.text + "\n")
    return sum(completion.finish_reason == "error" for completion in made)


def show(generator: Generator, calls: list[dict[str, Any]]) -> int:
    """Write the completions as they are made; returns how many failed."""
    failed: list[int] = []
    streams = (noting(generator.stream(**call), failed) for call in calls)
    for piece in in_order(streams, [len(call["prompts"]) for call in calls]):
        write(piece)
    return len(failed)


def in_order(streams: Iterable[Iterable[Token]], sizes: list[int]) -> Iterator[str]:
    """Text of the first unfinished row as it comes; later rows wait for their turn.

    Args:
      streams: tokens of one batch of rows after another.
      sizes: rows of each batch.
    """
    rows, first, current = sum(sizes), 0, 0
    waiting, finished = [""] * rows, [False] * rows
    for stream, size in zip(streams, sizes, strict=True):
        for token in stream:
            waiting[first + token.row] += token.text
            finished[first + token.row] = token.finish_reason is not None
            while current < rows:
                if waiting[current]:
                    yield waiting[current]
                    waiting[current] = ""
                if not finished[current]:
                    break
                current += 1
                yield f"\n{SEPARATOR}\n" if current < rows else "\n"
        first += size


def noting(stream: Iterable[Token], failed: list[int]) -> Iterator[Token]:
    """The tokens; the rows that end with an error are added to `failed`."""
    for token in stream:
        failed += [token.row] if token.finish_reason == "error" else []
        yield token


def require_finite(failed: int, what: str) -> None:
    """Raise `NotFinite` where some completions ended early."""
    if failed:
        raise NotFinite(f"{what} ended early, where logits were")


def write(text: str) -> None:
    """Write text to standard output at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def note(text: str) -> None:
    """Say something beside the text."""
    print(text, file=sys.stderr, flush=True)
