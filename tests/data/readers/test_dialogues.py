"""The shapes that dialogues come in, what their fields mean, and what is refused or named."""

from __future__ import annotations

import csv
import json
import os
from functools import partial

import pytest
import tiny_hf

from jaxgpt.config import Chat
from jaxgpt.data.readers import rows_of
from jaxgpt.data.readers.chat import read_dialogues
from jaxgpt.errors import UserError
from jaxgpt.text.chat import render, render_plain
from jaxgpt.text.hf_tokenizer import HFTokenizer
from jaxgpt.text.tokenizer import ByteTokenizer, text_ids

BYTES = ByteTokenizer()


def turns(*parts: str) -> list[dict[str, str]]:
    """`u:hi` is a user's turn; the letters are the roles' first."""
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return [{"role": roles[part[0]], "content": part[2:]} for part in parts]


PAIR = turns("u:q", "a:a")
SQUAD = {
    "version": "1.1",
    "data": [
        {
            "title": "t",
            "paragraphs": [
                {
                    "context": "c",
                    "qas": [
                        {"id": "1", "question": "q", "answers": [{"text": "a", "answer_start": 0}]},
                        {"id": "2", "question": "r", "answers": [{"text": "b", "answer_start": 3}]},
                    ],
                }
            ],
        }
    ],
}
FILES = {
    "one object": ({"messages": PAIR}, [PAIR]),
    "one list of turns": (PAIR, [PAIR]),
    "lists of turns": ([PAIR, PAIR], [PAIR, PAIR]),
    "a pair alone": ({"prompt": "q", "completion": "a"}, [PAIR]),
    "inside an object": ({"version": 2, "data": [{"messages": PAIR}], "empty": []}, [PAIR]),
    "columns": (
        {"instruction": ["q", "r"], "input": ["", "i"], "output": ["a", "b"]},
        [PAIR, turns("u:r\ni", "a:b")],
    ),
    "columns of pandas": (
        {"prompt": {"0": "q", "1": "r"}, "completion": {"0": "a", "1": "b"}},
        [PAIR, turns("u:r", "a:b")],
    ),
    "a column of dialogues": ({"messages": [PAIR, turns("u:r", "a:b")]}, [PAIR, turns("u:r", "a:b")]),
    "SQuAD": (SQUAD, [turns("u:q\nc", "a:a"), turns("u:r\nc", "a:b")]),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_json_document_is_read_whole_whatever_holds_its_records(name, tmp_path):
    value, expected = FILES[name]
    (tmp_path / "a.json").write_text(json.dumps(value, indent=1))
    dialogues, report = read_dialogues([tmp_path / "a.json"])
    assert [d.dialogue for d in dialogues] == expected
    assert (report.lines, report.bad) == (len(expected), 0)


def test_several_lists_are_refused_by_their_names(tmp_path):
    records = [{"messages": PAIR}]
    for value in ({"train": records, "test": records}, {"train": records, "test": records * 2}):
        (tmp_path / "a.json").write_text(json.dumps(value))
        with pytest.raises(UserError, match=r"a\.json .*\(train, test\)"):
            read_dialogues([tmp_path / "a.json"])


def test_lines_under_the_name_of_a_document_are_lines(tmp_path):
    (tmp_path / "a.json").write_text("".join(json.dumps({"messages": PAIR}) + "\n" for _ in range(3)))
    assert [d.place for d in read_dialogues([tmp_path / "a.json"])[0]] == [
        f"{tmp_path}/a.json:{i}" for i in (1, 2, 3)
    ]
    (tmp_path / "a.json").write_text('[{"prompt":\n')
    with pytest.raises(UserError, match=r"a\.json is not JSON"):
        read_dialogues([tmp_path / "a.json"])


A = turns("a:a")[0]
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
RECORDS = [
    ({"instruction": "q", "context": "c", "response": "a"}, turns("u:q\nc", "a:a")),  # Dolly
    ({"prompt": "q", "response": "a"}, PAIR),
    ({"question": "q", "answer": "a", "id": 3, "source": "web"}, PAIR),
    ({"question": "q", "context": "c", "answers": {"text": ["a"], "answer_start": [0]}},
     turns("u:q\nc", "a:a")),
    ({"system_prompt": "s", "question": "q", "response": "a"}, turns("s:s", "u:q", "a:a")),
    ({"input": "q", "output": "a"}, PAIR),
    ({"prompt": "q", "completion": "a", "system": "s"}, turns("s:s", "u:q", "a:a")),
    ({"system": "s", "messages": PAIR}, turns("s:s", "u:q", "a:a")),
    ({"system": "s", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
     turns("s:s", "u:q", "a:a")),
    ({"system": "", "messages": PAIR, "tools": [], "images": None}, PAIR),
    ({"conversations": PAIR}, PAIR),
    ({"messages": [{"from": "user", "value": "q"}, {"from": "chatgpt", "value": "a"}]}, PAIR),
    ({"messages": [{"role": "Developer", "content": "s"}, {"role": "User", "content": "q"},
                   {"role": "AI", "content": "a"}]}, turns("s:s", "u:q", "a:a")),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}, {"text": "!"}]},
                   {"role": "assistant", "content": ["a"]}]}, turns("u:q!", "a:a")),
    ({"messages": [*turns("u:q"), {"role": "assistant", "content": None, "tool_calls": [CALL | {"id": "1"}]},
                   {"role": "tool", "content": "r", "tool_call_id": "1"}, *turns("a:a")]},
     [*turns("u:q"), {"role": "assistant", "content": "", "tool_calls": [CALL | {"id": "1"}]},
      {"role": "tool", "content": "r", "tool_call_id": "1"}, *turns("a:a")]),
    ({"conversations": [{"from": "human", "value": "q"},
                        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                        {"from": "observation", "value": "r"}, {"from": "gpt", "value": "a"}]},
     [*turns("u:q"), {"role": "assistant", "content": "", "tool_calls": [CALL]}, *turns("t:r", "a:a")]),
    ({"messages": [*turns("u:q"), {"role": "assistant", "content": None,
                                   "function_call": {"name": "f", "arguments": {"x": 1}}}]},
     [*turns("u:q"), {"role": "assistant", "content": "", "tool_calls": [CALL]}]),
    ({"messages": [*turns("u:q"), A | {"reasoning_content": "r", "name": "n"}]},
     [*turns("u:q"), {"role": "assistant", "content": "a", "name": "n", "reasoning_content": "r"}]),
    ({"prompt": turns("u:p", "a:given", "u:q"), "completion": turns("a:a")},
     [*turns("u:p"), {"role": "assistant", "content": "given", "learn": False}, *turns("u:q", "a:a")]),
    ({"prompt": turns("u:q"), "completion": "a"}, PAIR),
]  # fmt: skip
QUIET = (
    {"weight": 0},
    {"weight": 0.0},
    {"train": False},
    {"trainable": False},
    {"mask": True},
    {"loss_mask": 0},
)
for _flags in QUIET:
    RECORDS.append((
        {"messages": [turns("u:p")[0], turns("a:no")[0] | _flags, turns("u:q")[0] | _flags, turns("a:a")[0]]},
        [turns("u:p")[0], turns("a:no")[0] | {"learn": False}, *PAIR],
    ))  # fmt: skip


@pytest.mark.parametrize(("record", "expected"), RECORDS, ids=lambda v: json.dumps(v)[:60])
def test_every_field_of_a_record_is_read(record, expected, tmp_path, caplog):
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    dialogues, _ = read_dialogues([tmp_path / "a.jsonl"])
    assert [d.dialogue for d in dialogues] == [expected]
    assert "not read" not in caplog.text


BAD = [
    ({"messages": PAIR, "tools": [{"name": "f"}]}, "field 'tools' would change what is learned"),
    ({"messages": PAIR, "images": ["a.png"]}, "field 'images' would change"),
    ({"messages": PAIR, "weight": 0.5}, "field 'weight' would change"),
    ({"prompt": "q", "chosen": "a", "rejected": "b"}, "field 'chosen' is for preference tuning"),
    ({"messages": turns("u:q"), "chosen": A, "rejected": A}, "field 'chosen' is for preference tuning"),
    ({"prompt": "q", "completion": "a", "label": True}, "field 'label' is for preference tuning"),
    ({"messages": [*turns("u:q"), A | {"weight": 0.3}]}, "field 'weight' of a turn is 0.3"),
    ({"messages": [*turns("u:q"), A | {"weight": 0}]}, "no assistant turn is to be trained"),
    ({"messages": [*turns("u:q"), A | {"weight": 0, "train": True}]}, "disagree"),
    ({"messages": [turns("u:q")[0] | {"train": True}, A]}, "a turn of 'user' is marked to be trained"),
    ({"messages": [*turns("u:q"), A | {"train_detail": [1]}]}, "a turn's field 'train_detail' would change"),
    ({"messages": [*turns("u:q"), {"role": "assistant", "content": None}]}, "field 'content' is null"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, A]}, "a part of type 'image_url'"),
    ({"messages": [{"role": "user", "content": "q", "tool_calls": [CALL]}, A]}, "calls tools"),
    ({"messages": [*turns("u:q"), A | {"tool_calls": [7]}]}, "field 'tool_calls' is damaged"),
    ({"messages": [*turns("u:q"), A | {"tool_calls": [{"function": {}}]}]}, "missing required field `name`"),
    ({"messages": [{"role": "function_call", "content": "{"}]}, "of a turn that calls a tool is not JSON"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "role 'robot' is unknown"),
    ({"messages": [{"role": 7, "content": "x"}]}, "field 'role' is int"),
    ({"messages": ["hi"]}, "a turn is str, not an object"),
    ({"messages": "hi"}, "a non-empty list of turns was expected in 'messages', not str"),
    ({"messages": None}, "not null"),
    ({"system": "s", "messages": turns("s:other", "u:q", "a:a")}, "two system texts"),
    ({"system": 7, "messages": PAIR}, "field 'system' is int"),
    ({"instruction": "q", "input": "i", "context": "c", "output": "a"}, "both 'input' and 'context'"),
    ({"instruction": "q", "output": "a", "response": "b"}, "output and response, and nothing says which"),
    ({"instruction": "q", "question": "r", "output": "b"}, "data.prompt and data.completion"),
    ({"instruction": "q", "output": "a", "history": ["x"]}, "history is not a list"),
    ({"instruction": "q", "output": "a", "history": "x"}, "history is not a list"),
    ({"question": "q", "answers": []}, "field 'answers' holds no answer"),
    ({"prompt": "q", "completion": None}, "field 'completion' is null|no known shape"),
    ({"prompt": "q", "completion": ["a"]}, "field 'completion' is list"),
    ({"data": {"paragraphs": 1}}, "no known shape"),
    ({"paragraphs": [{"context": "c"}]}, "a paragraph has no list 'qas'"),
]  # fmt: skip


@pytest.mark.parametrize(("record", "reason"), BAD, ids=lambda v: str(v)[:60])
def test_what_would_change_what_is_learned_is_refused_with_its_place(record, reason, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(record) + "\n")
    with pytest.raises(UserError, match=reason) as caught:
        read_dialogues([path])
    assert f"{path}:1: " in str(caught.value) or "no known shape" in str(caught.value)


def test_fields_that_nobody_reads_are_named_once_per_file(tmp_path, caplog):
    records = [{"prompt": "q", "completion": "a", "id": i, "mood": "glad", "note": ""} for i in range(5)]
    records[3]["cot"] = "because"
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    spoken = [{"role": "user", "content": "q", "style": "x"}, {"role": "assistant", "content": "a"}]
    whole = {"guide": "be kind", "license": "mit", "data": [{"messages": spoken}]}
    (tmp_path / "b.json").write_text(json.dumps(whole))
    for _ in range(2):
        read_dialogues([tmp_path])
    told = [r.message for r in caplog.records if "not read" in r.message]
    assert len(told) == 2
    assert told[0].endswith("field 'mood' (5), field 'cot' (1)") and "a.jsonl" in told[0]
    assert "field 'guide' around the records (1)" in told[1] and "a turn's field 'style' (1)" in told[1]
    assert "license" not in told[1]


def test_tables_and_named_fields(tmp_path):
    with (tmp_path / "a.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["prompt", "completion", "id"], ["q, r\n", 'a "b"', 1]])
    (tmp_path / "b.tsv").write_text("source\ttarget\nq\ta\n")
    record = {"x": {"asked": "q"}, "said": [{"text": "no"}, {"text": "a"}], "rejected": "b"}
    (tmp_path / "c.jsonl").write_text(json.dumps(record))
    assert read_dialogues([tmp_path / "a.csv"])[0][0].dialogue == turns("u:q, r\n", 'a:a "b"')
    with pytest.raises(UserError, match=r"b\.tsv .*first record has: source, target.*data\.prompt"):
        read_dialogues([tmp_path / "b.tsv"])
    named = {"b.tsv": ("source", "target"), "c.jsonl": ("x.asked", "said[1].text")}
    for name, (prompt, completion) in named.items():
        (read,), _ = read_dialogues([tmp_path / name], prompt=prompt, completion=completion)
        assert read.dialogue == PAIR
    with pytest.raises(UserError, match=r"b\.tsv has no fields sauce and target; .*source, target"):
        read_dialogues([tmp_path / "b.tsv"], prompt="sauce", completion="target")
    (tmp_path / "d.tsv").write_text("prompt\tprompt\nq\ta\n")
    with pytest.raises(UserError, match="two columns 'prompt'"):
        read_dialogues([tmp_path / "d.tsv"])
    with pytest.raises(UserError, match=r"data\.prompt is 'a' and data\.completion ''"):
        Chat(train=("a",), prompt="a")


def test_parquet_dialogues(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    table = pyarrow.table({"messages": [PAIR, turns("s:s", "u:r", "a:b")], "id": [1, 2]})
    parquet.write_table(table, tmp_path / "a.parquet")
    dialogues, _ = read_dialogues([tmp_path / "a.parquet"])
    assert [d.dialogue for d in dialogues] == [PAIR, turns("s:s", "u:r", "a:b")]
    assert dialogues[1].place == f"{tmp_path}/a.parquet:row 2"


def test_what_the_template_refuses_is_a_bad_record_with_its_place(tmp_path, caplog):
    """A dialogue with a tool's turn cannot be written with jaxgpt's own template; the others can."""
    odd = [*turns("u:q"), {"role": "assistant", "content": "", "tool_calls": [CALL]}, *turns("t:r", "a:a")]
    records = [{"messages": odd if i == 57 else turns(f"u:q{i}", "a:a")} for i in range(150)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    data = Chat(train=(str(tmp_path / "a.jsonl"),), validation_fraction=0.1, tokenizer="-")
    rows_of(data, BYTES, 64, 0, 1)
    assert f"{tmp_path}/a.jsonl:58: " in caplog.text
    assert "1 of 150 lines are bad" in caplog.text
    records[7] = {"messages": odd}
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    with pytest.raises(UserError, match=r"2 of 150 lines are bad.*first: .*a\.jsonl:(8|58): "):
        rows_of(data, BYTES, 64, 0, 1)


def test_validation_on_training_files_is_told(tmp_path, caplog):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"messages": PAIR}) for _ in range(3)))
    os.link(path, tmp_path / "b.jsonl")
    data = Chat(train=(str(path),), validation=(str(tmp_path / "b.jsonl"),), tokenizer="-")
    rows_of(data, BYTES, 64, None, 1)
    assert "data.train names files of data.validation too" in caplog.text


PAIRS = [("the cat", " sat"), ("the ", "cat"), ("q\n", "\n\na b"), ("", "a"), (" ", " "), ("2 =", "4")]
WORDS = {name: partial(HFTokenizer, tiny_hf.TOKENIZERS[name]) for name in ("mistral", "llama3")}
WORDS |= {"byte": ByteTokenizer, "trained": None}


@pytest.mark.parametrize("pair", PAIRS, ids=str)
@pytest.mark.parametrize("words", WORDS)
def test_untemplated_pairs_are_the_two_texts_and_the_end(pair, words, request):
    """Also with a tokenizer that puts a space before a text (Mistral's)."""
    make = WORDS[words]
    tokenizer = make() if make else request.getfixturevalue("sentencepiece")
    example = render_plain(turns(f"u:{pair[0]}", f"a:{pair[1]}"), tokenizer)
    asked = text_ids(tokenizer, pair[0], bos=True)
    assert example.tokens[: len(asked)] == asked
    assert example.tokens[-1] == tokenizer.control["<|eos|>"]
    assert tokenizer.decode(example.tokens) == tokenizer.decode(asked) + pair[1]
    assert tokenizer.decode(asked) == pair[0] or (words, pair[0]) == ("mistral", " ")  # its own loss
    assert example.weights == [0.0] * len(asked) + [1.0] * (len(example.tokens) - len(asked))


def test_only_a_pair_goes_without_a_template(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        "\n".join(json.dumps({"prompt": f"q{i}", "completion": "a"}) for i in range(9))
    )
    files = {"train": (str(tmp_path / "a.jsonl"),), "tokenizer": "-"}
    row = rows_of(Chat(**files, template="none"), BYTES, 64, 0, 1)[0]
    first = row["tokens"][row["segments"] == 1].tolist()
    assert first[0] == BYTES.control["<|bos|>"] and bytes(first[1:2]) == b"q" and len(first) == 4
    targets = row["targets"][(row["segments"] == 1) & (row["weights"] > 0)].tolist()
    assert targets == [ord("a"), BYTES.control["<|eos|>"]]
    templated = rows_of(Chat(**files), BYTES, 64, 0, 1)[0]["tokens"]
    assert render(turns("u:q0", "a:a"), BYTES).tokens[1] in templated
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"messages": turns("s:s", "u:q", "a:a")}) + "\n" + json.dumps({"messages": PAIR})
    )
    with pytest.raises(UserError, match=r"a\.jsonl:1: data.template is 'none'.*system, user, assistant"):
        rows_of(Chat(**files, template="none"), BYTES, 64, 0, 1)
