"""Samples of tasks: the files that they come in, how they are asked, and their rows."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from jaxgpt.config.tasks import Sample, Task
from jaxgpt.data.knowledge import open_library
from jaxgpt.data.lines import check_text
from jaxgpt.data.packing import Rows
from jaxgpt.data.readers.chat import (
    Format,
    Kind,
    Placed,
    fit_dialogues,
    hold_out,
    read_examples,
    rows_of_kind,
    write_dialogue,
)
from jaxgpt.data.readers.dialogues import Shape
from jaxgpt.data.readers.turns import left_over
from jaxgpt.data.records import SUFFIXES
from jaxgpt.errors import nearest, require
from jaxgpt.text.chat import Dialogue, Example
from jaxgpt.text.tokenizer import Tokenizer


class Asked(NamedTuple):
    """A sample and how it is asked: the turns up to the answer."""

    sample: Sample
    turns: Dialogue


class Noted(dict):
    """A record that notes which of its fields were read."""

    def __init__(self, record: dict[str, Any]) -> None:
        super().__init__(record)
        self.read: set[str] = set()
        self._left: list[str] = []

    def leave(self, names: list[str]) -> None:
        """Say what was left unread, of a record that was read as a whole."""
        self.read, self._left = set(self), names

    @property
    def unread(self) -> list[str]:
        """The names of fields that nobody read, for a warning; `ValueError` on one that cannot be left."""
        rest = {name: super(Noted, self).get(name) for name in sorted(self.keys() - self.read)}
        return self._left + left_over(rest, named=True)

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.read.add(name)
        return super().get(name, default)


def _format(task: Task) -> Format:
    def is_record(value: Any) -> bool:
        try:
            next(iter(task.samples(value)))
        except (ValueError, LookupError, TypeError, StopIteration):
            return False
        return True

    def read(record: Any, shape: Shape) -> tuple[list[Sample], list[str]]:
        noted = Noted(record) if isinstance(record, dict) else record
        try:
            found = [_checked(task, sample) for sample in task.samples(noted)]
        except KeyError as error:  # of a task that takes a field without asking for it first
            raise ValueError(f"no field {error}{nearest(str(error.args[0]), map(str, record))}") from None
        except (LookupError, TypeError) as error:
            raise ValueError(f"it cannot be read ({type(error).__name__}: {error})") from None
        if not found:
            raise ValueError("it holds no sample")
        return found, noted.unread if isinstance(noted, Noted) else []

    shape = Shape(task.name, lambda record, unread: None, named=True)
    fix = f"mend them, or name the fields of {type(task).__name__} otherwise (docs/tasks.md)"
    more: dict[str, Any] = {"suffixes": (*SUFFIXES, *task.suffixes), "is_record": is_record, "mend": fix}
    return Format(lambda record: shape, read, task.wanted, fix, task.records, task.columns, **more)


def _checked(task: Task, sample: Sample) -> Sample:
    """The sample, if it can be asked."""
    if missing := [name for name in task.names if name not in sample.values]:
        raise ValueError(f"samples() gives no value {missing[0]!r}{nearest(missing[0], sample.values)}")
    for name, value in sample.values.items():
        check_text(value, name)
    for text in (*sample.answers, *sample.choices, sample.learned):
        check_text(text, "answer")
    if not sample.answers:
        raise ValueError("it has no answer")
    return sample


def question(task: Task, sample: Sample, phrasing: str) -> Dialogue:
    """The turns that ask a sample in this way, after what is known about it, up to the answer."""
    known = open_library(task.knowledge).about(task.searched(sample)).text if task.knowledge else ""
    text = known + phrasing.format_map(sample.values)
    end = "\n" if task.template == "none" else ""  # where nothing else parts the two
    return [*sample.turns, {"role": "user", "content": text + end}]


def phrasing_of(task: Task, sample: Sample, split: str) -> str:
    """How a sample of a split is asked: in training in one of the ways, by a hash; else as held out."""
    if split != "train":
        return task.held_out
    return task.prompts[zlib.crc32(sample.key.encode()) % len(task.prompts)]


def _prepare(part: list[Placed], split: str, task: Task) -> list[Placed]:
    return [
        Placed(place, Asked(sample, question(task, sample, phrasing_of(task, sample, split))))
        for place, samples in part
        for sample in samples
    ]


def _write(asked: Asked, task: Task, tokenizer: Tokenizer) -> Example:
    answer = {"role": "assistant", "content": task.target(asked.sample)}
    return write_dialogue([*asked.turns, answer], task, tokenizer)


def _key(samples: list[Sample]) -> frozenset[str]:
    return frozenset(name for sample in samples for name in sample.together or (sample.key,))


_rows = rows_of_kind(Kind(_format, _key, _prepare, _write, fit_dialogues))


def rows(task: Task, *args: Any) -> Rows:
    """The rows of a Task; see `data.readers.Reader`. `UserError` where no sample fits."""
    require(len(task.train) > 0, f"data.train of the task {task.name} is empty; name the files to train on.")
    return _rows(task, *args)


def evaluation_sources(task: Task, split: str = "validation") -> tuple[tuple[str, ...], bool]:
    """The files, folders or globs of a split (see `evaluation_samples`), and whether they are its alone."""
    split = "validation" if split == "test" and not task.test else split
    apart = bool(getattr(task, split)) and (split != "train" or bool(task.validation))
    require(apart or bool(task.train), f"the task {task.name} names no files for {split}; name some.")
    return (getattr(task, split) if apart else task.train), apart


def evaluation_samples(task: Task, split: str = "validation") -> list[tuple[str, Sample]]:
    """(where it stands, sample) of each question of a split, in order; the answers of one question as one,
    unless the task's samples count each (`Task.one_each`).

    Args:
      task: whose files are read; where it names none for validation, its share of `train` is held out.
      split: `train`, `validation`, or `test`, which is the validation data where it names no files.

    Raises:
      UserError: as reading them for training.
    """
    split = "validation" if split == "test" and not task.test else split
    sources, apart = evaluation_sources(task, split)
    placed, _ = read_examples(sources, _format(task))
    if not apart:
        placed = hold_out(placed, task.validation_fraction, _key)[split == "validation"]
    if task.one_each:
        return list(_flat(placed))
    found: dict[str, tuple[str, Sample]] = {}
    for place, sample in _flat(placed):
        if (before := found.get(sample.key)) is None:
            found[sample.key] = place, sample
            continue
        answers = tuple(dict.fromkeys((*before[1].answers, *sample.answers)))
        found[sample.key] = before[0], replace(before[1], answers=answers)
    return list(found.values())


def _flat(placed: list[Placed]) -> Iterator[tuple[str, Sample]]:
    for place, samples in placed:
        for sample in samples:
            yield place, sample
