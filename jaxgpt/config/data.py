"""What a run reads."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from jaxgpt.config.bounds import Bounds, Part, Rows, Workers
from jaxgpt.config.check import STORED, check_types
from jaxgpt.config.dialogues import Dialogues, Length
from jaxgpt.config.tasks import Task
from jaxgpt.errors import require


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


def _require_both(prompt: str, completion: str) -> None:
    require(
        bool(prompt) == bool(completion),
        f"data.prompt is {prompt!r} and data.completion {completion!r}; name both fields or neither.",
    )


@dataclass(frozen=True, kw_only=True)
class Chat(Dialogues):
    """Instruction data: files of dialogues, with the loss on answers only."""

    prompt: str = ""
    """Field or column of what is given (a path such as `a.b[0].c` reaches into objects and lists), where it
    is not one of the usual names; goes with completion."""
    completion: str = ""
    """Field or column of the answer; goes with prompt."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_both(self.prompt, self.completion)


@dataclass(frozen=True, kw_only=True)
class Pairs(Dialogues):
    """Preferences: of two completions of one prompt, which is the better one. Both lie in one row."""

    prompt: str = ""
    """Field or column of what both complete, where it is not one of the usual names (prompt, question,
    instruction and input, messages, conversations); without any, it is what both dialogues begin with."""
    chosen: str = "chosen"
    """Field or column of the better completion: a text, a turn, or turns."""
    rejected: str = "rejected"
    """Field or column of the worse one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        names = (self.prompt, self.chosen, self.rejected)
        require(
            all(names[1:]) and len(set(names)) == 3,
            f"data.prompt, data.chosen and data.rejected are {names}; name three different fields (the "
            "prompt may be left out).",
        )


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """What GRPO lets the model answer: files of records (JSON, JSONL, CSV, TSV, Parquet), each a prompt and
    whatever its reward needs to judge an answer.
    """

    train: tuple[str, ...]
    """Files, folders or globs."""
    validation: tuple[str, ...] = ()
    """As train; when empty, validation_fraction of the training prompts is held out."""
    validation_fraction: Part = 0.05
    """Share of the prompts held out where validation names no files."""
    tokenizer: str = ""
    """A tokenizer folder; unspecified means that of the run named by init_from."""
    length: Length | None = None
    """Tokens of a prompt and its completion; None means model.context. Longer prompts are left out, and
    counted."""
    prompt: str = ""
    """Field of the prompt, a text or turns (a path such as `a.b[0].c` reaches into objects and lists), where
    it is not one of the usual names. Of turns that end with an answer, that answer is what is asked for."""
    where: str = ""
    """Read only the records with this in a field: FIELD=VALUE."""
    template: Literal["auto", "none"] = "auto"
    """How a prompt is written: `auto` with the tokenizer's chat template, `none` as plain text."""

    def __post_init__(self) -> None:
        check_types(self, "data")
        require(len(self.train) > 0, "data.train is empty; name at least one file.")
        require(
            not self.where or bool(self.where.partition("=")[0] and self.where.partition("=")[1]),
            f"data.where is {self.where!r}; write it as FIELD=VALUE, or leave it empty.",
        )


@dataclass(frozen=True, kw_only=True)
class Rated(Dialogues):
    """Preferences without pairs: completions that are good or bad, each by itself (KTO)."""

    prompt: str = ""
    """Field or column of what is given, where it is not one of the usual names; goes with completion."""
    completion: str = ""
    """Field or column of the completion; goes with prompt. Of a dialogue, it is the last answer."""
    label: str = ""
    """Field or column that is true (or 1) of a good completion; unspecified means `label` or `kto_tag`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_both(self.prompt, self.completion)


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


@dataclass(frozen=True, kw_only=True)
class Mix:
    """Several sources as one: pretraining texts, dialogues and tasks, each giving its share of the rows."""

    sources: tuple[Text | Chat | Task, ...]
    """The sources; all are read with one tokenizer."""
    weights: tuple[Annotated[float, Bounds(1e-9, 1e9)], ...] = ()
    """Share of the rows that each source gives, in any unit; one that is used up begins anew. Rows of
    dialogues hold prompts and padding too, which are not trained. Empty means by size, see temperature."""
    temperature: Annotated[float, Bounds(1e-2, 1e4)] = 1.0
    """Without weights, shares are proportional to size ** (1 / temperature): 1 keeps the sizes, more makes
    them more equal (T5, section 3.5.2)."""
    names: tuple[str, ...] = ()
    """Names of the sources in logs; empty means those of their folders or files."""
    length: Length | None = None
    """Tokens per row, of all sources; None means model.context."""
    workers: Workers = 0
    """Number of processes that read ahead; 0 means threads of this process."""

    def __post_init__(self) -> None:
        check_types(self, "data")
        count = len(self.sources)
        require(count > 0, "data.sources is empty; name at least one source.")
        for name in ("weights", "names"):
            given = getattr(self, name)
            require(
                not given or len(given) == count,
                f"data.{name} has {len(given)} entries for {count} sources; give one for each, or none.",
            )
        require(
            not self.weights or self.temperature == 1.0,
            f"data.temperature is {self.temperature} but data.weights are given; drop one of them.",
        )
        bad = [n for n in self.names if not n.isprintable() or not n or set(n) & set("/ ")]
        require(
            not bad and len(set(self.names)) == len(self.names),
            f"data.names is {self.names}; names differ, and hold no spaces or slashes.",
        )
        for i, source in enumerate(self.sources):
            own = {"length": source.length, "workers": source.workers or None}
            for name, value in own.items():
                require(
                    value is None,
                    f"data.sources[{i}].{name} is {value} but rows are mixed; set data.{name} instead.",
                )
            require(
                not (isinstance(source, Text) and source.contiguous),
                f"data.sources[{i}].contiguous is True, but text that goes on from batch to batch cannot be "
                "mixed; set it to False.",
            )

    @property
    def source_names(self) -> tuple[str, ...]:
        """The name of each source, all different."""
        if self.names:
            return self.names
        found: list[str] = []
        for source in self.sources:
            if isinstance(source, Task):
                name = source.name
            else:
                name = Path(source.path).name if isinstance(source, Text) else Path(source.train[0]).stem
            own = re.sub(r"[^\w.-]+", "-", name).strip("-") or "source"
            names = itertools.chain([own], (f"{own}-{i}" for i in itertools.count(2)))
            found.append(next(name for name in names if name not in found))
        return tuple(found)


Data = Text | Chat | Prompts | Pairs | Rated | Tagged | Labelled | Mix | Task
