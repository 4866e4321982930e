"""What `jaxgpt sample` and `chat` write: completions to standard output, all else to standard error."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from jaxgpt.errors import NotFinite
from jaxgpt.files import to_json

if TYPE_CHECKING:
    from jaxgpt.sample.generate import Completion, Generator, Token

SEPARATOR = "---"
"""A line of its own between completions, when there are several."""


def show_json(
    generator: Generator, calls: list[dict[str, Any]], about: list[dict[str, Any]], best: int
) -> int:
    """Write a line for each completion; returns how many failed.

    Args:
      generator: makes them.
      calls: what it is asked.
      about: what is said about each row.
      best: completions to show of a prompt's candidates, where it has some.
    """
    failed, said = 0, iter(about)
    for call in calls:
        for completion in generator.generate(**call):
            about_it = next(said)
            for one in completion.candidates[:best] or (completion,):
                write(to_json(about_it | {"text": one.text} | one.record) + "\n")
            failed += failures(completion)
    return failed


def show_best(generator: Generator, calls: list[dict[str, Any]], best: int) -> int:
    """Write the `best` candidates of each prompt, once they are all known; returns how many failed."""
    made = [completion for call in calls for completion in generator.generate(**call)]
    texts = [one.text for completion in made for one in completion.candidates[:best] or (completion,)]
    write(f"\n{SEPARATOR}\n".join(texts) + "\n")
    return sum(map(failures, made))


def failures(completion: Completion) -> int:
    """How many of its candidates ended with an error, or whether it did."""
    return sum(one.finish_reason == "error" for one in completion.candidates or (completion,))


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
