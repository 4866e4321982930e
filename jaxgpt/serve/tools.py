"""Calls of tools: how a model is told of tools, what an answer that calls one must be, how a call is read.

Templates that write tools are given them; for others they stand in the system message, in the form of Hermes
(NousResearch/Hermes-Function-Calling), which most open models were tuned on:
`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from jaxgpt.errors import UserError
from jaxgpt.sample.constrained import Rule, after_mark, json_schema
from jaxgpt.serve.errors import Refused

OPENING, CLOSING = "<tool_call>", "</tool_call>"
_TOLD = (
    "You may call one or more functions to help with the user's request. These are the functions, one JSON "
    "object a line:\n<tools>\n{tools}\n</tools>\nTo call one, answer with its name and arguments as JSON, "
    'between these two:\n<tool_call>\n{{"name": "the function", "arguments": {{}}}}\n</tool_call>'
)


class Call(NamedTuple):
    """A call of a tool."""

    id: str
    name: str
    arguments: str
    """JSON."""

    def json(self) -> dict[str, Any]:
        """As OpenAI writes it."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


class CallReader:
    """Tells calls from text, as text comes: what may be the beginning of a call is held back.

    Args:
      names: of the tools; JSON that calls no other is text.
      several: whether there may be more than one call.
      plain: whether an answer that is JSON without marks may be a call.
    """

    def __init__(self, names: Collection[str], several: bool = True, plain: bool = True) -> None:
        self._names, self._several, self._plain = names, several, plain
        self._held, self._begun, self.count = "", False, 0

    @property
    def stopped(self) -> bool:
        """Whether all calls that may be were made."""
        return self.count > 0 and not self._several

    def feed(self, text: str) -> tuple[str, tuple[Call, ...]]:
        """The text and the calls that are certain now."""
        self._held += text
        said, calls = "", list[Call]()
        while self._held and not self.stopped:
            start = self._held.find(OPENING)
            if self._raw():
                break
            if start < 0:
                keep = _overlap(self._held, OPENING)
                said += self._say(self._held[: len(self._held) - keep])
                self._held = self._held[len(self._held) - keep :]
                break
            end = self._held.find(CLOSING, start)
            if end < 0:
                said += self._say(self._held[:start])
                self._held = self._held[start:]
                break
            inner = self._held[start + len(OPENING) : end]
            before, whole = self._held[:start], self._held[start : end + len(CLOSING)]
            self._held = self._held[end + len(CLOSING) :]
            found = self._read(inner)
            said += self._say(before if found else before + whole)
            calls += found
        return said, tuple(calls)

    def flush(self) -> tuple[str, tuple[Call, ...]]:
        """What is left at the end."""
        held, self._held = self._held, ""
        if self.stopped:
            return "", ()
        marked = held.startswith(OPENING)
        found = self._read(held.removeprefix(OPENING)) if marked or self._plain else []
        return ("", tuple(found)) if found else (self._say(held), ())

    def _raw(self) -> bool:
        """Whether the whole answer may be JSON without marks around it."""
        first = self._held.lstrip()[:1]
        return not self._begun and not self.count and (first == "" or (self._plain and first in "{["))

    def _say(self, text: str) -> str:
        if not self._begun and not text.strip():  # white space around calls says nothing
            return ""
        if self.count and not text.strip():
            return ""
        self._begun = True
        return text

    def _read(self, text: str) -> list[Call]:
        """The calls that a text is; none where it is something else."""
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return []
        values = value if isinstance(value, list) else [value]
        calls = [call for one in values if (call := self._call(one)) is not None]
        if not values or len(calls) < len(values):
            return []
        calls = calls if self._several else calls[:1]
        self.count += len(calls)
        return calls

    def _call(self, value: Any) -> Call | None:
        if not isinstance(value, dict) or value.get("name") not in self._names:
            return None
        arguments = value.get("arguments", value.get("parameters", {}))
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        return Call(_id(), value["name"], text.encode(errors="replace").decode())  # of a lone surrogate


def _id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


def _overlap(text: str, mark: str) -> int:
    """Characters at the end of a text that a mark begins with."""
    sizes = range(min(len(mark) - 1, len(text)), 0, -1)
    return next((n for n in sizes if mark.startswith(text[-n:])), 0)


def rule_of(tools: Sequence[Mapping[str, Any]], marked: bool) -> Rule:
    """What an answer must be that calls one of these.

    Args:
      tools: the functions: `name`, and `parameters` as a JSON schema.
      marked: whether the call stands between the marks.

    Raises:
      Refused: 400 for a schema that cannot be followed.
    """
    try:
        rule = _call_of(tools)
    except UserError as error:
        raise Refused(400, str(error), code="invalid_schema", param="tools") from None
    return Rule(f'"{OPENING}\\n" {rule.body} "\\n{CLOSING}"', "tools") if marked else rule


def rule_once_called(tools: Sequence[Mapping[str, Any]], otherwise: Rule | None = None) -> Rule | None:
    """What an answer must be that may call some of these: any text, but a mark begins a call of one.

    A schema that cannot be followed binds no more than that there are arguments, unless its tool is `strict`.
    None where nothing can be followed, as llguidance is not installed.

    Args:
      tools: as above.
      otherwise: what an answer is that calls none, where not any text.

    Raises:
      Refused: 400 for a schema of a strict tool that cannot be followed.
    """
    try:
        call = _call_of(tools)
    except UserError as error:
        if any(tool.get("strict") for tool in tools):
            raise Refused(400, str(error), code="invalid_schema", param="tools") from None
        try:
            call = _call_of([tool if _followed(tool) else {"name": tool["name"]} for tool in tools])
        except UserError:
            return otherwise
    return after_mark(OPENING, call, CLOSING, "tools", otherwise)


def _call_of(tools: Sequence[Mapping[str, Any]]) -> Rule:
    """A call of one of these as JSON.

    Raises:
      UserError: a schema cannot be followed.
    """
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool["name"]},
                # What a schema refers to (#/$defs/...) is found from its own root.
                "arguments": {"$id": f"tool:{i}", "type": "object", **(tool.get("parameters") or {})},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for i, tool in enumerate(tools)
    ]
    return json_schema(calls[0] if len(calls) == 1 else {"anyOf": calls})


def _followed(tool: Mapping[str, Any]) -> bool:
    try:
        return bool(_call_of([tool]))
    except UserError:
        return False


def told(messages: Sequence[dict[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A dialogue with its tools and their calls as texts, for a template that writes none."""
    turns = [_as_text(turn) for turn in messages]
    if not tools:
        return turns
    lines = "\n".join(
        json.dumps({"type": "function", "function": tool}, ensure_ascii=False) for tool in tools
    )
    about = _TOLD.format(tools=lines)
    if turns[0]["role"] == "system":
        return [{**turns[0], "content": f"{turns[0]['content']}\n\n{about}"}, *turns[1:]]
    return [{"role": "system", "content": about}, *turns]


def _as_text(turn: dict[str, Any]) -> dict[str, Any]:
    if turn["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{turn['content']}\n</tool_response>"}
    if not turn.get("tool_calls"):
        return turn
    calls = [
        f'{OPENING}\n{{"name": {json.dumps(call["function"]["name"])}, '
        f'"arguments": {call["function"]["arguments"]}}}\n{CLOSING}'
        for call in turn["tool_calls"]
    ]
    return {"role": "assistant", "content": "\n".join([turn["content"], *calls]).lstrip("\n")}
