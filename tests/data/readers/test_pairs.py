"""Preferences in their files' shapes, and as rows in which no example is parted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxgpt.config import Pairs, Rated
from jaxgpt.data.packing import Row, Rows
from jaxgpt.data.readers import rows_of
from jaxgpt.data.readers.chat import Placed, hold_out, read_examples
from jaxgpt.data.readers.pairs import (
    CHOSEN,
    OTHER,
    REJECTED,
    Compared,
    pair_format,
    rated_format,
    with_others,
)
from jaxgpt.errors import UserError
from jaxgpt.text.chat import Dialogue, render
from jaxgpt.text.tokenizer import ByteTokenizer

BYTES = ByteTokenizer()
ROLES = {"s": "system", "u": "user", "a": "assistant"}


def turns(*said: str) -> Dialogue:
    """`u:hi` and the like as turns; `g:` is an answer that is only given."""
    made = []
    for one in said:
        role, _, text = one.partition(":")
        given = {"learn": False} if role == "g" else {}
        made.append({"role": "assistant" if given else ROLES[role], "content": text} | given)
    return made


def read(folder: Path, form: Any, *records: Any) -> list[Compared]:
    path = folder / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    return [placed.dialogue for placed in read_examples([path], form)[0]]


def message(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


HI, HO = message("user", "hi"), message("user", "ho")
YES, NO = message("assistant", "yes"), message("assistant", "no")


@pytest.mark.parametrize(
    ("record", "prompt", "sides"),
    [
        ({"prompt": "hi", "chosen": "yes", "rejected": "no"}, ["u:hi"], ["a:yes", "a:no"]),
        ({"prompt": [HI], "chosen": [YES], "rejected": [NO]}, ["u:hi"], ["a:yes", "a:no"]),
        ({"chosen": [HI, YES], "rejected": [HI, NO]}, ["u:hi"], ["a:yes", "a:no"]),
        ({"prompt": "hi", "chosen": [HI, YES], "rejected": [HI, NO]}, ["u:hi"], ["a:yes", "a:no"]),
        ({"messages": [HI], "chosen": YES, "rejected": NO}, ["u:hi"], ["a:yes", "a:no"]),
        (
            {
                "conversations": [{"from": "human", "value": "hi"}],
                "chosen": {"from": "gpt", "value": "yes"},
                "rejected": {"from": "gpt", "value": "no"},
                "system": "be brief",
            },
            ["s:be brief", "u:hi"],
            ["a:yes", "a:no"],
        ),
        (
            {
                "instruction": "do",
                "input": "this",
                "chosen": "yes",
                "rejected": "no",
                "history": [["a", "b"]],
            },
            ["u:a", "g:b", "u:do\nthis"],
            ["a:yes", "a:no"],
        ),
        (  # what both say alike first is given too, up to the last question
            {"chosen": [HI, YES, HI, YES], "rejected": [HI, YES, HI, NO], "score": 3},
            ["u:hi", "g:yes", "u:hi"],
            ["a:yes", "a:no"],
        ),
    ],
)
def test_shapes_of_pairs(tmp_path, record, prompt, sides) -> None:
    (pair,) = read(tmp_path, pair_format(Pairs(train=("x",))), record)
    given = [turn | ({"learn": False} if turn["role"] == "assistant" else {}) for turn in turns(*prompt)]
    assert pair == Compared(given, tuple(turns(side) for side in sides), (CHOSEN, REJECTED))


def test_fields_by_name(tmp_path) -> None:
    """As OpenAI writes them."""
    data = Pairs(
        train=("x",), prompt="input.messages", chosen="preferred_output", rejected="non_preferred_output"
    )
    record = {"input": {"messages": [HI]}, "preferred_output": [YES], "non_preferred_output": [NO]}
    (pair,) = read(tmp_path, pair_format(data), record)
    assert pair.completions == (turns("a:yes"), turns("a:no"))


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (
            {"chosen": "yes", "rejected": "no"},
            "nothing is given before 'chosen' and 'rejected'; name",
        ),
        (
            {"prompt": "hi", "chosen": [HI, YES], "rejected": [HO, NO]},
            "'rejected' does not",
        ),
        (
            {"prompt": "hi", "chosen": [HI], "rejected": [HI, NO]},
            "not answer the prompt: its turns are none",
        ),
        ({"prompt": "hi", "chosen": 3, "rejected": "no"}, "field 'chosen' is int, not a string"),
        ({"prompt": "a", "question": "b", "chosen": "c", "rejected": "d"}, "nothing says which is meant"),
        (
            {"prompt": "a", "answer": "c"},
            "has no fields chosen and rejected; its first record",
        ),
    ],
)
def test_what_is_no_pair_is_told(tmp_path, record, words) -> None:
    with pytest.raises(UserError, match=words):
        read(tmp_path, pair_format(Pairs(train=("x",))), record)


@pytest.mark.parametrize(
    ("record", "prompt", "said", "side"),
    [
        ({"prompt": "hi", "completion": "yes", "label": True}, ["u:hi"], ["a:yes"], CHOSEN),
        ({"prompt": [HI], "completion": [NO], "label": 0}, ["u:hi"], ["a:no"], REJECTED),
        ({"messages": [HI, YES, HI, NO], "kto_tag": False}, ["u:hi", "g:yes", "u:hi"], ["a:no"], REJECTED),
        ({"instruction": "hi", "input": "", "output": "yes", "kto_tag": True}, ["u:hi"], ["a:yes"], CHOSEN),
    ],
)
def test_shapes_of_ratings(tmp_path, record, prompt, said, side) -> None:
    (found,) = read(tmp_path, rated_format(Rated(train=("x",))), record)
    assert found == Compared(turns(*prompt), (turns(*said),), (side,))


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (
            {"prompt": "hi", "completion": "yes", "label": "good"},
            "'label' is 'good'; a completion is good",
        ),
        ({"prompt": "hi", "completion": "yes"}, "has no field label or kto_tag and known shape"),
        ({"messages": [YES], "label": True}, "the last turn is not an assistant's answer to a user"),
    ],
)
def test_what_is_no_rating_is_told(tmp_path, record, words) -> None:
    with pytest.raises(UserError, match=words):
        read(tmp_path, rated_format(Rated(train=("x",))), record)


def test_another_completion_is_of_another_prompt() -> None:
    """Each is given once, and to a prompt that is not its own, though neighbours share theirs."""
    part = [
        Placed(str(i), Compared(turns(f"u:{p}"), (turns(f"a:{i}"),), (1 + i % 2,)))
        for i, p in enumerate("aabbbccd")
    ]
    made = [placed.dialogue for placed in with_others(part, "train", Rated(train=("x",)))]
    own = {repr(one.dialogue.completions[0]): one.dialogue.prompt for one in part}
    assert sorted(repr(one.completions[1]) for one in made) == sorted(own)
    assert all(own[repr(one.completions[1])] != one.prompt for one in made)
    assert [one.sides for one in made] == [(1 + i % 2, OTHER) for i in range(8)]
    assert [one.completions[0] for one in made] == [one.dialogue.completions[0] for one in part]


def test_pairs_of_one_prompt_are_held_out_together() -> None:
    pairs = [Placed(str(i), Compared(turns(f"u:{i % 7}"), (turns(f"a:{i}"),), (1,))) for i in range(50)]
    kept, held = hold_out(pairs, 0.3, lambda pair: pair.prompt)
    prompts = [{repr(one.dialogue.prompt) for one in part} for part in (kept, held)]
    assert len(kept) + len(held) == 50 and not prompts[0] & prompts[1] and all(prompts)


# -------------------------------------------------------------------------------------------- rows


def write(path: Path, count: int) -> Path:
    records = [
        {"prompt": f"say {i}", "chosen": f"y{i}" * (1 + i % 4), "rejected": f"n{i}" * (1 + i % 3)}
        for i in range(count)
    ]
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def documents(row: Row) -> list[tuple[int, list[int], list[int]]]:
    """(side, tokens, trained targets) of each document of a row, in order."""
    found = []
    for number in range(1, int(row["segments"].max()) + 1):
        here = row["segments"] == number
        (side,) = set(row["side"][here].tolist())
        learned = row["targets"][here][row["weights"][here] > 0]
        assert row["positions"][here].tolist() == list(range(here.sum()))
        found.append((side, row["tokens"][here].tolist(), learned.tolist()))
    return found


def whole(prompt: str, completion: str) -> list[int]:
    return render(turns(f"u:{prompt}", f"a:{completion}"), BYTES).tokens


@pytest.mark.parametrize("seed", [None, 0])
def test_no_pair_is_parted(tmp_path, seed) -> None:
    """Every row holds whole pairs, chosen first, and an epoch all of them once."""
    data = Pairs(
        train=(str(write(tmp_path / "a.jsonl", 40)),), validation=(str(write(tmp_path / "b.jsonl", 40)),)
    )
    rows = rows_of(data, BYTES, 100, seed, 4)
    seen: list[tuple[list[int], list[int]]] = []
    for number in range(rows.epoch_rows):
        found = documents(rows[number])
        assert [side for side, _, _ in found] == [CHOSEN, REJECTED] * (len(found) // 2)
        seen += [(a[1], b[1]) for a, b in zip(found[::2], found[1::2], strict=True)]
        for _, tokens, learned in found:  # the answer and its end, each from the token before it
            assert learned == tokens[-len(learned) :] and learned[-1] == BYTES.control["<|end|>"]
    wanted = [
        (whole(f"say {i}", f"y{i}" * (1 + i % 4)), whole(f"say {i}", f"n{i}" * (1 + i % 3)))
        for i in range(40)
    ]
    assert sorted(seen) == sorted(wanted)
    assert rows.epoch_rows < 40  # some rows hold several


def test_ratings_stand_beside_another_completion(tmp_path) -> None:
    records = [{"prompt": f"say {i}", "completion": f"y{i}", "label": i % 2 == 0} for i in range(6)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    data = Rated(train=(str(tmp_path / "a.jsonl"),), validation=(str(tmp_path / "a.jsonl"),))
    rows = rows_of(data, BYTES, 128, None, 4)
    found = [one for i in range(len(rows)) for one in documents(rows[i])]
    assert [side for side, _, _ in found] == [CHOSEN, OTHER, REJECTED, OTHER] * 3
    assert [tokens for _, tokens, _ in found[::2]] == [whole(f"say {i}", f"y{i}") for i in range(6)]
    said = [BYTES.decode(learned[:-1]) for _, _, learned in found[1::2]]
    assert sorted(said) == [f"y{i}" for i in range(6)] and all(said[i] != f"y{i}" for i in range(6))


def test_what_does_not_fit_is_cut_or_dropped_and_told(tmp_path, caplog) -> None:
    records: Sequence[dict[str, str]] = [
        {"prompt": "a", "chosen": "fits", "rejected": "does"},
        {"prompt": "a" * 60, "chosen": "b", "rejected": "c"},  # the prompt alone fills half a row
        {"prompt": "a", "chosen": "b" * 90, "rejected": "c"},
        {"prompt": "a", "chosen": "b" * 90 + "1", "rejected": "b" * 90 + "2"},  # cut, they are the same
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    data = Pairs(train=(str(tmp_path / "a.jsonl"),), validation=(str(tmp_path / "a.jsonl"),))
    rows: Rows = rows_of(data, BYTES, 80, None, 4)
    found = [one for i in range(len(rows)) for one in documents(rows[i])]
    assert [len(tokens) for _, tokens, _ in found] == [len(whole("a", "fits"))] * 2 + [
        40,
        len(whole("a", "c")),
    ]
    for words in (
        "1 of 4 preferences (validation) have a side",
        "1 of 4 preferences (validation) have two sides",
    ):
        assert words in caplog.text
    assert "1 of 4 preferences (validation) lose the end of a side within 40 tokens" in caplog.text
    with pytest.raises(UserError, match="none of the 4 preferences"):
        rows_of(data, BYTES, 10, None, 4)


def test_columns_of_all_documents_come_back_in_their_rows(tmp_path) -> None:
    """As the reference's log-probabilities do."""
    data = Pairs(train=(str(write(tmp_path / "a.jsonl", 12)),))
    rows = rows_of(data, BYTES, 100, 0, 4)
    count = len(rows.columns["tokens"])
    view = rows.in_order(place=np.arange(count))
    assert "place" not in rows.columns and "place" not in rows[0]
    seen = np.concatenate([view[i]["place"][view[i]["segments"] > 0] for i in range(len(view))])
    assert sorted(seen.tolist()) == list(range(count))
    rows.columns["double"] = rows.columns["tokens"] * 2
    assert all(
        (rows[i]["double"] == rows[i]["tokens"] * 2 * (rows[i]["segments"] > 0)).all() for i in range(9)
    )
