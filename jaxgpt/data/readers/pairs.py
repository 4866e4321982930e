"""Preferences: two completions of one prompt, or completions that are good or bad each by itself.

An example is two documents, which follow each other in one row, so that neither the mesh nor a microbatch
parts them. Column `side` says what a document is: `CHOSEN`, `REJECTED` (also of ratings: good, bad) or
`OTHER`, another example's completion of the prompt, as KTO's reference point needs. Every token of a document
is an input, the last one too, so that a reward model has read the whole.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from jaxgpt.config import Pairs, Rated
from jaxgpt.config.data import Dialogues
from jaxgpt.data.lines import as_object, field_of
from jaxgpt.data.packing import Item
from jaxgpt.data.readers.chat import Format, Kind, Placed, dialogue_format, rows_of_kind, write_dialogue
from jaxgpt.data.readers.dialogues import (
    Shape,
    answer_turns,
    before_answers,
    given_turns,
    has_field,
    take_field,
    to_dialogue,
)
from jaxgpt.data.readers.turns import Record, is_turns, left_over
from jaxgpt.errors import require
from jaxgpt.text.chat import Dialogue, Example, truncate
from jaxgpt.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

CHOSEN, REJECTED, OTHER = 1, 2, 3
"""Values of the column `side`; 0 is padding."""
SIDES = {CHOSEN: "chosen", REJECTED: "rejected", OTHER: "another's completion"}
"""What they are called."""
LABELS = ("label", "kto_tag")


class Compared(NamedTuple):
    """A prompt and what may follow it, and the side of each."""

    prompt: Dialogue
    completions: tuple[Dialogue, ...]
    sides: tuple[int, ...]


Documents = list[tuple[Example, int]]
"""The documents of an example, and the side of each."""


# ------------------------------------------------------------------------------------------- records


def pair_format(data: Pairs) -> Format:
    """How pairs are read."""
    names = (data.chosen, data.rejected)
    wanted = [*names, data.prompt] if data.prompt else names

    def shape_of(record: Any) -> Shape | None:
        if not isinstance(record, dict) or not all(has_field(record, name) for name in wanted):
            return None
        return Shape("/".join(names), partial(_pair, data))

    fix = "data.prompt, data.chosen and data.rejected name other fields"
    return Format(shape_of, _read, f"fields {' and '.join(wanted)}", fix)


def _read(record: Any, shape: Shape) -> tuple[Compared, list[str]]:
    unread: list[str] = []
    rest = dict(as_object(record))
    pair = shape.read(rest, unread)
    return pair, unread + left_over(rest, named=True)


def _pair(data: Pairs, record: Record, unread: list[str]) -> Compared:
    names = (data.chosen, data.rejected)
    values = [field_of(record, name) for name in names]
    held = {name: value for name, value in record.items() if name not in names}
    prompt = before_answers(held, data.prompt, unread)
    for name in names:
        take_field(held, name)
    record.clear()
    record.update(held)
    sides = [_side(value, name, unread) for value, name in zip(values, names, strict=True)]
    if not prompt:  # each side is a whole dialogue
        prompt = given_turns(_common(*sides))
    begin = [_bare(turn) for turn in prompt]
    for k, (side, name) in enumerate(zip(sides, names, strict=True)):
        if [_bare(turn) for turn in side[: len(begin)]] == begin:
            side = sides[k] = side[len(begin) :]
        if not side or side[0]["role"] != "assistant":
            raise ValueError(f"field {name!r} does not answer the prompt: its turns are {_roles(side)}")
        if all(turn.get("learn") is False for turn in side):
            raise ValueError(f"field {name!r} holds no turn that is to be trained")
    if not any(turn["role"] == "user" for turn in prompt):
        raise ValueError(f"nothing is given before {names[0]!r} and {names[1]!r}; name it with data.prompt")
    return Compared(prompt, tuple(sides), (CHOSEN, REJECTED))


def _side(value: Any, name: str, unread: list[str]) -> Dialogue:
    """A completion: a text, a turn, or turns, which may begin with the prompt."""
    turn = isinstance(value, dict) and is_turns([value])
    return answer_turns([value] if turn else value, name, unread)


def _bare(turn: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in turn.items() if name != "learn"}


def _roles(turns: Dialogue) -> str:
    return ", ".join(turn["role"] for turn in turns) or "none beyond it"


def _common(chosen: Dialogue, rejected: Dialogue) -> Dialogue:
    """The turns that both begin with, up to the last of a user's."""
    same = 0
    for a, b in zip(chosen, rejected, strict=False):
        if _bare(a) != _bare(b):
            break
        same += 1
    asked = [i for i, turn in enumerate(chosen[:same], 1) if turn["role"] != "assistant"]
    return chosen[: asked[-1] if asked else 0]


def rated_format(data: Rated) -> Format:
    """How ratings are read: as dialogues with a field that says whether the last answer is good."""
    form = dialogue_format(data.prompt, data.completion)
    names = (data.label,) if data.label else LABELS

    def label_in(record: Any) -> str:
        found = (name for name in names if isinstance(record, dict) and has_field(record, name))
        return next(found, "")

    def without(record: Any) -> Any:
        held = dict(record)
        take_field(held, label_in(record))
        return held

    def shape_of(record: Any) -> Shape | None:
        return form.shape_of(without(record)) if label_in(record) else None

    def read(record: Any, shape: Shape) -> tuple[Compared, list[str]]:
        name = label_in(as_object(record))
        good = field_of(record, name or names[0])
        if good not in (0, 1) or not isinstance(good, int):
            raise ValueError(f"field {name!r} is {good!r:.40}; a completion is good (true) or bad (false)")
        turns, unread = to_dialogue(without(record), shape)
        asked = [i for i, turn in enumerate(turns, 1) if turn["role"] == "user"]
        prompt, said = turns[: asked[-1]] if asked else [], turns[asked[-1] if asked else 0 :]
        if not asked or not said or all(turn.get("learn") is False for turn in said):
            raise ValueError("the last turn is not an assistant's answer to a user that is to be trained")
        return Compared(given_turns(prompt), (said,), (CHOSEN if good else REJECTED,)), unread

    return Format(shape_of, read, f"field {' or '.join(names)} and {form.wanted}", form.fix)


def with_others(part: list[Placed], split: str, data: Rated) -> list[Placed]:
    """Gives each prompt another example's completion too, of another prompt where there is one.

    Examples are ordered by prompt and each takes the completion as many places further on as the commonest
    prompt has examples, so that every completion is given once, and to a prompt that is not its own unless
    one prompt has more than half of the examples.
    """
    keys = [repr(placed.dialogue.prompt) for placed in part]
    order = sorted(range(len(part)), key=lambda i: (keys[i], i))
    shift = max(Counter(keys).values(), default=0)
    made = list(part)
    for k, i in enumerate(order):
        (other,) = part[order[(k + shift) % len(order)]].dialogue.completions
        prompt, (own,), (side,) = part[i].dialogue
        made[i] = part[i]._replace(dialogue=Compared(prompt, (own, other), (side, OTHER)))
    return made


# ---------------------------------------------------------------------------------------------- rows


def _write(compared: Compared, data: Dialogues, tokenizer: Tokenizer) -> Documents:
    return [
        (write_dialogue([*compared.prompt, *completion], data, tokenizer), side)
        for completion, side in zip(compared.completions, compared.sides, strict=True)
    ]


def _fit(rendered: Sequence[Documents], length: int, name: str) -> list[Item]:
    """Documents cut to half a row, so that both fit; what says nothing then is counted and dropped."""
    most = length // 2
    items, lost, same, cut = list[Item](), 0, 0, 0
    for documents in rendered:
        cuts = [truncate(example, most - 1) for example, _ in documents]
        whole = [example for example in cuts if example is not None]
        if len(whole) < len(cuts):
            lost += 1
        elif REJECTED in (sides := [s for _, s in documents]) and CHOSEN in sides and whole[0] == whole[1]:
            same += 1
        else:
            cut += any(len(a.tokens) < len(b.tokens) for a, (b, _) in zip(whole, documents, strict=True))
            items += [Item.whole(example, side) for example, (_, side) in zip(whole, documents, strict=True)]
    fix = f"within {most} tokens, half of a row; lengthen data.length"
    told = (
        (lost, f"have a side without an answer {fix}, and were dropped"),
        (same, f"have two sides that are the same {fix}, or change them; they were dropped"),
        (cut, f"lose the end of a side {fix}"),
    )
    for count, words in told:
        if count:
            log.warning("%d of %d preferences (%s) %s", count, len(rendered), name, words)
    require(bool(items), f"none of the {len(rendered)} preferences ({name}) has two different sides {fix}.")
    return items


def _prompt(compared: Compared) -> Dialogue:
    return compared.prompt


pair_rows = rows_of_kind(Kind(pair_format, _prompt, lambda part, split, data: part, _write, _fit, 2))
"""The rows of Pairs data; see `data.readers.Reader`. `UserError` where no pair fits."""
rated_rows = rows_of_kind(Kind(rated_format, _prompt, with_others, _write, _fit, 2))
"""The rows of Rated data, as `pair_rows`."""
