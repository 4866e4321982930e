"""Calls of tools are told from text however the text is cut, and templates are told of tools as they like."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_hf
from fastapi.testclient import TestClient
from hypothesis import example, given
from hypothesis import strategies as st
from tiny import ONE, mesh, sharp_params
from tiny_serving import HI, TINY, tiny_model

from jaxgpt.api import Model
from jaxgpt.config import Batching, Chat, Run
from jaxgpt.sample.constrained import Guide
from jaxgpt.sample.engine import Engine
from jaxgpt.sample.load import Trained
from jaxgpt.serve.app import make_app
from jaxgpt.serve.errors import Refused
from jaxgpt.serve.service import Service
from jaxgpt.serve.tools import CallReader, rule_of, rule_once_called, told
from jaxgpt.text.hf_tokenizer import HFTokenizer
from jaxgpt.text.tokenizer import ByteTokenizer

NAMES = ("weather", "time")
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
TIME_IS = '<tool_call>{"name": "time", "arguments": {}}</tool_call>'
TIME = '<tool_call>{"name": "time"}</tool_call>'


def read(text: str, cuts: list[int], several: bool = True) -> tuple[str, list[tuple[str, str]]]:
    reader, places = CallReader(NAMES, several), sorted({0, len(text), *(c % (len(text) + 1) for c in cuts)})
    said, calls = "", list[Any]()
    for start, stop in itertools.pairwise(places):
        more, found = reader.feed(text[start:stop])
        said, calls = said + more, [*calls, *found]
    more, found = reader.flush()
    return said + more, [(call.name, call.arguments) for call in [*calls, *found]]


OSLO = ("weather", '{"city": "Oslo"}')


@pytest.mark.parametrize(
    ("text", "said", "calls"),
    [
        ("hello", "hello", []),
        (CALL, "", [OSLO]),
        (f"\n{CALL}\n{TIME}\n", "", [OSLO, ("time", "{}")]),
        (f"Let me look. {CALL}", "Let me look. ", [OSLO]),
        ('{"name": "weather", "parameters": {"city": "Oslo"}}', "", [OSLO]),
        ('[{"name": "time", "arguments": {}}, {"name": "time"}]', "", [("time", "{}")] * 2),
        ('{"name": "nothing", "arguments": {}}', '{"name": "nothing", "arguments": {}}', []),
        ('{"a": 1} is JSON', '{"a": 1} is JSON', []),
        ("a < b, <tool", "a < b, <tool", []),
        ("<tool_call>no JSON</tool_call> so", "<tool_call>no JSON</tool_call> so", []),
        (CALL.removesuffix("\n</tool_call>"), "", [OSLO]),
        (CALL[:30], CALL[:30], []),
        ("", "", []),
    ],
)
def test_calls_are_told_from_text(text: str, said: str, calls: list[Any]) -> None:
    assert read(text, []) == (said, calls)
    assert read(text, [*range(len(text))]) == (said, calls)


@given(
    st.lists(st.sampled_from([CALL, TIME, "text", "<", "tool_call>", "{", "\n", '"']), max_size=5),
    st.lists(st.integers(0, 300)),
)
@example([CALL, "text", TIME], [3, 50, 70])
def test_where_text_is_cut_changes_nothing(parts: list[str], cuts: list[int]) -> None:
    text = "".join(parts)
    assert read(text, cuts) == read(text, [])


def test_nothing_follows_where_one_call_is_all_that_may_be() -> None:
    assert read(CALL + TIME + "more", [], several=False) == ("", [OSLO])


WEATHER: dict[str, Any] = {
    "name": "weather",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 6}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
NOPE = {"type": "object", "properties": {"a": {"type": "nope"}}}
WRONG: dict[str, Any] = {"name": "odd", "parameters": NOPE}


def way(rule: Any, text: str) -> tuple[int, bool]:
    """How many bytes of a text a rule lets through, and whether the text may end there."""
    tokenizer = ByteTokenizer()
    guide = Guide(rule, tokenizer, tokenizer.stop_ids, tokenizer.vocab_size)
    for place, token in enumerate(tokenizer.encode(text)):
        if not guide.allowed()[token]:
            return place, False
        guide.feed(token)
    return len(text.encode()), bool(guide.allowed()[tokenizer.stop_ids[0]])


def test_a_call_that_was_begun_is_one_of_a_tool() -> None:
    rule = rule_once_called([WEATHER, {"name": "time"}])
    for text in (
        *("", "hello\n\u4f60\u597d", "a <b> <tool", f"Let me look. {CALL}"),
        *(CALL, f"{CALL}\n{TIME_IS}", f"{CALL} It rains."),
        *(CALL.replace("\n", ""), CALL.replace("Oslo", 'a\\"b')),
    ):
        assert way(rule, text) == (len(text.encode()), True), text
    for text, stop in (
        ("<tool_call>", "<tool_call>"),
        ("<tool_call> no", "<tool_call> "),
        (CALL.replace("weather", "whether"), '<tool_call>\n{"name": "w'),
        (CALL.replace("city", "town"), '<tool_call>\n{"name": "weather", "arguments": {"'),
        (CALL.replace("Oslo", "Reykjavik"), '<tool_call>\n{"name": "weather", "arguments": {"city": "Reykja'),
        (CALL.replace("</", "<"), CALL[: CALL.index("</") + 1]),
        (f"{CALL} and {CALL[:20]}", f"{CALL} and {CALL[:20]}"),
    ):
        assert way(rule, text) == (len(stop), False), text


def test_a_schema_may_refer_to_its_own_parts() -> None:
    """As those of pydantic's models do."""
    city = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
    parts = {"$defs": {"City": city}, "properties": {"city": {"$ref": "#/$defs/City"}}, "required": ["city"]}
    tools = [{"name": name, "parameters": {"type": "object"} | parts} for name in ("weather", "road")]
    right = CALL.replace('"Oslo"', '{"name": "Oslo"}').replace("weather", "road")
    for rule in (rule_of(tools, True), rule_once_called(tools)):
        assert way(rule, right) == (len(right), True)
        assert way(rule, CALL) == (CALL.index('"Oslo"'), False)


def test_only_strict_tools_must_have_schemas_that_can_be_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = rule_once_called([WRONG, WEATHER])
    odd = CALL.replace("weather", "odd").replace("Oslo", "anything")
    assert way(rule, odd) == (len(odd), True)
    assert way(rule, CALL.replace("Oslo", "Reykjavik"))[1] is False
    with pytest.raises(Refused, match="cannot be followed"):
        rule_once_called([WRONG | {"strict": True}, WEATHER])
    monkeypatch.setitem(sys.modules, "llguidance", None)  # as where it is not installed
    assert rule_once_called([WEATHER]) is None
    with pytest.raises(Refused, match="llguidance"):
        rule_once_called([WEATHER | {"strict": True}])


def test_a_model_that_calls_by_itself_keeps_to_its_tools() -> None:
    """One that would begin a call with every token, and knows nothing of JSON."""
    files = tiny_hf.byte_level(template=tiny_hf.CHATML)
    spec = json.loads(files["tokenizer.json"])
    mark = spec["added_tokens"][-1]["id"] + 1
    plain = spec["added_tokens"][-1]
    spec["added_tokens"].append(plain | {"id": mark, "content": "<tool_call>"})
    tokenizer = HFTokenizer(files | {"tokenizer.json": json.dumps(spec).encode()})
    shape = dataclasses.replace(TINY, vocab_size=tokenizer.vocab_size)
    run = Run(name="t", model=shape, data=Chat(train=("a",)), compute=tiny_model().config.compute)
    model = Model(Trained(Path("t"), run, sharp_params(shape), tokenizer, mesh(ONE), 1))
    body = {"model": "tiny", "messages": HI, "max_tokens": 200, "logit_bias": {str(mark): 100}, "seed": 1}
    body |= {"tools": [{"type": "function", "function": tool} for tool in (WEATHER, {"name": "time"})]}
    with Engine(model.generator, Batching(slots=2, page=16, chunk=64)) as engine:
        client = TestClient(make_app(Service(name="tiny", model=model, engine=engine)))
        for more in ({}, {"stream": True}, {"n": 2, "temperature": 1.0}, {"parallel_tool_calls": False}):
            made = client.post("/v1/chat/completions", json=body | more)
            events = [json.loads(line[6:]) for line in made.text.splitlines() if line.startswith("data: {")]
            said = [c.get("delta", c.get("message")) for e in events or [made.json()] for c in e["choices"]]
            calls = [call["function"] for one in said for call in one.get("tool_calls") or ()]
            assert calls
            assert len(calls) == 1 or "parallel_tool_calls" not in more
            for call in calls:
                assert call["name"] in ("weather", "time")
                if call["name"] == "weather":
                    assert json.loads(call["arguments"]).keys() == {"city"}
        free = client.post("/v1/chat/completions", json=body | {"tool_choice": "none"}).json()
        assert set(free["choices"][0]["message"]["content"].split("<tool_call>")) == {""}


@pytest.mark.parametrize("marked", [False, True])
def test_a_rule_lets_calls_through_and_nothing_else(marked: bool) -> None:
    tokenizer = ByteTokenizer()
    tools: list[Any] = [
        {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
        {"name": "time"},
    ]

    def follows(text: str) -> bool:
        guide = Guide(rule_of(tools, marked), tokenizer, tokenizer.stop_ids, tokenizer.vocab_size)
        for token in tokenizer.encode(text):
            if not guide.allowed()[token]:
                return False
            guide.feed(token)
        return bool(guide.allowed()[tokenizer.stop_ids[0]])

    inner = '{"name": "weather", "arguments": {"city": "Oslo"}}'
    assert follows(f"<tool_call>\n{inner}\n</tool_call>" if marked else inner)
    assert not follows(inner if marked else f"<tool_call>\n{inner}\n</tool_call>")
    assert not follows(inner.replace("weather", "whether"))
    assert not follows(inner.replace('"Oslo"', "1"))


def test_a_schema_that_cannot_be_followed_is_refused() -> None:
    with pytest.raises(Refused, match="cannot be followed"):
        rule_of([{"name": "a", "parameters": {"type": "nope"}}], True)


def test_a_template_without_tools_reads_of_them_in_turns() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "time", "arguments": "{}"}}
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "12:00"},
    ]
    first, second, third, fourth = told(turns, [{"name": "time"}])
    assert first["role"] == "system"
    assert '{"type": "function", "function": {"name": "time"}}' in first["content"]
    assert second == turns[0]
    found, calls = read(third["content"], [])
    assert (found, calls) == ("", [("time", "{}")])
    assert fourth == {"role": "user", "content": "<tool_response>\n12:00\n</tool_response>"}
    system = {"role": "system", "content": "Be brief."}
    assert told([system, *turns[:1]], [{"name": "time"}])[0]["content"].startswith(
        "Be brief.\n\nYou may call"
    )
    assert told(turns[:1], []) == turns[:1]
    assert json.loads(first["content"].split("\n")[2])["function"]["name"] == "time"
