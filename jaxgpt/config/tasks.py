"""What a task is: files of records, how each is asked, and how answers are scored.

A task is one class in one file (jaxgpt/tasks/NAME.py, or a file of its user's; docs/add-a-task.md).
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from jaxgpt.config import code
from jaxgpt.config.bounds import Tokens
from jaxgpt.config.decoding import Decoding, Sampling
from jaxgpt.config.dialogues import Dialogues
from jaxgpt.config.knowledge import Knowledge
from jaxgpt.errors import require

GREEDY = Sampling(temperature=0.0)


@dataclass(frozen=True)
class Sample:
    """One example of a task.

    Attributes:
      values: what the names in phrasings stand for.
      answers: right answers, the first of which is learned; of a reading task, `("",)` where there is none.
      turns: what was said before, as turns of a dialogue.
      choices: where the answer is one of these; their likelihoods are measured too.
      facts: what metrics need beside these, such as the group of a candidate; plain JSON values.
      learned: what is learned, where that is not the first answer itself, such as a worked solution.
      together: names, such as that of a passage; samples with a common one are held out together. Empty
        means those that ask the same.
    """

    values: dict[str, str]
    answers: tuple[str, ...] = ()
    turns: tuple[dict[str, Any], ...] = ()
    choices: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)
    learned: str = ""
    together: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """What is asked, whatever the answer: answers to samples of one key are answers to all of them."""
        return repr((self.turns, sorted(self.values.items()), self.choices, sorted(self.facts.items())))


@dataclass(frozen=True, kw_only=True)
class Task(Dialogues):
    """A task in a file of its user, or one of `jaxgpt.tasks`: a frozen dataclass derived from this.

    A run stores a user's as `FILE.py:NAME` and keeps a copy of the file (`jaxgpt.config.code`).
    """

    train: tuple[str, ...] = ()
    """Files, folders or globs; may be empty of a task that is scored alone."""
    test: tuple[str, ...] = ()
    """As train: what a suite scores; when empty, that is the validation data."""
    prompts: tuple[str, ...] = ()
    """Ways to ask, with the names of a sample's values in braces; each sample is trained in one of them."""
    held_out: str = ""
    """The way to ask in evaluation, validation loss included, which training does not use."""
    metrics: tuple[str, ...] = ()
    """What answers are scored by: names of metrics (docs/tasks.md), or functions `FILE.py:NAME` of a
    prediction to a number. The first is the main one."""
    decoding: Decoding = GREEDY
    """How answers are written when they are scored."""
    max_new_tokens: Tokens = 64
    """Maximum number of tokens of an answer that is scored."""
    language: Literal["en", "zh"] = "en"
    """Of the answers; metrics split text by it."""
    header: tuple[str, ...] = ()
    """Names of the columns of a table whose first line names none, in their order; empty means those
    that the task reads."""
    knowledge: Knowledge | None = None
    """Passages and facts that are put before what is asked, in training and evaluation alike
    (docs/knowledge.md); None for none."""

    abstract: ClassVar[bool] = True
    """That a config cannot hold this class itself; derived ones are not."""
    names: ClassVar[tuple[str, ...]] = ()
    """Names of the values that samples have, which phrasings may use."""
    disturbed: ClassVar[tuple[str, ...]] = ()
    """Names of the values that may be disturbed without another answer being right (`--robust`)."""
    phrasings: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """By language, the ways to ask that the task has itself, the last of them the one held out."""
    one_each: ClassVar[bool] = False
    """Whether every sample counts by itself in evaluation, as labels do; else those that ask the same are
    one, and all their answers are right."""
    suffixes: ClassVar[tuple[str, ...]] = ()
    """Endings of files that it reads, beside those of records."""

    def __init_subclass__(cls) -> None:
        cls.abstract = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "metrics", code.references(self.metrics, "data.metrics"))
        self._follow_language()
        super().__post_init__()
        require(
            len(self.names) > 0,
            f"the class {type(self).__name__} names no values; set `names: ClassVar[tuple[str, ...]]` in it.",
        )
        require(len(self.prompts) > 0, "data.prompts is empty; give at least one way to ask.")
        require(len(self.metrics) > 0, "data.metrics is empty; name at least one.")
        for i, text in enumerate(self.prompts):
            self._check_phrasing(f"data.prompts[{i}]", text)
        self._check_phrasing("data.held_out", self.held_out)
        require(
            self.held_out not in self.prompts or len(self.prompts) == 1,
            f"data.held_out is {self.held_out!r:.200}, one of data.prompts; leave it out there, so that it "
            "is new in evaluation.",
        )
        require(
            self.knowledge is None or bool(self.knowledge),
            "data.knowledge names neither documents nor facts; name one of them.",
        )

    def _check_files(self) -> None:
        given = self.train or self.validation or self.test
        require(bool(given), "data.train, data.validation and data.test are empty; name at least one file.")

    def _follow_language(self) -> None:
        """Take the task's own phrasings of its language, where none are given or those of another one are."""
        if (own := self.phrasings.get(self.language)) is None:
            return
        every = self.phrasings.values()
        if not self.prompts or tuple(self.prompts) in [ways[:-1] for ways in every]:
            object.__setattr__(self, "prompts", own[:-1])
        if not self.held_out or self.held_out in [ways[-1] for ways in every]:
            object.__setattr__(self, "held_out", own[-1])

    def _check_phrasing(self, where: str, text: str) -> None:
        try:
            used = [name for _, name, *_ in string.Formatter().parse(text) if name is not None]
        except ValueError as error:
            used, why = [], str(error)
        else:
            unknown = [name for name in used if name not in self.names]
            why = f"no value is called {unknown[0]!r}" if unknown else "" if used else "it names no value"
        known = ", ".join(f"{{{name}}}" for name in self.names)
        require(not why, f"{where} is {text!r:.200} but {why}; use {known} (and {{{{ for a brace).")

    @property
    def name(self) -> str:
        """The task's name in logs and metrics."""
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(self).__name__).lower()

    @property
    def metric_names(self) -> tuple[str, ...]:
        """What the metrics are called in a run's records: of `FILE.py:NAME` its NAME."""
        return tuple(name.rpartition(":")[2] for name in self.metrics)

    @property
    def wanted(self) -> str:
        """What its records must have, for messages."""
        return "fields of " + self.name

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of a table's columns where its first line names none; empty where it must."""
        return self.header

    def samples(self, record: Any) -> Iterator[Sample]:
        """The samples of one record of a file.

        Raises:
          ValueError: it is no record of this task, with a short reason.
        """
        raise NotImplementedError(f"{type(self).__name__} has no samples(record); yield Sample(...) there.")

    def records(self, path: str, report: Any) -> Iterator[tuple[str, Any]] | None:
        """(where it stands, record) of each record of a file; None means those that its ending says."""
        return None

    def searched(self, sample: Sample) -> str:
        """What `knowledge` is searched for: the value `question`, else the first."""
        return sample.values.get("question") or next(iter(sample.values.values()))

    def target(self, sample: Sample) -> str:
        """What the model learns to answer."""
        return sample.learned or sample.answers[0]

    def extract(self, text: str, sample: Sample) -> str:
        """The answer in a completion; empty where there is none."""
        return text.strip()
