"""OpenAI's own client against a real server: what it sends is honoured or refused by name."""

from __future__ import annotations

import json
import typing
from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest
from openai.types import chat as types
from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.shared_params import FunctionDefinition, ResponseFormatJSONSchema
from openai.types.shared_params.response_format_json_schema import JSONSchema
from tiny_serving import HI, tiny_model

from jaxgpt.serve import schemas
from jaxgpt.serve.schemas import ChatBody, CompletionBody, EmbeddingBody

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 5}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
OTHER = {"type": "function", "function": {"name": "b"}}
CALL = {"id": "b", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "boolean"}},
    "required": ["a"],
    "additionalProperties": False,
}


def allowed(mode: str, *names: str) -> dict[str, Any]:
    """A choice among some of the tools."""
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


def said(client: openai.OpenAI, **fields: Any) -> Any:
    return client.chat.completions.create(
        **{"model": "tiny", "messages": HI, "max_tokens": 12, "seed": 3} | fields
    )


def refused(client: openai.OpenAI, **fields: Any) -> tuple[int, Any]:
    with pytest.raises(openai.APIStatusError) as caught:
        said(client, **fields)
    assert isinstance(caught.value.body, dict)
    return caught.value.status_code, caught.value.body


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").object == "model"


def test_a_chat_says_what_the_model_says(client: openai.OpenAI) -> None:
    for seed in range(3):
        made = said(client, seed=seed, temperature=0.8, top_p=0.9, extra_body={"top_k": 40})
        alone = tiny_model().chat(HI, max_new_tokens=12, seed=seed, temperature=0.8, top_p=0.9, top_k=40)
        (choice,) = made.choices
        assert (choice.message.content, choice.finish_reason) == (alone.text, alone.finish_reason)
        assert made.usage.completion_tokens == len(alone.ids)
        assert made.usage.prompt_tokens == 6


def test_a_stream_is_the_whole_answer_in_pieces(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"n": 3, "logprobs": True, "top_logprobs": 2, "temperature": 1.0}
    whole = said(client, **fields)
    texts, reasons, tokens = ["", "", ""], ["", "", ""], list[list[Any]]([[], [], []])
    usages = []
    for chunk in said(client, stream=True, stream_options={"include_usage": True}, **fields):
        usages.append(chunk.usage)
        for choice in chunk.choices:
            assert not reasons[choice.index]
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or ""
            tokens[choice.index] += (choice.logprobs and choice.logprobs.content) or []
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert tokens == [choice.logprobs.content for choice in whole.choices]
    assert usages[-1] == whole.usage
    assert not any(usages[:-1])
    assert len(set(texts)) > 1


def test_each_of_several_answers_has_the_seed_that_follows(client: openai.OpenAI) -> None:
    several = said(client, n=3, seed=5, temperature=1.0).choices
    one = [said(client, seed=5 + i, temperature=1.0).choices[0] for i in range(3)]
    assert [choice.message for choice in several] == [choice.message for choice in one]


def test_log_probabilities_are_those_of_the_model(client: openai.OpenAI) -> None:
    content = said(client, logprobs=True, top_logprobs=3, temperature=0).choices[0].logprobs.content
    ids = [*tiny_model().generator.dialogues([HI])["prompts"][0]]
    for entry in content:
        logits_V = tiny_model().logits([ids])[0][-1].astype(np.float64)
        logprobs_V = logits_V - np.log(np.exp(logits_V).sum())
        best = np.argsort(-logprobs_V)[:3]
        assert entry.top_logprobs[0].bytes == entry.bytes == [int(best[0])]
        np.testing.assert_allclose([top.logprob for top in entry.top_logprobs], logprobs_V[best], atol=1e-4)
        ids.append(int(best[0]))


def test_penalties_and_bias_are_those_of_the_sampler(client: openai.OpenAI) -> None:
    every: list[dict[str, Any]] = [
        {"presence_penalty": 1.5},
        {"frequency_penalty": 2},
        {"logit_bias": {"97": 100, "98": 99.5}, "frequency_penalty": 0.25},
    ]
    for given in every:
        fields = {"temperature": 0, "seed": 1, "max_tokens": 20, **given}
        own = {**given, "logit_bias": {int(i): bias for i, bias in given.get("logit_bias", {}).items()}}
        alone: Any = tiny_model().chat(HI, temperature=0, max_new_tokens=20, **own)
        assert said(client, **fields).choices[0].message.content == alone.text
        made = client.completions.create(model="tiny", prompt="ab", **fields).choices[0].text
        text: Any = tiny_model().generate("ab", temperature=0, max_new_tokens=20, **own)
        assert made == text.text
    assert {*alone.text} == {"a", "b"}
    nothing = {"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}}
    assert said(client, **nothing).choices[0].message == said(client).choices[0].message


def test_a_stop_text_ends_an_answer(client: openai.OpenAI) -> None:
    whole = said(client, temperature=0, max_tokens=40).choices[0].message.content
    stop = next(c for c in whole[1:] if c.isprintable() and c != "�")
    cut = said(client, temperature=0, max_tokens=40, stop=[stop]).choices[0]
    assert (cut.message.content, cut.finish_reason) == (whole[: whole.index(stop)], "stop")


def test_a_schema_is_kept(client: openai.OpenAI) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
    for seed in range(3):
        made = said(client, seed=seed, max_tokens=60, response_format=form).choices[0]
        assert made.finish_reason == "stop"
        assert isinstance(json.loads(made.message.content)["a"], bool)
    made = said(client, max_tokens=60, response_format={"type": "choices", "choices": ["yes", "no"]}).choices[
        0
    ]
    assert made.message.content in ("yes", "no")
    lark = {"type": "grammar", "grammar": 'start: "a" pair\npair: "b" | "c" pair'}
    made = said(client, max_tokens=60, temperature=1.0, response_format=lark).choices[0]
    assert set(made.message.content.removeprefix("a").removesuffix("b")) <= {"c"}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_tool_that_must_be_called_is_called(client: openai.OpenAI, choice: Any) -> None:
    fields = {"tools": [WEATHER], "tool_choice": choice, "max_tokens": 200}
    (whole,) = said(client, **fields).choices
    assert (whole.finish_reason, whole.message.content) == ("tool_calls", None)
    (call,) = whole.message.tool_calls
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments).keys() == {"city"}
    deltas = [chunk.choices[0] for chunk in said(client, stream=True, **fields)]
    (streamed,) = [call for delta in deltas for call in delta.delta.tool_calls or []]
    assert streamed.function == call.function or streamed.function.arguments == call.function.arguments
    assert deltas[-1].finish_reason == "tool_calls"
    turns = [
        *HI,
        {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]},
        {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
    ]
    assert said(client, messages=turns, tools=[WEATHER]).choices[0].finish_reason in ("stop", "length")


def test_completions_go_on_from_every_prompt(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": "tiny", "max_tokens": 6, "seed": 2, "temperature": 1.0}
    made = client.completions.create(prompt=["ab", "cd"], n=2, **fields)
    assert [choice.index for choice in made.choices] == [0, 1, 2, 3]
    alone = tiny_model().generate(["ab", "ab"], max_new_tokens=6, seed=2, temperature=1.0)
    assert [choice.text for choice in made.choices[:2]] == [one.text for one in alone]
    ids = client.completions.create(prompt=[tiny_model().encode("ab")], **fields)
    assert ids.choices[0].text == made.choices[0].text
    streamed = ["", "", "", ""]
    for chunk in client.completions.create(prompt=["ab", "cd"], n=2, stream=True, **fields):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == [choice.text for choice in made.choices]


def test_the_best_of_several_are_kept(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": "tiny", "prompt": "ab", "max_tokens": 6, "temperature": 1.0}
    fields["seed"] = 0
    every = client.completions.create(n=4, logprobs=0, **fields).choices
    best = client.completions.create(n=2, best_of=4, **fields).choices

    def score(choice: Any) -> float:
        return float(np.mean(choice.logprobs.token_logprobs))

    assert [choice.text for choice in best] == [c.text for c in sorted(every, key=score, reverse=True)[:2]]


def test_a_prompt_is_echoed_with_its_log_probabilities(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": "tiny", "prompt": "abc", "echo": True, "logprobs": 2}
    made = client.completions.create(max_tokens=0, **fields).choices[0]
    assert made.text == "abc"
    assert made.logprobs.tokens == ["<|bos|>", "a", "b", "c"]
    assert made.logprobs.text_offset == [0, 0, 1, 2]
    assert made.logprobs.token_logprobs[0] is None
    ((logprob, _),) = tiny_model().score([""], ["abc"])
    assert sum(made.logprobs.token_logprobs[1:]) == pytest.approx(logprob, abs=1e-4)
    longer = client.completions.create(max_tokens=3, **fields).choices[0]
    assert longer.text.startswith("abc")
    assert len(longer.logprobs.tokens) == 7


def test_embeddings_are_the_models(client: openai.OpenAI) -> None:
    expected_ND = tiny_model().embed(["ab", "cde"])
    for form in ("float", "base64", openai.omit):
        made = client.embeddings.create(model="tiny", input=["ab", "cde"], encoding_format=form)
        got: Any = [entry.embedding for entry in made.data]
        if form == "base64":
            got = [np.frombuffer(__import__("base64").b64decode(entry), "<f4") for entry in got]
        np.testing.assert_allclose(np.array(got), expected_ND, atol=1e-6)
    assert made.usage.prompt_tokens == sum(len(tiny_model().encode(text)) for text in ("ab", "cde"))


@pytest.mark.parametrize(
    ("fields", "status", "param", "words"),
    [
        ({"model": "nope"}, 404, "model", "there is no model 'nope'"),
        ({"model": "tiny:nope"}, 404, "model", "there is no model"),
        ({"frequency_penalty": 2.5}, 400, "frequency_penalty", "frequency_penalty is 2.5"),
        ({"presence_penalty": -3}, 400, "presence_penalty", "presence_penalty is -3"),
        ({"logit_bias": {"1": 101}}, 400, "logit_bias.1", "it must be less than or equal to 100"),
        ({"logit_bias": {"a": 1}}, 400, "logit_bias.a", "logit_bias.a is 'a'"),
        ({"logit_bias": {"5000": 1}}, 400, "logit_bias", "the id 5000; the tokenizer's are 0 to"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, 400, "logit_bias", "at most 1024"),
        ({"store": True}, 400, "store", "nothing is kept"),
        ({"extra_body": {"topk": 3}}, 400, "topk", "did you mean 'top_k'?"),
        ({"temperature": -1}, 400, "temperature", "temperature is -1"),
        ({"seed": 2**63}, 400, "seed", "seed is 9223372036854775808"),
        ({"messages": []}, 400, "messages", "at least 1"),
        ({"messages": [{"role": "boss", "content": "a"}]}, 400, "messages.0.role", "'boss'"),
        ({"messages": HI * 300}, 400, "messages", "context is 1,024"),
        ({"messages": [{"role": "user", "content": "a" * 5000}]}, 400, "messages", "context is 1,024"),
        ({"n": 17}, 400, "n", "at most 16"),
        ({"n": 2**40}, 400, "n", "at most 16"),  # refused before anything is made for each
        ({"tool_choice": "required"}, 400, "tool_choice", "without tools"),
        ({"top_logprobs": 2}, 400, "top_logprobs", "without logprobs"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options", "without stream"),
        ({"max_completion_tokens": 3}, 400, "max_tokens", "differ"),
        ({"parallel_tool_calls": False}, 400, "parallel_tool_calls", "without tools"),
        ({"tools": [WEATHER, OTHER, WEATHER]}, 400, "tools", "tools has 'weather' twice"),
        ({"tools": [{"type": "custom", "custom": {"name": "a"}}]}, 400, "tools.0.custom", "are functions"),
        (
            {"tools": [WEATHER], "tool_choice": {"type": "custom", "custom": {"name": "a"}}},
            400,
            "tool_choice.custom",
            "tools are functions",
        ),
        (
            {"tools": [WEATHER], "tool_choice": {"type": "function"}},
            400,
            "tool_choice.function",
            "is missing",
        ),
        (
            {"tools": [WEATHER], "tool_choice": allowed("auto", "weather", "b")},
            400,
            "tool_choice",
            "names 'b', which tools has not",
        ),
        ({"response_format": {"type": "json_schema"}}, 400, "response_format.json_schema", "is missing"),
        (
            {"response_format": {"type": "text", "json_schema": {"name": "x"}}},
            400,
            "response_format.json_schema",
            "is given, but the type is 'text'",
        ),
        ({"messages": [{"role": "user"}]}, 400, "messages.0.content", "content is missing"),
        ({"messages": [{"role": "assistant", "content": None}]}, 400, "messages.0.content", "is missing"),
        (
            {"messages": [{"role": "tool", "content": "a"}]},
            400,
            "messages.0.tool_call_id",
            "tool_call_id is missing",
        ),
        (
            {"messages": [*HI, {"role": "tool", "content": "a", "tool_call_id": "b"}]},
            400,
            "messages",
            "tool_call_id is 'b', which no turn before has",
        ),
        (
            {"messages": [{"role": "user", "content": "a", "tool_call_id": "b"}]},
            400,
            "messages.0.tool_call_id",
            "a tool's",
        ),
        (
            {"messages": [{"role": "user", "content": "a", "tool_calls": [CALL]}]},
            400,
            "messages.0.tool_calls",
            "an assistant's",
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"type": "nope"}},
                }
            },
            400,
            "response_format",
            "cannot be followed",
        ),
        (
            {"tools": [WEATHER], "tool_choice": OTHER},
            400,
            "tool_choice",
            "'b'",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            400,
            "messages.0.content.0.image_url",
            "turns are texts",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_wrong_is_refused_by_name(
    client: openai.OpenAI, fields: Any, status: int, param: str, words: str
) -> None:
    code, body = refused(client, **fields)
    assert (code, body["param"]) == (status, param)
    assert words in body["message"]
    assert body["message"].count("\n") == 0
    assert body["message"][-1] in ".?"
    assert body["type"] == "invalid_request_error"
    streamed = (
        refused(client, **{"stream": True, **fields}) if "stream_options" not in fields else (code, body)
    )
    assert streamed == (code, body)


@pytest.mark.parametrize(
    ("own", "theirs"),
    [
        (ChatBody, chat_create_params.CompletionCreateParamsBase),
        (CompletionBody, completion_create_params.CompletionCreateParamsBase),
        (EmbeddingBody, embedding_create_params.EmbeddingCreateParams),
        (schemas.StreamOptions, types.ChatCompletionStreamOptionsParam),
        *((schemas.Message, param) for param in typing.get_args(types.ChatCompletionMessageParam)[:-1]),
        *((schemas.TextPart, param) for param in typing.get_args(types.ChatCompletionContentPartParam)),
        (schemas.TextPart, types.ChatCompletionContentPartRefusalParam),
        *((schemas.ToolCall, one) for one in typing.get_args(types.ChatCompletionMessageToolCallUnionParam)),
        *((schemas.Tool, param) for param in typing.get_args(types.ChatCompletionToolUnionParam)),
        (schemas.Function, FunctionDefinition),
        *((schemas.Chosen, one) for one in typing.get_args(types.ChatCompletionToolChoiceOptionParam)[1:]),
        (schemas.AllowedTools, types.ChatCompletionAllowedToolsParam),
        (schemas.ResponseFormat, ResponseFormatJSONSchema),
        (schemas.Schema, JSONSchema),
    ],
    ids=lambda kind: kind.__name__,
)
def test_every_field_of_openai_is_honoured_or_refused(own: Any, theirs: Any) -> None:
    known = {field.alias or name for name, field in own.model_fields.items()} | {*own.REFUSED}
    assert typing.get_type_hints(theirs).keys() - {"stream"} <= known


def test_fields_that_ask_for_nothing_are_taken(client: openai.OpenAI) -> None:
    nothing: dict[str, Any] = {
        name: values[0][-1] for name, values in ChatBody.REFUSED.items() if name not in ("functions",)
    }
    assert said(client, user="someone", **nothing).choices[0].message == said(client).choices[0].message
