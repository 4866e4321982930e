"""How a serving engine batches requests. Without jax, so that the `--help` of a command is quick."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxgpt.errors import require


@dataclass(frozen=True, kw_only=True)
class Batching:
    """Slots, pages and chunks of `sample.engine.Engine`.

    Attributes:
      slots: requests that run at once; the decode step is compiled for this many rows.
      exact: whether a step always computes all slots, so that a request gets the same numbers, bit for bit on
        a CPU, whoever runs beside it. If not, it computes 1, 2, 4 and so on, as many as run: faster while few
        do, and log-probabilities differ by rounding.
      page: tokens of a page of the key-value cache.
      chunk: tokens of a prompt that are computed between two steps of the running requests; a multiple of
        `page`. Prompts that begin alike share what they have in common in multiples of this.
      pages: of the cache, for all requests; 0 means enough for every slot to fill the context.
      cache: `int8` holds keys and values in 8 bits; `float` in the type of the products.
      queue: most requests that wait; more are refused.
      lookup: tokens proposed a step from an n-gram that the text already holds (prompt look-up); 0 for none.
      draft: folder of a smaller run with the same tokenizer that proposes tokens; empty for none.
      proposals: tokens a step that the draft proposes.
    """

    slots: int = 8
    exact: bool = True
    page: int = 16
    chunk: int = 64
    pages: int = 0
    cache: Literal["float", "int8"] = "float"
    queue: int = 256
    lookup: int = 0
    draft: str = ""
    proposals: int = 4

    def __post_init__(self) -> None:
        for name, least in (("slots", 1), ("page", 1), ("chunk", 1), ("queue", 1), ("proposals", 1)):
            value = getattr(self, name)
            require(value >= least, f"batching.{name} is {value}; it must be at least {least}.")
        for name in ("pages", "lookup"):
            value = getattr(self, name)
            require(value >= 0, f"batching.{name} is {value}; it must be at least 0.")
        require(
            self.chunk % self.page == 0,
            f"batching.chunk is {self.chunk} but a page has {self.page} tokens; make it a multiple of that.",
        )
        require(
            not (self.lookup and self.draft),
            f"batching.lookup is {self.lookup} and batching.draft is {self.draft!r}; give one of them.",
        )
