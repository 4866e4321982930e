"""What a generator is asked, and what it answers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol, TypedDict

from jaxgpt.config import Sampling
from jaxgpt.errors import require
from jaxgpt.sample.adapters import Names
from jaxgpt.sample.constrained import Rule
from jaxgpt.sample.program import Made, Program, Rows
from jaxgpt.sample.writer import Reason, Writer
from jaxgpt.text.chat import Dialogue
from jaxgpt.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Completion:
    """What one row produced."""

    ids: list[int]
    """Every token made; where `finish_reason` is "stop" the last is the stop token, or completes the stop
    string."""
    logprobs: list[float]
    """Log-probability of each id under the model itself (see `strategies.choose`)."""
    finish_reason: Reason
    text: str
    """What the ids add to the prompt's text, without the stop token and up to a stop string."""
    seed: int
    score: float | None = None
    """What it was chosen for, where it was chosen among several (see `config.decoding`)."""
    candidates: tuple[Completion, ...] = field(default=(), compare=False)
    """What it was chosen among, the best first: itself, and the others with their scores."""

    def __repr__(self) -> str:
        scored = "" if self.score is None else f", score {self.score:.4g}"
        about = f"{len(self.ids)} tokens, {self.finish_reason!r}, seed {self.seed}{scored}"
        return f"Completion({self.text!r}, {about})"

    @property
    def record(self) -> dict[str, Any]:
        """Its fields as JSON, without the candidates."""
        return {k: v for k, v in vars(self).items() if k != "candidates" and v is not None}


def best_of(candidates: Iterable[Completion]) -> Completion:
    """The first of those with the highest score, with all of them."""
    found = tuple(sorted(candidates, key=lambda completion: -(completion.score or 0.0)))
    return replace(found[0], candidates=found)


class Token(NamedTuple):
    """One token of a stream."""

    row: int
    id: int
    """-1 where the row ends and none was made: its `finish_reason` is "error", or nothing could follow."""
    logprob: float
    finish_reason: Reason | None
    """None until the row's last token."""
    text: str
    """Characters this token completes: joined over a row, they are `Completion.text`."""


class Asking(TypedDict, total=False):
    """What a call may say; see `Generator.generate`."""

    max_new_tokens: int
    seeds: Sequence[int] | None
    stop: Sequence[int] | None
    stop_strings: Sequence[str] | Sequence[Sequence[str]]
    prefix: Sequence[int] | None
    apart: bool
    adapters: Names
    turns: Sequence[Dialogue]
    rules: Rule | Sequence[Rule | None] | None


@dataclass(frozen=True, kw_only=True)
class Call:
    """What a call says, with an entry of each list for each row."""

    prompts: Sequence[Sequence[int]]
    max_new_tokens: int
    seeds: Sequence[int]
    stop: Sequence[int]
    stop_strings: Sequence[Sequence[str]]
    prefix: Sequence[int] | None
    apart: bool
    adapters: Names
    turns: Sequence[Dialogue]
    rules: Sequence[Rule | None] = ()

    def __post_init__(self) -> None:
        rows = len(self.prompts)
        for name in ("seeds", "prefix", "turns", "rules"):
            given = getattr(self, name)
            require(
                not given or len(given) == rows,
                f"{name} has {len(given or ())} entries for {rows} prompts; give one per prompt.",
            )

    def only(self, rows: Sequence[int]) -> Call:
        """Some of the rows, in this order; one may come several times."""

        def take(values: Any) -> Any:
            return values if not values or isinstance(values, str) else [values[row] for row in rows]

        lists = ("prompts", "seeds", "stop_strings", "prefix", "adapters", "turns", "rules")
        return replace(self, **{name: take(getattr(self, name)) for name in lists})

    def times(self, count: int) -> Call:
        """Each row `count` times, with seeds that follow each other."""
        several = self.only([row for row in range(len(self.prompts)) for _ in range(count)])
        return replace(several, seeds=[(seed + i) % 2**32 for seed in self.seeds for i in range(count)])

    @property
    def heads(self) -> list[Sequence[int]]:
        """What each completion's text goes on from."""
        return [() if self.apart else prompt for prompt in self.prompts]

    def completion(self, tokenizer: Tokenizer, made: Made, row: int) -> Completion:
        """What one row became, of `made` on the host."""
        span = slice(len(self.prompts[row]), int(made.length_B[row]))
        ids, logprobs = made.tokens_BS[row, span].tolist(), made.logprobs_BS[row, span].tolist()
        stopped = bool(ids) and ids[-1] in self.stop
        text = tokenizer.decode(ids[: len(ids) - stopped], self.heads[row])
        reason: Reason = "error" if made.failed_B[row] else "stop" if stopped else "length"
        return Completion(ids, logprobs, reason, text, self.seeds[row])

    def cut(self, tokenizer: Tokenizer, completion: Completion, row: int) -> Completion:
        """The completion up to where its row's first stop string is completed."""
        writer, text = Writer(tokenizer, self.heads[row], self.stop_strings[row]), ""
        for n, token in enumerate(completion.ids, 1):
            text += "" if token in self.stop else writer.feed(token)
            if writer.stopped:
                ids, logprobs = completion.ids[:n], completion.logprobs[:n]
                return replace(completion, ids=ids, logprobs=logprobs, finish_reason="stop", text=text)
        return completion


def each_row(strings: Sequence[str] | Sequence[Sequence[str]], rows: int) -> list[list[str]]:
    """Stop strings of every row, of those for all or lists for each."""
    alike = [s for s in strings if isinstance(s, str)]
    if isinstance(strings, str) or len(alike) == len(strings):
        return [[strings] if isinstance(strings, str) else alike] * rows
    require(
        not alike and len(strings) == rows,
        f"stop_strings has {len(strings)} entries for {rows} prompts; give strings, or lists of them.",
    )
    return [list(s) for s in strings]


def token_of(made: Made, row: int, slot: int, stops: Collection[int], writer: Writer) -> Token:
    """One token of `made`, on the host, and its text."""
    token = int(made.tokens_BS[row, slot])
    reason: Reason | None = None
    if made.done_B[row] and not made.failed_B[row] and slot == made.length_B[row] - 1:
        reason = "stop" if token in stops else "length"
    text = "" if token in stops else writer.feed(token)
    text += writer.flush() if reason else ""
    return Token(row, token, float(made.logprobs_BS[row, slot]), "stop" if writer.stopped else reason, text)


def completions(tokens: Iterable[Token], seeds: Sequence[int]) -> list[Completion]:
    """What the tokens of a stream amount to, a completion for each row."""
    mine: list[list[Token]] = [[] for _ in seeds]
    for token in tokens:
        mine[token.row].append(token)
    return [
        Completion(
            [t.id for t in row if t.id >= 0],
            [t.logprob for t in row if t.id >= 0],
            row[-1].finish_reason or "length",
            "".join(t.text for t in row),
            seed,
        )
        for row, seed in zip(mine, seeds, strict=True)
    ]


Waiting = Callable[[], list[Completion]]
"""What a dispatched call gives once it is done."""


class Maker(Protocol):
    """What ways of decoding need of a `Generator`."""

    params: dict
    tokenizer: Tokenizer
    judges: dict[str, Any]

    def on_mesh(self) -> contextlib.AbstractContextManager[Any]:
        """Inside, programs run on the generator's devices."""
        ...

    def program(self, call: Call, settings: Sequence[Sampling], group: int = 1) -> tuple[Program, Rows]:
        """The program of a call and its arguments; rows come in groups of one prompt."""
        ...

    def draw(self, call: Call, settings: Sequence[Sampling], group: int = 1) -> Waiting:
        """Sample every row."""
        ...
