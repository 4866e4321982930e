"""Dialogues: the file shapes that they come in, what is held out of them, and their rows."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from jaxgpt.config import Chat, Classifier
from jaxgpt.data.packing import Item, PackedExamples, Rows
from jaxgpt.data.sources import (
    Report,
    as_object,
    check_text,
    expand,
    field_of,
    open_source,
    parse_line,
    read_lines,
)
from jaxgpt.errors import UserError, nearest, require
from jaxgpt.text.chat import Dialogue, Example, render, truncate
from jaxgpt.text.chat_template import ROLES
from jaxgpt.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

SUFFIXES = (".json", ".jsonl", ".jsonl.gz")

_ALIASES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}


# -------------------------------------------------------------------------------------- the shapes


def _turns(value: Any, role_key: str, text_key: str) -> Dialogue:
    if not isinstance(value, list) or not value:
        raise ValueError(f"a non-empty list of turns was expected, not {type(value).__name__}")
    turns = []
    for turn in value:
        if not isinstance(turn, dict) or role_key not in turn or text_key not in turn:
            raise ValueError(f"a turn needs {role_key!r} and {text_key!r}")
        name = check_text(turn[role_key], role_key)
        role = _ALIASES.get(name, name)
        if role not in ROLES:
            raise ValueError(f"role {name!r} is unknown{nearest(name, ROLES)}")
        turns.append({"role": role, "content": check_text(turn[text_key], text_key)})
    return turns


def _alpaca(record: dict[str, Any]) -> Dialogue:
    turns: Dialogue = []
    if record.get("system"):
        turns.append({"role": "system", "content": check_text(record["system"], "system")})
    for pair in record.get("history") or []:
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError("history is not a list of [question, answer] pairs")
        turns.append({"role": "user", "content": check_text(pair[0], "history")})
        turns.append({"role": "assistant", "content": check_text(pair[1], "history")})
    question = check_text(record["instruction"], "instruction")
    if given := check_text(record.get("input") or "", "input"):
        question = f"{question}\n{given}" if question else given
    turns.append({"role": "user", "content": question})
    turns.append({"role": "assistant", "content": check_text(record["output"], "output")})
    return turns


def _completion(record: dict[str, Any]) -> Dialogue:
    turns: Dialogue = []
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        value = record[key]
        if isinstance(value, list):
            turns += _turns(value, "role", "content")
        else:
            turns.append({"role": role, "content": check_text(value, key)})
    return turns


_SHAPES: dict[str, tuple[tuple[str, ...], Callable[[dict[str, Any]], Dialogue]]] = {
    "messages": (("messages",), lambda r: _turns(r["messages"], "role", "content")),
    "conversations": (("conversations",), lambda r: _turns(r["conversations"], "from", "value")),
    "instruction/input/output": (("instruction", "output"), _alpaca),
    "prompt/completion": (("prompt", "completion"), _completion),
}


def shape_of(record: Any) -> str | None:
    """The name of the shape whose fields the record has, or None."""
    if not isinstance(record, dict):
        return None
    fits = (name for name, (keys, _) in _SHAPES.items() if all(k in record for k in keys))
    return next(fits, None)


def to_dialogue(record: Any, shape: str) -> Dialogue:
    """The dialogue of one record; `ValueError` with a short reason where it is not one."""
    keys, read = _SHAPES[shape]
    for key in keys:
        field_of(as_object(record), key)
    turns = read(record)
    if not any(turn["role"] == "assistant" for turn in turns):
        raise ValueError("no assistant turn, so nothing to learn")
    if any(turn["role"] == "assistant" and not turn["content"] for turn in turns):
        raise ValueError("an assistant turn is empty")
    return turns


# --------------------------------------------------------------------------------------- the files


@dataclass
class ChatReport(Report):
    """What reading dialogues found; `shapes` names the shape of each file."""

    shapes: dict[str, str] = field(default_factory=dict)


def read_dialogues(paths: Iterable[str | Path], max_bad: float = 0.01) -> tuple[list[Dialogue], ChatReport]:
    """The dialogues of JSON and JSONL files, folders or globs, and what was found in them.

    The shape of a file is that of its first record that has one, and is logged; a record of
    another shape in the same file is bad. Bad records are logged with file and line.

    Raises:
      UserError: a file that cannot be read or has no known shape; a share of bad records above
        `max_bad`; no dialogue at all.
    """
    report, dialogues = ChatReport(), list[Dialogue]()
    for path in expand(paths, SUFFIXES):
        dialogues += _read_file(path, report)
    report.check(max_bad, "mend them or leave the file out")
    require(bool(dialogues), "the instruction files hold no dialogue; name files that do.")
    return dialogues, report


def _read_file(path: str, report: ChatReport) -> Iterator[Dialogue]:
    shape, early = None, list[tuple[str, Any]]()
    for where, record in _records(path, report):
        if shape is None:
            shape = shape_of(record)
            if shape is None:
                early.append((where, record))
                continue
            report.shapes[path] = shape
            log.info("%s: dialogues in the shape %s", path, shape)
        yield from _checked(where, record, shape, report)
    if shape is None:
        first = early[0][1] if early else None
        keys = ", ".join(map(str, first)) if isinstance(first, dict) else type(first).__name__
        raise UserError(
            f"{path} has no known shape (its first record has: {keys}); use {', '.join(_SHAPES)}."
        )
    for where, record in early:
        yield from _checked(where, record, shape, report)


def _checked(where: str, record: Any, shape: str, report: ChatReport) -> Iterator[Dialogue]:
    try:
        yield to_dialogue(record, shape)
    except ValueError as error:
        report.add_bad(where, str(error))


def _records(path: str, report: ChatReport) -> Iterator[tuple[str, Any]]:
    """(where it stands, JSON value) of each record; lines that are not JSON are counted bad."""
    if not path.lower().endswith(".json"):
        yield from read_lines(path, report, parse_line)
        return
    with open_source(path) as stream:
        data = stream.read()
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (offset {error.start}); convert it with iconv.") from None
    except ValueError as error:
        raise UserError(
            f"{path} is not JSON ({error}); a file of one object a line is named .jsonl."
        ) from None
    if isinstance(value, dict):  # {"data": [...]} as some exports have it
        value = next((v for v in value.values() if isinstance(v, list)), value)
    require(isinstance(value, list), f"{path} holds {type(value).__name__}; a list was expected.")
    for i, record in enumerate(value):
        report.lines += 1
        yield f"{path}: record {i + 1}", record


# ---------------------------------------------------------------------------------------- the rows


def rows(
    data: Chat,
    tokenizer: Tokenizer,
    length: int,
    seed: int | None,
    batch_size: int,
    task: Classifier | None,
) -> Rows:
    """The dialogues of a split, rendered and packed whole; see `data.readers.Reader`.

    Raises:
      UserError: no dialogue has an answer within the length.
    """
    split = "validation" if seed is None else "train"
    items = [Item.of(example) for example in _examples(data, tokenizer, length, split)]
    return PackedExamples(items, length, data.bins, seed, tokenizer.control["<|pad|>"])


def _examples(data: Chat, tokenizer: Tokenizer, length: int, split: str) -> list[Example]:
    """The examples of a split; remembered while the files stay as they are."""
    apart = bool(data.validation)  # validation has files of its own: the others need no reading
    files = expand(data.validation if apart and split == "validation" else data.train, SUFFIXES)
    stats = [(f, Path(f).stat()) for f in files]
    stamp = tuple((f, s.st_size, s.st_mtime_ns) for f, s in stats)
    return _read_examples(stamp, split if apart else "", data.validation_fraction, tokenizer, length)[split]


@lru_cache(maxsize=2)  # the files of training, and those of validation where they are others
def _read_examples(
    stamp: tuple[tuple[str, int, int], ...], only: str, share: float, tokenizer: Tokenizer, length: int
) -> dict[str, list[Example]]:
    """Examples by split: all for the split `only`, or where it is empty, a share held out of them."""
    dialogues, _ = read_dialogues(path for path, _, _ in stamp)
    if only:
        parts = {only: dialogues}
    else:
        parts = dict(zip(("train", "validation"), hold_out(dialogues, share), strict=True))
    return {name: _fit(part, tokenizer, length, name) for name, part in parts.items()}


def hold_out(dialogues: list[Dialogue], share: float) -> tuple[list[Dialogue], list[Dialogue]]:
    """(kept, held out): the held-out dialogues are chosen by a hash, and copies stay together."""
    keys = [hashlib.sha256(repr(d).encode("utf-8")).digest() for d in dialogues]
    order = sorted(set(keys))
    require(
        len(order) >= 2,
        "the instruction files hold a single distinct dialogue, so none can be held out; add more "
        "or set data.validation.",
    )
    count = min(max(1, round(share * len(order))), len(order) - 1)
    chosen = set(order[:count])
    kept = [d for d, key in zip(dialogues, keys, strict=True) if key not in chosen]
    return kept, [d for d, key in zip(dialogues, keys, strict=True) if key in chosen]


def _fit(dialogues: list[Dialogue], tokenizer: Tokenizer, length: int, name: str) -> list[Example]:
    """Rendered and cut to the row; those left without a trained token are counted and dropped."""
    examples, cut = list[Example](), 0
    for dialogue in dialogues:
        rendered = render(dialogue, tokenizer)
        if (example := truncate(rendered, length)) is not None:
            examples.append(example)
            cut += sum(example.weights) < sum(rendered.weights)
    dropped = len(dialogues) - len(examples)
    if dropped:
        log.warning(
            "%d of %d dialogues (%s) have no answer within %d tokens and were dropped",
            dropped, len(dialogues), name, length,
        )  # fmt: skip
    if cut:
        log.warning(
            "%d of %d dialogues (%s) lose the end of an answer beyond %d tokens; lengthen data.length",
            cut, len(dialogues), name, length,
        )  # fmt: skip
    require(
        bool(examples),
        f"none of the {len(dialogues)} dialogues ({name}) has an answer within {length} tokens; "
        "lengthen data.length.",
    )
    return examples
