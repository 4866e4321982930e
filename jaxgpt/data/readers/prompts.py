"""Prompts for reinforcement learning, each with the record that its reward judges by."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from jaxgpt.config import Classifier, Prompts
from jaxgpt.data.lines import as_object, check_text, field_of
from jaxgpt.data.packing import ENDLESS, Row, Rows
from jaxgpt.data.readers.dialogues import QUESTIONS, TURNS, after_system, history
from jaxgpt.data.readers.turns import Record, is_turns, read_turns, take_text
from jaxgpt.data.records import SUFFIXES, RecordReport, read_records
from jaxgpt.data.sources import expand, file_key, say_once
from jaxgpt.errors import UserError, require
from jaxgpt.text.chat import Dialogue, prompt_ids
from jaxgpt.text.tokenizer import Tokenizer, text_ids

log = logging.getLogger(__name__)

MAX_BAD = 0.01
"""Share of bad records above which reading fails."""


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
      place: where it stands, FILE:LINE or the number of its record.
      ids: after which a completion begins.
      turns: of the dialogue so far.
      text: what the user said last; without a template the whole prompt.
      record: all of the record, as the file has it.
    """

    place: str
    ids: list[int]
    turns: Dialogue
    text: str
    record: dict[str, Any]


class PromptRows:
    """Prompts by number: with a seed an endless stream, every epoch of which has each prompt once, in a new
    order; without one the prompts in order.

    As rows of a batch they are read alone: no target has weight.
    """

    masked = False
    length: int
    pad: int
    fingerprint: str

    def __init__(self, prompts: Sequence[Prompt], length: int, seed: int | None, pad: int) -> None:
        self.prompts, self.length, self.seed, self.pad = prompts, length, seed, pad
        digest = hashlib.sha256(json.dumps([[p.ids, p.record] for p in prompts], sort_keys=True).encode())
        self.fingerprint = f"prompts-{digest.hexdigest()[:16]}-{length}-{seed}"
        self._order: tuple[int, np.ndarray] = (-1, np.zeros(0, int))

    @property
    def epoch_rows(self) -> int:
        """Prompts of an epoch."""
        return len(self.prompts)

    def __len__(self) -> int:
        return len(self.prompts) if self.seed is None else ENDLESS

    def prompt(self, number: int) -> Prompt:
        """The prompt of this number."""
        epoch, place = divmod(int(number), len(self.prompts))
        if self.seed is None:
            return self.prompts[place]
        if self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.prompts))
        return self.prompts[self._order[1][place]]

    def __getitem__(self, index: int) -> Row:
        ids, (at, T) = self.prompt(index).ids, (np.arange(self.length), self.length)
        row: Row = {"tokens": np.full(T, self.pad, np.int32), "targets": np.zeros(T, np.int32)}
        row["tokens"][: len(ids)], row["targets"][: len(ids) - 1] = ids, ids[1:]
        inside = at < len(ids)
        more = {"segments": inside.astype(np.int32), "positions": (at * inside).astype(np.int32)}
        return row | {"weights": np.zeros(T, np.float32)} | more


def rows(
    data: Prompts,
    tokenizer: Tokenizer,
    length: int,
    seed: int | None,
    batch_size: int,
    task: Classifier | None,
) -> Rows:
    """The prompts of a split (`PromptRows`); see `data.readers.Reader`.

    Raises:
      UserError: there are none that leave room for a completion.
    """
    split = "validation" if seed is None else "train"
    apart = bool(data.validation)
    files = expand(data.validation if apart and split == "validation" else data.train, SUFFIXES)
    if apart and split == "validation":
        trained = {file_key(f) for f in expand(data.train, SUFFIXES)}
        if both := [f for f in files if file_key(f) in trained]:
            say_once(
                f"data.train names files of data.validation too, so they are no held-out prompts: {both[0]}"
            )
    stamp = tuple((f, (stat := Path(f).stat()).st_size, stat.st_mtime_ns) for f in files)
    found = _read(stamp, data, tokenizer, length)
    if not apart:
        found = hold_out(found, data.validation_fraction)[split == "validation"]
    return PromptRows(found, length, seed, tokenizer.control["<|pad|>"])


@lru_cache(maxsize=2)  # the files of training, and those of validation where they are others
def _read(
    stamp: tuple[tuple[str, int, int], ...], data: Prompts, tokenizer: Tokenizer, length: int
) -> list[Prompt]:
    """The prompts of files that fit into rows."""
    report, found = RecordReport(), list[Prompt]()
    for path, _, _ in stamp:
        for place, record in read_records(path, report, lambda value: _asked(value, data.prompt) is not None):
            try:
                if _is_wanted(as_object(record), data.where):
                    found.append(_prompt(place, record, data, tokenizer))
            except (ValueError, UserError) as error:
                report.add_bad(place, str(error).removesuffix("."))
    report.check(MAX_BAD, "fix them or leave the file out")
    narrowed = f" with {data.where}" if data.where else ""
    require(bool(found), f"the files of prompts hold none{narrowed}; name files that do.")
    fit = [prompt for prompt in found if len(prompt.ids) < length]
    if left := len(found) - len(fit):
        log.warning("%d of %d prompts leave no room in %d tokens and were dropped", left, len(found), length)
    require(bool(fit), f"no prompt of {len(found)} leaves room in {length} tokens; lengthen data.length.")
    return fit


def hold_out(prompts: Sequence[Prompt], share: float) -> tuple[list[Prompt], list[Prompt]]:
    """(kept, held out): chosen by a hash of the tokens, so that equal prompts stay together."""
    keys = [hashlib.sha256(np.asarray(prompt.ids).tobytes()).digest() for prompt in prompts]
    order = sorted(set(keys))
    require(
        len(order) >= 2,
        "the files hold a single distinct prompt, so none can be held out; add more or set data.validation.",
    )
    held = set(order[: min(max(1, round(share * len(order))), len(order) - 1)])
    parts = ([], [])
    for prompt, key in zip(prompts, keys, strict=True):
        parts[key in held].append(prompt)
    return parts


def _asked(record: Any, field: str) -> str | None:
    """The field of a record that holds its prompt, or None."""
    names: Iterable[str] = (field,) if field else (*TURNS, *QUESTIONS)
    if not isinstance(record, dict):
        return None
    return next((name for name in names if field or record.get(name) is not None), None)


def _is_wanted(record: Record, where: str) -> bool:
    if not where:
        return True
    name, _, value = where.partition("=")
    found = field_of(record, name)
    return (found if isinstance(found, str) else json.dumps(found)) == value


def _prompt(place: str, record: Record, data: Prompts, tokenizer: Tokenizer) -> Prompt:
    turns = to_prompt(record, data.prompt)
    said = turns[-1]["content"]
    if data.template == "auto":
        return Prompt(place, prompt_ids(turns, tokenizer), turns, said, record)
    if len(turns) > 1:
        raise ValueError("data.template is 'none', which writes one text, but the prompt has several turns")
    return Prompt(place, text_ids(tokenizer, said, bos=True), turns, said, record)


def to_prompt(record: Record, field: str = "") -> Dialogue:
    """The turns that a record asks to be answered; an answer that stands behind them is left out.

    Raises:
      ValueError: there are none, with a short reason.
    """
    name = _asked(record, field)
    if name is None:
        raise ValueError("no prompt: the record has none of " + ", ".join((*TURNS, *QUESTIONS)))
    rest, unread = dict(record), list[str]()
    value = field_of(rest, name)
    turns = history(rest)
    if is_turns(value):
        turns += read_turns(value, unread, name)
        last = max((i for i, turn in enumerate(turns) if turn["role"] != "assistant"), default=-1)
        turns = turns[: last + 1]
        if not turns or turns[-1]["role"] == "system":
            raise ValueError(f"field {name!r} holds no turn to answer")
    else:
        about = [text for other in ("input", "context") if other != name and (text := take_text(rest, other))]
        text = "\n".join(part for part in (check_text(value, name), *about) if part)
        if not text:
            raise ValueError(f"field {name!r} is empty")
        turns.append({"role": "user", "content": text})
    return after_system(rest, turns)
