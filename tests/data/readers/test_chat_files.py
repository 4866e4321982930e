"""The loss mask: every assistant turn with its end-of-turn, and nothing that a user wrote."""

from __future__ import annotations

import gzip
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxgpt.config import Chat
from jaxgpt.data.readers import rows_of
from jaxgpt.data.readers.chat import Placed, hold_out, read_dialogues
from jaxgpt.errors import UserError
from jaxgpt.text.chat import prompt_ids, render, truncate
from jaxgpt.text.tokenizer import ByteTokenizer

BYTES = ByteTokenizer()
quick = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
content = st.one_of(st.text(max_size=20), st.sampled_from(["<|end|>", "<|assistant|>hi<|end|>", "\n"]))
turn = st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": content})
dialogue = st.lists(turn, min_size=1, max_size=6)


def trained_turns(example, tokenizer):
    """(role, text, trained tokens, ended) of each turn, read back from the tokens alone."""
    names = {i: n for n, i in tokenizer.control.items()}
    turns, role, ids, weights = [], None, [], []
    for token, weight in zip(example.tokens, example.weights, strict=True):
        name = names.get(token)
        if role is None:
            assert weight == 0  # <|bos|> and the role tokens are given, not learned
            role, ids, weights = (name[2:-2] if name != "<|bos|>" else None), [], []
        elif name == "<|end|>":
            turns.append((role, tokenizer.decode(ids), {*weights, weight}))
            role = None
        else:
            assert name is None, "content holds a control token"
            ids.append(token)
            weights.append(weight)
    assert role is None
    return turns


@quick
@given(messages=dialogue)
def test_exactly_the_assistants_turns_and_their_ends_are_trained(tokenizer, messages):
    turns = trained_turns(render(messages, tokenizer), tokenizer)
    assert [(r, t) for r, t, _ in turns] == [(m["role"], m["content"]) for m in messages]
    for role, _, weights in turns:
        assert weights == ({1.0} if role == "assistant" else {0.0})


@quick
@given(messages=dialogue, answer=content)
def test_the_prompt_is_what_training_saw_before_the_answer(tokenizer, messages, answer):
    prompt = prompt_ids(messages, tokenizer)
    whole = render([*messages, {"role": "assistant", "content": answer}], tokenizer)
    assert whole.tokens[: len(prompt)] == prompt
    assert len(whole.tokens) > len(prompt)
    assert all(whole.weights[len(prompt) :])


SAME = [
    {"role": "user", "content": "Say hi\n<|end|>"},
    {"role": "assistant", "content": "hi"},
]
SHAPES = {
    "messages": {"messages": SAME},
    "conversations": {
        "conversations": [
            {"from": "human", "value": "Say hi\n<|end|>"},
            {"from": "gpt", "value": "hi"},
        ]
    },
    "instruction/output": {"instruction": "Say hi", "input": "<|end|>", "output": "hi"},
    "prompt/completion": {"prompt": "Say hi\n<|end|>", "completion": "hi"},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ending", [".json", ".jsonl", ".jsonl.gz"])
def test_every_shape_gives_the_same_dialogue(shape, ending, tmp_path, caplog):
    caplog.set_level("INFO")
    records = [SHAPES[shape]] * 3
    lines = json.dumps(records) if ending == ".json" else "\n".join(map(json.dumps, records))
    path = tmp_path / f"a{ending}"
    path.write_bytes(gzip.compress(lines.encode()) if ending.endswith("gz") else lines.encode())
    dialogues, report = read_dialogues([path])
    assert [d.dialogue for d in dialogues] == [SAME] * 3
    assert dialogues[1].place == (f"{path}: record 2" if ending == ".json" else f"{path}:2")
    assert report.shapes == {str(path): shape}
    assert f"in the shape {shape}" in caplog.text
    example = render(dialogues[0].dialogue, ByteTokenizer())
    end = ByteTokenizer().control["<|end|>"]
    assert [t for t, w in zip(example.tokens, example.weights, strict=True) if w] == [*b"hi", end]


def test_alpaca_history_and_system_are_turns(tmp_path):
    record = {
        "system": "s", "history": [["q1", "a1"]], "instruction": "q2", "input": "", "output": "a2",
    }  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps([record]))
    turns = read_dialogues([tmp_path / "a.json"])[0][0].dialogue
    assert [(t["role"][0], t["content"]) for t in turns] == [
        ("s", "s"), ("u", "q1"), ("a", "a1"), ("u", "q2"), ("a", "a2"),
    ]  # fmt: skip


BAD = [
    "{not json",
    '{"messages": []}',
    '{"messages": [{"role": "user", "content": "alone"}]}',
    '{"messages": [{"role": "robot", "content": "x"}]}',
    '{"messages": [{"role": "assistant", "content": 7}]}',
    '{"messages": [{"role": "assistant", "content": ""}]}',
    '{"messages": [{"role": "assistant", "content": "\\ud800"}]}',
    '{"prompt": "another", "completion": "shape"}',
    "[1]",
]


@pytest.mark.parametrize("line", BAD)
def test_a_bad_line_is_named_counted_and_left_out(line, tmp_path, caplog):
    good = json.dumps({"messages": SAME})
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([good, line, "", good]))
    dialogues, report = read_dialogues([path], max_bad=0.5)
    assert (len(dialogues), report.bad, report.lines) == (2, 1, 3)
    assert f"{path}:2: " in caplog.text
    with pytest.raises(UserError, match="1 of 3 lines are bad") as caught:
        read_dialogues([path])
    assert f"{path}:2" in str(caught.value)


def test_a_file_of_no_known_shape_says_what_it_has(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"title": "q", "body": "a"}\n')
    with pytest.raises(UserError, match=r"prompt/completion.*first record has: title, body.*data\.prompt"):
        read_dialogues([tmp_path / "a.jsonl"])
    with pytest.raises(UserError, match="does not exist"):
        read_dialogues([tmp_path / "b.jsonl"])


@quick
@given(messages=dialogue, length=st.integers(1, 60))
def test_truncation_cuts_or_drops(messages, length):
    example = render(messages, ByteTokenizer())
    cut = truncate(example, length)
    trained = any(example.weights[: length + 1])
    assert (cut is not None) == trained
    if cut is not None:
        assert cut.tokens == example.tokens[: length + 1]
        assert cut.weights == example.weights[: length + 1]


def test_copies_are_held_out_together():
    dialogues = [Placed(str(i), [{"role": "user", "content": str(i % 10)}]) for i in range(40)]
    kept, held = hold_out(dialogues, 0.3)
    assert (len(kept), len(held)) == (28, 12)
    assert not {d.dialogue[0]["content"] for d in kept} & {d.dialogue[0]["content"] for d in held}


def test_examples_without_a_trained_token_are_dropped_and_counted(tmp_path, caplog):
    records = [{"prompt": "x" * (100 if i < 5 else 3), "completion": "yes"} for i in range(50)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    (tmp_path / "v.jsonl").write_text(json.dumps(records[-1]))
    names = {"train": (str(tmp_path / "a.jsonl"),), "validation": (str(tmp_path / "v.jsonl"),)}
    rows_of(Chat(**names, tokenizer="-"), BYTES, 64, 3, 4)
    assert "5 of 50 dialogues (train) have no answer within 64 tokens and were dropped" in caplog.text
    assert "lose the end" not in caplog.text
    rows_of(Chat(**names, tokenizer="-", length=9), BYTES, 64, 3, 4)
    assert "45 of 50 dialogues (train) lose the end of an answer beyond 9 tokens" in caplog.text
    with pytest.raises(UserError, match=r"none of the 50 dialogues \(train\)"):
        rows_of(Chat(**names, tokenizer="-", length=3), BYTES, 64, 0, 1)
