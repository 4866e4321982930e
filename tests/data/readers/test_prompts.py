"""Prompts for reinforcement learning: what is asked, what is kept beside it, and their order."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jaxgpt.config import Prompts
from jaxgpt.data.readers import rows_of
from jaxgpt.data.readers.prompts import PromptRows, to_prompt
from jaxgpt.errors import UserError
from jaxgpt.text.chat import prompt_ids
from jaxgpt.text.tokenizer import ByteTokenizer

BYTES = ByteTokenizer()
USER, BOT = ("user", "hi"), ("assistant", "hello")


def turns(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in pairs]


@pytest.fixture
def rows(tmp_path: Path) -> Callable[..., PromptRows]:
    """Rows of records: of training with a seed, else of validation."""

    def make(records: list[Any], seed: int | None = 1, length: int = 64, **fields: Any) -> PromptRows:
        path = tmp_path / "a.jsonl"
        path.write_text("\n".join(map(json.dumps, records)))
        found = rows_of(Prompts(train=(str(path),), tokenizer="byte", **fields), BYTES, length, seed, 1)
        assert isinstance(found, PromptRows)
        return found

    return make


@pytest.mark.parametrize(
    ("record", "asked"),
    [
        ({"prompt": "2+2", "answer": 4}, [("user", "2+2")]),
        ({"question": "why?", "context": "it is."}, [("user", "why?\nit is.")]),
        ({"instruction": "add", "input": "1 2", "output": "3"}, [("user", "add\n1 2")]),
        ({"messages": turns(USER, BOT)}, [USER]),
        ({"messages": turns(("system", "be"), USER, BOT, USER)}, [("system", "be"), USER, BOT, USER]),
        ({"messages": turns(USER, BOT, USER, BOT)}, [USER, BOT, USER]),
        ({"system": "be", "prompt": turns(USER)}, [("system", "be"), USER]),
        ({"history": [["hi", "hello"]], "prompt": "so?"}, [USER, BOT, ("user", "so?")]),
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "x"}]}, [USER]),
    ],
)
def test_what_a_record_asks(record: Any, asked: list[tuple[str, str]]) -> None:
    before = json.dumps(record)
    assert [(turn["role"], turn["content"]) for turn in to_prompt(record)] == asked
    assert json.dumps(record) == before  # the reward gets it whole


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"text": "hi"}, "no prompt: the record has none of messages, "),
        ({"prompt": ""}, "'prompt' is empty"),
        ({"prompt": 3}, "'prompt' is int, not a string"),
        ({"messages": turns(("system", "be"))}, "'messages' holds no turn to answer"),
        ({"messages": turns(BOT)}, "'messages' holds no turn to answer"),
    ],
)
def test_what_is_no_prompt_is_said(record: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        to_prompt(record)


def test_a_prompt_has_its_tokens_its_last_text_and_the_whole_record(rows) -> None:
    records = [
        {"id": i, "messages": turns(USER, BOT, ("user", f"{i}?"), ("assistant", "x"))} for i in range(9)
    ]
    prompt = rows(records).prompt(0)
    number = prompt.record["id"]
    assert prompt.record == records[number]
    assert prompt.text == f"{number}?"
    assert prompt.ids == prompt_ids(turns(USER, BOT, ("user", f"{number}?")), BYTES)
    assert prompt.place.endswith(f"a.jsonl:{number + 1}")


def test_plain_prompts_are_written_without_a_template(rows) -> None:
    found = rows([{"prompt": "ab="}, {"prompt": "cd="}], template="none").prompt(0)
    assert found.ids == [BYTES.control["<|bos|>"], *found.text.encode()]


def test_an_epoch_has_each_prompt_once_in_an_order_of_its_own(rows) -> None:
    made = rows([{"prompt": f"p{i}"} for i in range(50)])
    count = made.epoch_rows
    first, second = ([made.prompt(e * count + i).text for i in range(count)] for e in range(2))
    assert sorted(first) == sorted(second) and first != second
    again = rows([{"prompt": f"p{i}"} for i in range(50)])
    assert [again.prompt(i).text for i in reversed(range(count))] == first[::-1]  # in any order of asking
    held = rows([{"prompt": f"p{i}"} for i in range(50)], seed=None)
    assert len(held) + count == 50
    assert not {held.prompt(i).text for i in range(len(held))} & set(first)


def test_records_are_chosen_by_a_field(rows) -> None:
    records = [{"prompt": f"p{i}", "skill": "ab"[i % 2], "level": i % 3} for i in range(30)]
    made = rows(records, where="skill=a")
    assert {p.record["skill"] for p in made.prompts} == {"a"}
    assert {p.record["level"] for p in rows(records, where="level=2").prompts} == {2}
    with pytest.raises(UserError, match="hold none with skill=c; name files that do"):
        rows(records, where="skill=c")
    with pytest.raises(UserError, match="no field 'skil'; did you mean 'skill'"):
        rows(records, where="skil=a")


def test_prompts_without_room_for_an_answer_are_left_out_and_counted(rows, caplog) -> None:
    records = [{"prompt": "x" * (60 if i == 3 else 5 + i)} for i in range(20)]
    assert all(len(p.ids) < 40 for p in rows(records, length=40).prompts)
    assert "1 of 20 prompts leave no room in 40 tokens" in caplog.text
    with pytest.raises(UserError, match="no prompt of 20 leaves room in 4 tokens"):
        rows(records, length=4)
