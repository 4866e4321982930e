"""Dialogues: the files that they come in, what is held out of them, and their rows.

What is not particular to instruction data goes by a `Kind`, so that preferences (pairs.py) are read here too.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from jaxgpt.alive import alive
from jaxgpt.config import Chat, Classifier
from jaxgpt.config.data import Dialogues
from jaxgpt.data.lines import kind_name
from jaxgpt.data.packing import Item, PackedExamples, Rows
from jaxgpt.data.readers.dialogues import KNOWN, Shape, questions_of, shape_of, to_dialogue
from jaxgpt.data.readers.turns import METADATA
from jaxgpt.data.records import SUFFIXES, RecordReport, read_records
from jaxgpt.data.sources import Report, expand, file_key, say_once
from jaxgpt.data.tables import TABLES
from jaxgpt.errors import UserError, require
from jaxgpt.text.chat import Dialogue, Example, render, render_plain, truncate
from jaxgpt.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

MAX_BAD = 0.01
"""Share of bad records above which a command fails."""
_FIX = "fix them or leave the file out"


class Placed(NamedTuple):
    """A dialogue (or what else a kind reads) and where it stands: FILE:LINE, or the number of its record."""

    place: str
    dialogue: Any


class Format(NamedTuple):
    """How records are read.

    Attributes:
      shape_of: the shape of a record, or None where it has none.
      read: what a record of a shape holds, and the names of what in it nobody read; `ValueError` with a short
        reason where it is no such record.
      wanted: what was looked for, for messages.
      fix: what to do where it is not found.
      records: (where it stands, value) of each record of a file, where its ending does not say it.
      columns: names of a table's columns where its first line names none.
      suffixes: endings of the files.
      is_record: whether a value is one record, not several; None means whether it has a shape.
      mend: what to do about bad records.
    """

    shape_of: Callable[[Any], Shape | None]
    read: Callable[[Any, Shape], tuple[Any, list[str]]]
    wanted: str
    fix: str
    records: Callable[[str, ChatReport], Iterator[tuple[str, Any]] | None] = lambda path, report: None
    columns: Sequence[str] = ()
    suffixes: tuple[str, ...] = SUFFIXES
    is_record: Callable[[Any], bool] | None = None
    mend: str = _FIX


class Kind(NamedTuple):
    """The steps from a record to rows, which differ between kinds of data.

    Attributes:
      format: of a config.
      key: what is held out together, of what a record holds.
      prepare: (what its records hold, the split, the config) to the examples of a split.
      write: an example as tokens; `UserError` where the template or the tokenizer refuses it.
      fit: (rendered examples, length, name of the split) to items that fit into a row; it tells what it
        drops.
      group: consecutive items that stay together.
    """

    format: Callable[[Any], Format]
    key: Callable[[Any], Any]
    prepare: Callable[[list[Placed], str, Any], list[Placed]]
    write: Callable[[Any, Any, Tokenizer], Any]
    fit: Callable[[list[Any], int, str], list[Item]]
    group: int = 1


@dataclass
class ChatReport(RecordReport):
    """What reading dialogues found; `shapes` names the shape of each file."""

    shapes: dict[str, str] = field(default_factory=dict)


def read_dialogues(
    paths: Iterable[str | Path], max_bad: float = MAX_BAD, prompt: str = "", completion: str = ""
) -> tuple[list[Placed], ChatReport]:
    """The dialogues of files, folders or globs, and what was found in them; see `read_examples`.

    Args:
      paths: of files with one of `records.SUFFIXES`.
      max_bad: largest share of bad records.
      prompt: field of what is given, where it cannot be told by its name; goes with `completion`.
    """
    return read_examples(paths, dialogue_format(prompt, completion), max_bad)


def dialogue_format(prompt: str = "", completion: str = "") -> Format:
    """How dialogues are read; see `read_dialogues`."""
    shape = partial(shape_of, prompt=prompt, completion=completion)
    if prompt:
        return Format(shape, to_dialogue, f"fields {prompt} and {completion}", "fix their names")
    fix = "data.prompt and data.completion name other fields"
    return Format(shape, to_dialogue, f"known shape ({KNOWN})", fix)


def read_examples(
    paths: Iterable[str | Path], form: Format, max_bad: float = MAX_BAD
) -> tuple[list[Placed], ChatReport]:
    """What the records of files, folders or globs hold, and what was found in them.

    The shape of a file is that of its first record that has one, and is logged; a record of
    another shape in the same file is bad. Bad records are logged with file and line; fields that nobody
    reads are named once per file.

    Raises:
      UserError: a file that cannot be read or has no known shape; a share of bad records above
        `max_bad`; no record at all.
    """
    report, examples = ChatReport(), list[Placed]()
    for path in expand(paths, form.suffixes):
        examples += _read_file(path, report, form)
        _tell_unread(path, report.unread.get(path, Counter()))
    report.check(max_bad, form.mend)
    require(bool(examples), "the instruction files hold no dialogue; name files that do.")
    return examples, report


def _tell_unread(path: str, unread: Counter[str]) -> None:
    known = {f"field {name!r} around the records" for name in METADATA}
    named = [f"{name} ({count})" for name, count in unread.most_common() if name not in known]
    if named:
        say_once(f"{path}: not read, so that nothing of it is learned: {', '.join(named[:20])}")


def _read_file(path: str, report: ChatReport, form: Format) -> Iterator[Placed]:
    shape, early = None, list[tuple[str, Any]]()
    for where, record in _records(path, report, form):
        if shape is None:
            shape = form.shape_of(record)
            if shape is None:
                early.append((where, record))
                continue
            report.shapes[path] = shape.name
            log.info("%s: read in the shape %s", path, shape.name)
        yield from _checked(path, where, record, shape, report, form)
    if shape is None:
        report.check(MAX_BAD, form.mend)
        first = early[0][1] if early else None
        keys = ", ".join(map(str, first)) if isinstance(first, dict) else kind_name(first)
        fix = form.fix
        if path.lower().endswith(TABLES):
            fix += "; of a table, the first line must name the columns"
        raise UserError(f"{path} has no {form.wanted}; its first record has: {keys:.300}; {fix}.")
    for where, record in early:
        yield from _checked(path, where, record, shape, report, form)


def _checked(
    path: str, where: str, record: Any, shape: Shape, report: ChatReport, form: Format
) -> Iterator[Placed]:
    try:
        held, unread = form.read(record, shape)
    except ValueError as error:
        report.add_bad(where, str(error).removesuffix("."))
    else:
        report.add_unread(path, unread)
        yield Placed(where, held)


def _records(path: str, report: ChatReport, form: Format) -> Iterator[tuple[str, Any]]:
    """(where it stands, JSON value) of each record, and of each question of a file of SQuAD's."""

    def has_shape(value: Any) -> bool:
        return form.shape_of(value) is not None

    own = form.records(path, report)
    for where, record in own or read_records(path, report, form.is_record or has_shape, form.columns):
        try:
            questions = questions_of(record)
        except ValueError as error:
            report.add_bad(where, str(error))
            continue
        if questions is None:
            yield where, record
            continue
        report.lines += len(questions) - 1
        yield from ((f"{where}, question {i}", question) for i, question in enumerate(questions, 1))


# ---------------------------------------------------------------------------------------- the rows


def rows_of_kind(kind: Kind) -> Callable[..., Rows]:
    """The `rows` of a reader of this kind: the dialogues of a split, rendered and packed whole."""

    def rows(
        data: Dialogues,
        tokenizer: Tokenizer,
        length: int,
        seed: int | None,
        batch_size: int,
        task: Classifier | None,
    ) -> Rows:
        split = "validation" if seed is None else "train"
        items = _items(kind, data, tokenizer, length, split)
        return PackedExamples(items, length, data.bins, seed, tokenizer.control["<|pad|>"], kind.group)

    return rows


def _items(kind: Kind, data: Dialogues, tokenizer: Tokenizer, length: int, split: str) -> list[Item]:
    """The items of a split; remembered while the files stay as they are."""
    apart = bool(data.validation)  # validation has files of its own: the others need no reading
    suffixes = kind.format(data).suffixes
    files = expand(data.validation if apart and split == "validation" else data.train, suffixes)
    if apart and split == "validation":
        trained = {file_key(f) for f in expand(data.train, suffixes)}
        if both := [f for f in files if file_key(f) in trained]:
            say_once(f"data.train names files of data.validation too, so that is no held-out text: {both[0]}")
    stats = [(f, Path(f).stat()) for f in files]
    stamp = tuple((f, s.st_size, s.st_mtime_ns) for f, s in stats)
    return _read_items(stamp, split if apart else "", kind, data, tokenizer, length)[split]


@lru_cache(maxsize=16)  # of each source of a mixture: those of training, and of validation if they are others
def _read_items(
    stamp: tuple[tuple[str, int, int], ...],
    only: str,
    kind: Kind,
    data: Dialogues,
    tokenizer: Tokenizer,
    length: int,
) -> dict[str, list[Item]]:
    """Items by split: all for the split `only`, or where it is empty, a share held out of them."""
    with alive("reading dialogues and writing them as tokens"):
        files = (path for path, _, _ in stamp)
        dialogues, report = read_examples(files, kind.format(data))
        if only:
            parts = {only: dialogues}
        else:
            kept, held = hold_out(dialogues, data.validation_fraction, kind.key)
            parts = {"train": kept, "validation": held}
        rendered = _render(kind, parts, data, tokenizer, report)
        return {name: kind.fit(part, length, name) for name, part in rendered.items()}


def hold_out(
    dialogues: list[Placed], share: float, key: Callable[[Any], Any] = lambda dialogue: dialogue
) -> tuple[list[Placed], list[Placed]]:
    """(kept, held out): the held-out dialogues are chosen by a hash, and those of one key stay together, of
    keys that are sets those with a common member.
    """
    common = _connected([key(d.dialogue) for d in dialogues])
    keys = [hashlib.sha256(repr(one).encode("utf-8")).digest() for one in common]
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


def _connected(keys: list[Any]) -> list[Any]:
    """Of each set the first name of all sets that common names connect with it; other keys as they are."""
    if not all(isinstance(key, frozenset) for key in keys):
        return keys
    parents: dict[str, str] = {}

    def first(name: str) -> str:
        while (parent := parents.setdefault(name, name)) != name:
            parents[name] = parents[parent]
            name = parent
        return name

    for key in keys:
        low, *others = sorted(map(first, key))
        parents |= dict.fromkeys(others, low)
    return [first(min(key)) for key in keys]


def _render(
    kind: Kind, parts: dict[str, list[Placed]], data: Dialogues, tokenizer: Tokenizer, report: ChatReport
) -> dict[str, list[Any]]:
    """The examples of each split as tokens. What the template or the tokenizer refuses is a bad record."""
    late, rendered = Report(lines=report.lines, bad=report.bad), dict[str, list[Any]]()
    for name, part in parts.items():
        rendered[name] = []
        for place, dialogue in kind.prepare(part, name, data):
            try:
                rendered[name].append(kind.write(dialogue, data, tokenizer))
            except UserError as error:
                late.add_bad(place, str(error).removesuffix("."))
                if late.bad > MAX_BAD * late.lines:  # as good as sure: the others need not be tried
                    break
    if late.examples:
        late.check(MAX_BAD, _FIX)
    return rendered


def write_dialogue(dialogue: Dialogue, data: Dialogues, tokenizer: Tokenizer) -> Example:
    """A dialogue as tokens, in the way that the data's config says."""
    return (render_plain if data.template == "none" else render)(dialogue, tokenizer)


def fit_dialogues(rendered: list[Example], length: int, name: str) -> list[Item]:
    """Cut to the row; those left without a trained token are counted and dropped."""
    cuts = [truncate(example, length) for example in rendered]
    examples = [example for example in cuts if example is not None]
    cut = sum(c is not None and sum(c.weights) < sum(e.weights) for c, e in zip(cuts, rendered, strict=True))
    if dropped := len(rendered) - len(examples):
        log.warning(
            "%d of %d dialogues (%s) have no answer within %d tokens and were dropped",
            dropped, len(rendered), name, length,
        )  # fmt: skip
    if cut:
        log.warning(
            "%d of %d dialogues (%s) lose the end of an answer beyond %d tokens; lengthen data.length",
            cut, len(rendered), name, length,
        )  # fmt: skip
    require(
        bool(examples),
        f"none of the {len(rendered)} dialogues ({name}) has an answer within {length} tokens; "
        "lengthen data.length.",
    )
    return [Item.of(example) for example in examples]


def _format(data: Chat) -> Format:
    return dialogue_format(data.prompt, data.completion)


rows = rows_of_kind(
    Kind(_format, lambda dialogue: dialogue, lambda part, name, data: part, write_dialogue, fit_dialogues)
)
"""The rows of Chat data; see `data.readers.Reader`. `UserError` where no dialogue has an answer within the
length."""
