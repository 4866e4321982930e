"""What a run reads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from jaxgpt.config.bounds import Bounds, Part, Rows, Workers
from jaxgpt.config.check import STORED, check_types
from jaxgpt.errors import require

Length = Annotated[int, Bounds(2, 2**24)]


@dataclass(frozen=True, kw_only=True)
class Text:
    """Pretraining text: a folder written by `jaxgpt data prepare`, packed by concat-then-split."""

    path: str
    """The folder."""
    length: Length | None = None
    """Tokens per row; None means model.context (model.segment of a Transformer-XL)."""
    contiguous: bool = False
    """Row b of a batch goes on where row b of the batch before ended, as recurrence needs."""
    workers: Workers = 0
    """Number of processes that read ahead; 0 means threads of this process."""

    def __post_init__(self) -> None:
        check_types(self, "data")
        require(bool(self.path), "data.path is empty; give a folder made by `jaxgpt data prepare`.")


@dataclass(frozen=True, kw_only=True)
class Chat:
    """Instruction data: files of dialogues (JSON, JSONL, CSV, TSV, Parquet), packed first-fit, with the loss
    on answers only.
    """

    train: tuple[str, ...]
    """Files, folders or globs."""
    validation: tuple[str, ...] = ()
    """As train; when empty, validation_fraction of the training examples is held out."""
    validation_fraction: Part = 0.05
    """Share of the dialogues held out where validation names no files."""
    tokenizer: str = ""
    """A tokenizer folder; unspecified means that of the run named by init_from."""
    length: Length | None = None
    """Tokens per row; None means model.context. Longer dialogues are cut, and counted."""
    prompt: str = ""
    """Field or column of what is given (a path such as `a.b[0].c` reaches into objects and lists), where it
    is not one of the usual names; goes with completion."""
    completion: str = ""
    """Field or column of the answer; goes with prompt."""
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
        require(len(self.train) > 0, "data.train is empty; name at least one file.")
        require(
            bool(self.prompt) == bool(self.completion),
            f"data.prompt is {self.prompt!r} and data.completion {self.completion!r}; name both fields or "
            "neither.",
        )


@dataclass(frozen=True, kw_only=True)
class _Files:
    train: tuple[str, ...]
    """Files, folders or globs."""
    validation: tuple[str, ...]
    """As train: the best checkpoint is chosen on them."""
    test: tuple[str, ...] = ()
    """As train: for `jaxgpt eval --split test` alone."""
    tokenizer: str = ""
    """A tokenizer folder or `byte`; unspecified means that of the run named by init_from."""
    length: Length | None = None
    """Tokens per row; None means model.context."""
    bins: Rows = 64
    """Number of rows that first-fit packing keeps open."""
    workers: Workers = 0
    """Number of processes that read ahead; 0 means threads of this process."""

    def __post_init__(self) -> None:
        check_types(self, "data")
        for name in ("train", "validation"):
            require(len(getattr(self, name)) > 0, f"data.{name} is empty; name at least one file.")


@dataclass(frozen=True, kw_only=True)
class Tagged(_Files):
    """Sentences with a tag for every word, in CoNLL column files (IOB1, BIO, BIOES, BILOU or BMES)."""

    joiner: str = " "
    """What stands between words; empty where every character is a word, as in Chinese files."""
    align: Literal["auto", "first", "last"] = field(default="auto", metadata={STORED: "first"})
    """Which of a word's tokens its tag is predicted at; auto takes the last where the model is causal, since
    at the first it has not read the word yet, and the first where it sees both sides."""


@dataclass(frozen=True, kw_only=True)
class Labelled(_Files):
    """Texts with one label each, in TSV, CSV or JSONL files."""

    text: str = "text"
    """Field of the text."""
    pair: str = ""
    """Field of a second text, where two are judged together; empty for none."""
    label: str = "label"
    """Field of the label."""


Data = Text | Chat | Tagged | Labelled
