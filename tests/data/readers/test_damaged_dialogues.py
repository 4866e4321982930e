"""Files of dialogues damaged at random: read, or refused in one sentence, in every format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from damage import damaged, damaged_copy, right_or_refused
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt.data.readers.chat import read_dialogues
from jaxgpt.text.chat import render
from jaxgpt.text.tokenizer import ByteTokenizer

CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": [1]}}}
TURNS = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": [{"type": "text", "text": "q"}], "id": 1},
    {"role": "assistant", "content": None, "tool_calls": [CALL], "weight": 0},
    {"role": "tool", "content": "r", "name": "f"},
    {"from": "gpt", "value": "a", "reasoning_content": "t"},
]
PAIR = {"instruction": "q", "input": "i", "output": "a", "history": [["p", "b"]], "system": "s"}
ANSWERS = [{"text": "a", "answer_start": 0}]
FILES = {
    "turns.json": {"version": 1, "data": [{"messages": TURNS, "tools": []}]},
    "turns.jsonl": {"messages": TURNS},
    "pairs.json": [PAIR, PAIR],
    "columns.json": {"prompt": ["q", "r"], "completion": ["a", "b"]},
    "squad.json": {
        "data": [{"paragraphs": [{"context": "c", "qas": [{"question": "q", "answers": ANSWERS}]}]}]
    },
    "given.jsonl": {"prompt": [{"role": "user", "content": "q"}], "completion": "a"},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A folder for each file."""
    made = []
    for name, value in FILES.items():
        made.append(tmp_path_factory.mktemp("files") / "held")
        made[-1].mkdir()
        (made[-1] / name).write_text(json.dumps(value) + "\n")
    (made[0].parent / "table").mkdir()
    (made[0].parent / "table" / "a.csv").write_text('prompt,completion\n"q, r","a ""b"""\n')
    return [*made, made[0].parent / "table"]


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_a_damaged_file_is_read_or_refused(folders: list[Path], data: st.DataObject) -> None:
    good = data.draw(st.sampled_from(folders))
    with damaged_copy(good, data.draw(damaged(good))) as folder, right_or_refused():
        dialogues, report = read_dialogues([folder], max_bad=0.5)
        assert dialogues and report.lines >= len(dialogues)
        for _, dialogue in dialogues:
            assert all(isinstance(turn["content"], str) for turn in dialogue)
            with right_or_refused():
                render(dialogue, ByteTokenizer())
