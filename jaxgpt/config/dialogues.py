"""What all data of dialogues have: the fields that `Chat`, preferences and tasks share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from jaxgpt.config.bounds import Bounds, Part, Rows, Workers
from jaxgpt.config.check import check_types
from jaxgpt.errors import require

Length = Annotated[int, Bounds(2, 2**24)]


@dataclass(frozen=True, kw_only=True)
class Dialogues:
    """What all data of dialogues have: files (JSON, JSONL, CSV, TSV, Parquet), packed first-fit."""

    train: tuple[str, ...]
    """Files, folders or globs."""
    validation: tuple[str, ...] = ()
    """As train; when empty, validation_fraction of the training examples is held out."""
    validation_fraction: Part = 0.05
    """Share of the examples held out where validation names no files."""
    tokenizer: str = ""
    """A tokenizer folder; unspecified means that of the run named by init_from."""
    length: Length | None = None
    """Tokens per row; None means model.context, and of preferences twice as many. Longer dialogues are cut,
    and counted; of preferences, a dialogue takes at most half of a row."""
    template: Literal["auto", "none"] = "auto"
    """How a dialogue is written: `auto` with the tokenizer's chat template, `none` as plain text, the prompt
    and then its completion. Text of `none` is joined as it stands, so a space or a line between the two must
    be in one of them."""
    bins: Rows = 64
    """Number of rows that first-fit packing keeps open."""
    workers: Workers = 0
    """Number of processes that read ahead; 0 means threads of this process."""

    def __post_init__(self) -> None:
        check_types(self, "data")
        self._check_files()

    def _check_files(self) -> None:
        require(len(self.train) > 0, "data.train is empty; name at least one file.")
