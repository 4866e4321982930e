"""What requests look like: OpenAI's fields, and a few of our own.

A field of OpenAI's is honoured, or stands in a table `REFUSED` with the values that ask for nothing and what
to do instead: any other value is refused by name. A field that nobody knows is refused too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from jaxgpt.config.decoding import MOST_BIAS
from jaxgpt.errors import nearest, shown
from jaxgpt.sample.lanes import MOST_BIASES
from jaxgpt.sample.request import MOST_ALTERNATIVES
from jaxgpt.serve.errors import SAID

Refusals = Mapping[str, tuple[tuple[Any, ...], str]]
"""Field -> the values that ask for nothing, and what to do instead of another."""

_KEPT = "nothing is kept here, so drop it"
_TIER = ((None, "auto", "default"), "there is one tier")
_CACHE = "prompts that begin alike share what they have in common anyway, so drop it"


class Body(BaseModel):
    """A JSON object with these fields and no others, of these types and no others."""

    model_config = ConfigDict(extra="forbid", strict=True)
    REFUSED: ClassVar[Refusals] = {}

    @model_validator(mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        fields = {field.alias or name for name, field in cls.model_fields.items()}
        for name in value.keys() - fields:
            if name not in cls.REFUSED:
                raise _wrong(name, f"there is no field {shown(name)}{nearest(name, fields)}")
            nothing, instead = cls.REFUSED[name]
            if not any(value[name] == none and type(value[name]) is type(none) for none in nothing):
                raise _wrong(name, f"{name} is {shown(value[name])}, which is not supported; {instead}")
        return {name: inner for name, inner in value.items() if name in fields}


def _wrong(name: Any, message: str) -> PydanticCustomError:
    """An error about a field, in words of our own."""
    return PydanticCustomError(SAID, "{message}", {"message": message, "field": str(name)})


class StreamOptions(Body):
    """Of a stream."""

    REFUSED: ClassVar[Refusals] = {"include_obfuscation": ((None, False), "drop it")}

    include_usage: bool | None = None


Penalty = Annotated[float, Field(ge=-2, le=2)]
Bias = Annotated[float, Field(ge=-MOST_BIAS, le=MOST_BIAS)]
Token = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,9})$")]
"""An id, as JSON names fields."""
Stop = Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=16)]


class Generation(Body):
    """What completions and chats have in common."""

    model: str
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    typical_p: Annotated[float, Field(gt=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    no_repeat_ngram: Annotated[int, Field(ge=0)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[dict[Token, Bias], Field(max_length=MOST_BIASES)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[str, Field(min_length=1)] | Stop | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None


Ids = list[Annotated[int, Field(ge=0)]]


class CompletionBody(Generation):
    """Of `/v1/completions`."""

    REFUSED: ClassVar[Refusals] = {
        "suffix": ((None, ""), "text is written after a prompt alone"),
    }

    prompt: str | list[str] | Ids | list[Ids] | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    best_of: Annotated[int, Field(ge=1)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_ALTERNATIVES)] | None = None


class TextPart(Body):
    """A part of a turn."""

    REFUSED: ClassVar[Refusals] = dict.fromkeys(
        ("image_url", "input_audio", "file", "refusal", "prompt_cache_breakpoint"),
        ((None,), "turns are texts: use parts of the type 'text'"),
    )

    type: Literal["text"]
    text: str


class Called(Body):
    """Which function, and with what; `parsed_arguments` is what OpenAI's client has made of them."""

    name: str
    arguments: str
    parsed_arguments: Any = None


_CUSTOM = ((None,), "tools are functions")


class ToolCall(Body):
    """A call of a tool, as an answer had it."""

    REFUSED: ClassVar[Refusals] = {"index": ((None, *range(128)), "drop it"), "custom": _CUSTOM}

    id: str
    type: Literal["function"] = "function"
    function: Called


class Message(Body):
    """A turn. So that answers can be sent back as they came, it may have our own `citations`, and `parsed`,
    in which OpenAI's client holds the content.
    """

    REFUSED: ClassVar[Refusals] = {
        "audio": ((None,), "turns are texts"),
        "refusal": ((None,), "write it as content"),
        "annotations": ((None, []), "drop it"),
        "function_call": ((None,), "use tool_calls"),
    }

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    citations: list[Any] | None = None
    parsed: Any = None

    @model_validator(mode="after")
    def _fits_role(self) -> Message:
        asks, answers = bool(self.tool_calls), self.tool_call_id is not None
        for wrong, field, message in (
            (asks and self.role != "assistant", "tool_calls", "tool_calls are an assistant's; drop them"),
            (answers and self.role != "tool", "tool_call_id", "tool_call_id is a tool's; drop it"),
            (
                not answers and self.role == "tool",
                "tool_call_id",
                "tool_call_id is missing; give that of the call which this turn answers",
            ),
            (self.content is None and not asks, "content", "content is missing; give a text"),
        ):
            if wrong:
                raise _wrong(field, message)
        return self

    @property
    def text(self) -> str:
        """The content as one text."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class Function(Body):
    """A tool."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """What may be called."""

    REFUSED: ClassVar[Refusals] = {"custom": _CUSTOM}

    type: Literal["function"]
    function: Function


class Named(Body):
    """The name of a tool."""

    name: str


class ToolName(Body):
    """One of the tools."""

    type: Literal["function"]
    function: Named


class AllowedTools(Body):
    """Some of the tools, of which one may or must be called."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[ToolName], Field(min_length=1)]


class Chosen(Body):
    """The tool that must be called, or those that may be."""

    REFUSED: ClassVar[Refusals] = {"custom": _CUSTOM}

    type: Literal["function", "allowed_tools"]
    function: Named | None = None
    allowed_tools: AllowedTools | None = None

    @model_validator(mode="after")
    def _says_which(self) -> Chosen:
        for name in ("function", "allowed_tools"):
            if (getattr(self, name) is not None) != (name == self.type):
                raise _wrong(name, f"{name} is {_state(self, name)}, but the type is {self.type!r}")
        return self


class Schema(Body):
    """A JSON schema that the answer keeps; `strict` changes nothing, as it always does."""

    name: str
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """What an answer may be; `regex`, `choices` and `grammar` (Lark, as llguidance has it) are our own."""

    type: Literal["text", "json_object", "json_schema", "regex", "choices", "grammar"]
    json_schema: Schema | None = None
    regex: str | None = None
    choices: list[str] | None = None
    grammar: str | None = None

    @model_validator(mode="after")
    def _says_one(self) -> ResponseFormat:
        for name in ("json_schema", "regex", "choices", "grammar"):
            if (getattr(self, name) is not None) != (name == self.type):
                raise _wrong(name, f"{name} is {_state(self, name)}, but the type is {self.type!r}")
        return self


def _state(body: Body, name: str) -> str:
    return "missing" if getattr(body, name) is None else "given"


class ChatBody(Generation):
    """Of `/v1/chat/completions`."""

    REFUSED: ClassVar[Refusals] = {
        "audio": ((None,), "answers are texts"),
        "function_call": ((None, "none"), "use tool_choice"),
        "functions": ((None, []), "use tools"),
        "metadata": ((None, {}), _KEPT),
        "modalities": ((None, ["text"]), "answers are texts"),
        "moderation": ((None,), "the server's filters are set where it starts"),
        "prediction": ((None,), "speculation is set where the server starts"),
        "prompt_cache_key": ((None,), _CACHE),
        "prompt_cache_options": ((None, {}), _CACHE),
        "prompt_cache_retention": ((None,), _CACHE),
        "reasoning_effort": ((None, "none"), "say it in the system message"),
        "service_tier": _TIER,
        "store": ((None, False), _KEPT),
        "verbosity": ((None, "medium"), "use max_tokens, or say it in the system message"),
        "web_search_options": ((None,), "nothing is searched but the documents that the server was given"),
    }

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_ALTERNATIVES)] | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | Chosen | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    safety_identifier: str | None = None


Texts = str | Annotated[list[str], Field(min_length=1)]


class EmbeddingBody(Body):
    """Of `/v1/embeddings`; `pooling` is our own."""

    model: str
    input: Texts | Annotated[Ids, Field(min_length=1)] | Annotated[list[Ids], Field(min_length=1)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None
    pooling: Literal["mean", "first", "last"] = "mean"
    user: str | None = None


class ClassifyBody(Body):
    """Of `/v1/classify`: texts; of a tagger also lists of words, of a classifier of pairs pairs of texts."""

    model: str
    input: Texts | Annotated[list[list[str]], Field(min_length=1)]
    user: str | None = None


class ScoreBody(Body):
    """Of `/score`: how likely each continuation is after its context."""

    model: str
    context: str | list[str]
    continuation: Texts
    user: str | None = None


class TokenizeBody(Body):
    """Of `/tokenize`: a text, or a dialogue up to an answer."""

    model: str | None = None
    prompt: str | None = None
    add_special_tokens: bool | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None


class DetokenizeBody(Body):
    """Of `/detokenize`."""

    model: str | None = None
    tokens: Ids
