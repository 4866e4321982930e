"""Calls of tools are told from text however the text is cut, and templates are told of tools as they like."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jaxgpt.sample.constrained import Guide
from jaxgpt.serve.errors import Refused
from jaxgpt.serve.tools import CallReader, rule_of, told
from jaxgpt.text.tokenizer import ByteTokenizer

NAMES = ("weather", "time")
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
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
