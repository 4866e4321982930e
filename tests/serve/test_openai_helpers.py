"""What programs do with OpenAI's client beyond a call: parse answers, send them back, choose among tools."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from pydantic import BaseModel, Field
from tiny_serving import HI, tiny_model

from jaxgpt.sample.request import Alternative, Piece
from jaxgpt.serve.tokens import TokenNames


class City(BaseModel):
    """A part of a schema that it refers to."""

    name: str = Field(max_length=4)
    large: bool


class Trip(BaseModel):
    """Plan a trip."""

    city: City


STOP = {
    "type": "function",
    "function": {
        "name": "Stop",
        "parameters": {
            "properties": {"now": {"type": "boolean"}},
            "required": ["now"],
            "additionalProperties": False,
        },
    },
}
GO = {"type": "function", "function": {"name": "Go"}}
OPENING = ord("<")


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


def said(client: openai.OpenAI, **fields: Any) -> Any:
    given = {"model": "tiny", "messages": HI, "max_tokens": 150, "seed": 3}
    return client.chat.completions.create(**given | fields)  # type: ignore[call-overload]


def test_an_answer_is_parsed_into_a_class_whole_and_streamed(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": "tiny", "messages": HI, "max_tokens": 150, "seed": 3}
    whole = client.chat.completions.parse(response_format=Trip, **fields).choices[0].message.parsed
    assert isinstance(whole, Trip)
    with client.chat.completions.stream(response_format=Trip, **fields) as stream:
        kinds = [event.type for event in stream]
        assert stream.get_final_completion().choices[0].message.parsed == whole
    assert kinds[-1] == "content.done"


def test_a_call_is_parsed_into_a_class_and_answered(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": "tiny", "max_tokens": 150, "seed": 3, "messages": HI}
    fields |= {"tools": [openai.pydantic_function_tool(Trip)]}
    made = client.chat.completions.parse(tool_choice="required", **fields).choices[0].message
    (call,) = made.tool_calls or ()
    assert isinstance(call.function.parsed_arguments, Trip)
    with client.chat.completions.stream(tool_choice="required", **fields) as stream:
        kinds = {event.type for event in stream}
        (streamed,) = stream.get_final_completion().choices[0].message.tool_calls or ()
    assert "tool_calls.function.arguments.done" in kinds
    assert streamed.function.parsed_arguments == call.function.parsed_arguments
    for turn in (made, said(client, **fields | {"tool_choice": "required"}).choices[0].message.model_dump()):
        (asked,) = turn["tool_calls"] if isinstance(turn, dict) else turn.tool_calls or ()
        name = asked["id"] if isinstance(asked, dict) else asked.id
        turns = [*HI, turn, {"role": "tool", "tool_call_id": name, "content": "done"}]
        assert said(client, **fields | {"messages": turns}).choices[0].finish_reason


def test_an_answer_is_sent_back_as_it_came(client: openai.OpenAI) -> None:
    answer = said(client, max_tokens=5).choices[0].message
    plain = said(client, messages=[*HI, {"role": "assistant", "content": answer.content}, *HI], max_tokens=5)
    cited = answer.model_dump() | {"citations": [{"source": "a.md"}]}
    for turn in (answer, answer.model_dump(), answer.to_dict(), cited):
        made = said(client, messages=[*HI, turn, *HI], max_tokens=5)
        assert made.choices[0].message == plain.choices[0].message


@pytest.mark.parametrize("mode", ["auto", "required"])
def test_some_of_the_tools_may_be_allowed(client: openai.OpenAI, mode: str) -> None:
    choice = {
        "type": "allowed_tools",
        "allowed_tools": {"mode": mode, "tools": [{"type": "function", "function": {"name": "Stop"}}]},
    }
    for seed in range(3):
        made = said(client, tools=[GO, STOP], tool_choice=choice, seed=seed).choices[0]
        calls = made.message.tool_calls or []
        assert len(calls) == 1 or mode == "auto"
        assert {call.function.name for call in calls} <= {"Stop"}
        assert made.finish_reason in (["tool_calls"] if mode == "required" else ["stop", "length"])


def test_an_answer_has_its_form_where_no_tool_is_called(client: openai.OpenAI) -> None:
    form: Any = {"type": "choices", "choices": ["yes", "no"]}
    fields: dict[str, Any] = {"tools": [STOP], "response_format": form}
    never, always = {"logit_bias": {str(OPENING): -100}}, {"logit_bias": {str(OPENING): 100}}
    made = said(client, **fields, **never).choices[0]
    assert made.message.content in ("yes", "no")
    assert made.finish_reason == "stop"
    called = said(client, **fields, **always, parallel_tool_calls=False).choices[0]
    assert called.finish_reason == "tool_calls"
    assert called.message.content is None
    assert "now" in json.loads(called.message.tool_calls[0].function.arguments)
    only = said(client, **fields, tool_choice="required").choices[0]
    assert only.message.tool_calls[0].function.name == "Stop"
    assert said(client, **fields, tool_choice="none").choices[0].message.content in ("yes", "no")
    form = {"type": "json_schema", "json_schema": {"name": "t", "schema": Trip.model_json_schema()}}
    shaped = said(client, **fields | never | {"response_format": form}).choices[0].message
    assert Trip.model_validate_json(shaped.content)


def test_any_integer_of_64_bits_is_a_seed(client: openai.OpenAI) -> None:
    def text(seed: int) -> str:
        return said(client, seed=seed, max_tokens=6, temperature=1.0).choices[0].message.content

    assert text(-1) == text(2**32 - 1) == text(2**63 - 1)
    assert text(-(2**63)) == text(0) == tiny_model().chat(HI, seed=0, max_new_tokens=6, temperature=1.0).text
    assert text(-1) != text(0)
    made = client.completions.create(model="tiny", prompt="ab", seed=-5, n=2)
    assert len(made.choices) == 2


def test_a_top_p_of_zero_takes_the_likeliest(client: openai.OpenAI) -> None:
    greedy = said(client, temperature=0, max_tokens=8).choices[0].message
    assert said(client, temperature=2, top_p=0, max_tokens=8).choices[0].message == greedy


def test_no_token_is_taken_for_another() -> None:
    tokenizer = tiny_model().tokenizer
    piece = Piece(65, -1.0, "A", None, (Alternative(tokenizer.control["<|mask|>"], -2.0),))
    parts = (Alternative(0xE2, -0.5), Alternative(0x82, -1.0), Alternative(66, -3.0))
    told = TokenNames(tokenizer).completion([piece._replace(id=0xE2, alternatives=parts)], 3, 0)
    assert told["tokens"] == [r"bytes:\xe2"]
    assert told["top_logprobs"] == [{r"bytes:\xe2": -0.5, r"bytes:\x82": -1.0, "B": -3.0}]
    (entry,) = TokenNames(tokenizer).chat([piece], 1)
    assert (entry["token"], entry["bytes"]) == ("A", [65])
    assert entry["top_logprobs"] == [{"token": "<|mask|>", "logprob": -2.0, "bytes": None}]
