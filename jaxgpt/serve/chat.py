"""`/v1/chat/completions`: answers to dialogues, whole or as they are made."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from anyio.to_thread import run_sync
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from jaxgpt.sample.constrained import Rule
from jaxgpt.sample.request import Piece
from jaxgpt.serve import tools
from jaxgpt.serve.answers import Answers, Delta
from jaxgpt.serve.asking import Asker, rule_of
from jaxgpt.serve.errors import Refused
from jaxgpt.serve.events import EventStream
from jaxgpt.serve.schemas import ChatBody, Message
from jaxgpt.serve.seams import Cited, Knowledge, Passage
from jaxgpt.serve.session import Session, conduct
from jaxgpt.serve.tokens import TokenNames
from jaxgpt.text.chat import prompt_ids

Turns = list[dict[str, Any]]


async def chat(asker: Asker, http: HTTPRequest, body: ChatBody) -> Response:
    """Answer a dialogue."""
    return await conduct(asker.service, http, body, _Chat(asker, body).answer)


@dataclass
class _Chat:
    """One dialogue to answer."""

    asker: Asker
    body: ChatBody

    async def answer(self, session: Session) -> dict[str, Any] | EventStream:
        """The answer's JSON, or its stream."""
        body, engine = self.body, self.asker.engine
        self.asker.check_count(body.n or 1)
        self._check()
        known = await self._known(session)
        writer = _Writer(self, session, known)
        if known.answer is not None:
            deltas = _told(known.answer, body.n or 1)
            return EventStream(writer.chunks(deltas), _nothing) if body.stream else await writer.whole(deltas)
        prompt, rule, names = await run_sync(self._asked, known.messages)
        field = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        requests = self.asker.requests(
            body,
            session.exchange,
            [(prompt, self.asker.most(getattr(body, field), prompt, field))],
            body.n or 1,
            chat=True,
            alternatives=body.top_logprobs or 0,
            rule=rule,
        )
        how = (names, body.parallel_tool_calls is not False, not self.formatted)
        readers = [tools.CallReader(*how) if names else None for _ in requests]
        answers = Answers(session, requests, readers)
        await session.reserve(len(prompt) + sum(request.max_new_tokens for request in requests))
        await answers.begin(engine)
        if body.stream:
            return EventStream(writer.chunks(answers.deltas()), answers.cancel)
        return await writer.whole(answers.deltas())

    @property
    def formatted(self) -> bool:
        """Whether an answer has a form of its own."""
        return self.body.response_format is not None and self.body.response_format.type != "text"

    def _check(self) -> None:
        """Refuse fields that exclude each other.

        Raises:
          Refused: 400.
        """
        body = self.body
        twice = body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens)
        names = [tool.function.name for tool in body.tools or ()]
        again = next((name for name in names if names.count(name) > 1), "")
        asked = {call.id for message in body.messages for call in message.tool_calls or ()}
        strange = next((m.tool_call_id for m in body.messages if m.tool_call_id not in (None, *asked)), None)
        hidden = bool(body.logprobs) and self.asker.service.filters.changes_output
        for wrong, param, message in (
            (twice, "max_tokens", "max_tokens and max_completion_tokens differ; give one of them."),
            (
                body.top_logprobs is not None and not body.logprobs,
                "top_logprobs",
                "top_logprobs is given without logprobs; add logprobs: true.",
            ),
            (
                body.stream_options is not None and not body.stream,
                "stream_options",
                "stream_options is given without stream; add stream: true, or drop it.",
            ),
            (
                body.tool_choice not in (None, "none") and not body.tools,
                "tool_choice",
                "tool_choice is given without tools; add tools, or drop it.",
            ),
            (
                body.parallel_tool_calls is not None and not body.tools,
                "parallel_tool_calls",
                "parallel_tool_calls is given without tools; add tools, or drop it.",
            ),
            (bool(again), "tools", f"tools has {again!r} twice; give each a name of its own."),
            (
                strange is not None,
                "messages",
                f"tool_call_id is {strange!r:.100}, which no turn before has among its tool_calls; send that "
                "turn too.",
            ),
            (hidden, "logprobs", "logprobs would show tokens that this server's filters may mask; drop it."),
        ):
            if wrong:
                raise Refused(400, message, param=param)

    async def _known(self, session: Session) -> Knowledge:
        """The turns, filtered, with what is known about them."""
        messages = self.body.messages
        self.asker.check_size([message.text for message in messages], "messages")
        roles = ["system" if message.role == "developer" else message.role for message in messages]
        passages = [Passage(role, message.text) for role, message in zip(roles, messages, strict=True)]
        texts = await session.enter(passages)
        turns = [turn_of(*row) for row in zip(messages, roles, texts, strict=True)]
        return await run_sync(self.asker.service.documents.find, session.exchange, turns)

    def _asked(self, turns: Turns) -> tuple[list[int], Rule | None, list[str]]:
        """The prompt, what the answer must follow, and the names of tools that it may call."""
        body, tokenizer = self.body, self.asker.service.model.tokenizer
        functions = [tool.function.model_dump(exclude_none=True) for tool in body.tools or ()]
        choice, chosen = _chosen(body, functions)
        template = tokenizer.template
        native = template is not None and template.takes_tools
        shown = [] if choice == "none" else functions
        if native:
            given = [{"type": "function", "function": function} for function in shown]
            prompt = prompt_ids(turns, tokenizer, given)
        else:
            prompt = prompt_ids(tools.told(turns, shown), tokenizer)
        self.asker.check_prompt(prompt, "messages")
        if not shown:
            return prompt, rule_of(body.response_format), []
        marked = template is None or not native or tools.OPENING in template.source
        names = [function["name"] for function in chosen]
        if choice == "required":
            return prompt, tools.rule_of(chosen, marked), names
        form = rule_of(body.response_format)
        if form is not None and not marked:
            message = (
                "response_format and tools exclude each other for this model, whose calls have no mark; set "
                "tool_choice to 'none' or 'required', or drop one."
            )
            raise Refused(400, message, param="response_format")
        return prompt, tools.rule_once_called(chosen, form) if marked else None, names


def _chosen(body: ChatBody, functions: list[dict[str, Any]]) -> tuple[str, list[dict[str, Any]]]:
    """Whether a tool is called ("none", "auto", "required"), and which may be.

    Raises:
      Refused: 400 for a name that no tool has.
    """
    choice = body.tool_choice or "auto"
    if isinstance(choice, str):
        return choice, functions
    if choice.allowed_tools is None:
        assert choice.function is not None
        mode, names = "required", [choice.function.name]
    else:
        mode, names = choice.allowed_tools.mode, [one.function.name for one in choice.allowed_tools.tools]
    for name in names:
        if name not in (function["name"] for function in functions):
            message = f"tool_choice names {name!r:.100}, which tools has not; name one of them."
            raise Refused(400, message, param="tool_choice")
    return mode, [function for function in functions if function["name"] in names]


def turn_of(message: Message, role: str, text: str) -> dict[str, Any]:
    """A turn as templates take it."""
    turn: dict[str, Any] = {"role": role, "content": text}
    if message.tool_calls:
        own = {"function": {"parsed_arguments"}}
        turn["tool_calls"] = [call.model_dump(exclude=own) for call in message.tool_calls]
    return turn | {
        name: value for name in ("name", "tool_call_id") if (value := getattr(message, name)) is not None
    }


@dataclass
class _Said:
    """What was said of one answer so far."""

    text: str = ""
    calls: list[tools.Call] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    finish: str = ""
    begun: bool = False


class _Writer:
    """Deltas as OpenAI's objects."""

    def __init__(self, asked: _Chat, session: Session, known: Knowledge) -> None:
        self._body, self._session, self._known = asked.body, session, known
        self._marked = not asked.formatted and not self._body.tools  # what others parse stays as it was made
        self._names = TokenNames(asked.asker.service.model.tokenizer)
        self._said = [_Said() for _ in range(asked.body.n or 1)]
        self._head = {
            "id": f"chatcmpl-{session.exchange.id}",
            "created": int(time.time()),
            "model": asked.body.model,
            "system_fingerprint": asked.asker.service.fingerprint,
        }

    async def whole(self, deltas: AsyncGenerator[Delta, None]) -> dict[str, Any]:
        """The whole answer."""
        async with aclosing(deltas) as made:
            async for delta in made:
                self._add(delta)
        cited = [self._cited(said, said.finish) for said in self._said]
        choices = [
            {
                "index": i,
                "message": {
                    "role": "assistant",
                    "content": said.text + more if said.text or not said.calls else None,
                    "refusal": None,
                    **({"citations": [*citations]} if citations else {}),
                    **({"tool_calls": [call.json() for call in said.calls]} if said.calls else {}),
                },
                "logprobs": self._logprobs(said.pieces),
                "finish_reason": said.finish,
            }
            for i, (said, (more, citations)) in enumerate(zip(self._said, cited, strict=True))
        ]
        usage = usage_of(self._session)
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": usage, **self._about}

    async def chunks(self, deltas: AsyncGenerator[Delta, None]) -> AsyncGenerator[dict[str, Any], None]:
        """The answer as it is made."""
        counted = bool(self._body.stream_options and self._body.stream_options.include_usage)
        usage = {"usage": None} if counted else {}
        head = {**self._head, "object": "chat.completion.chunk"}
        first = {**usage, **self._about}
        async with aclosing(deltas) as made:
            for i in range(len(self._said)):
                yield {**head, "choices": [_chunk(i, {"role": "assistant", "content": ""})], **first}
            async for delta in made:
                for choice in self._choices(delta):
                    yield {**head, "choices": [choice], **usage}
        if counted:
            yield {**head, "choices": [], "usage": usage_of(self._session)}

    @property
    def _about(self) -> dict[str, Any]:
        """What the answer has beside OpenAI's fields."""
        sources = {"sources": [*self._known.sources]} if self._known.sources else {}
        return {**sources, **self._known.about}

    def _cited(self, said: _Said, finish: str) -> Cited:
        """What an answer that ended so rests on."""
        if not self._known.sources or finish not in ("stop", "length"):
            return Cited()
        found = self._known.cite(said.text)
        return found if self._marked and finish == "stop" else found._replace(more="")

    def _choices(self, delta: Delta) -> list[dict[str, Any]]:
        """The entries of `choices`, each of a chunk of its own."""
        said, found = self._said[delta.choice], list[dict[str, Any]]()
        logprobs = self._logprobs(delta.pieces)
        if delta.text or (logprobs and logprobs["content"]):
            found.append(_chunk(delta.choice, {"content": delta.text}, logprobs))
        for number, call in enumerate(delta.calls, len(said.calls)):
            found.append(_chunk(delta.choice, {"tool_calls": [{"index": number, **call.json()}]}))
        said.text += delta.text
        if delta.finish:
            more, citations = self._cited(said, delta.finish)
            found += [_chunk(delta.choice, {"content": more})] if more else []
            last = {"citations": [*citations]} if citations else {}
            found.append(_chunk(delta.choice, last, finish=delta.finish))
        said.calls += delta.calls
        return found

    def _add(self, delta: Delta) -> None:
        said = self._said[delta.choice]
        said.text += delta.text
        said.calls += delta.calls
        said.pieces += delta.pieces
        said.finish = delta.finish

    def _logprobs(self, pieces: Sequence[Piece]) -> dict[str, Any] | None:
        if not self._body.logprobs:
            return None
        return {"content": self._names.chat(pieces, self._body.top_logprobs or 0), "refusal": None}


def _chunk(choice: int, delta: Any, logprobs: Any = None, finish: str | None = None) -> dict[str, Any]:
    return {"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": finish}


def usage_of(session: Session) -> dict[str, int]:
    """Tokens read and made."""
    prompt, completion = session.usage
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


async def _told(text: str, times: int) -> AsyncGenerator[Delta, None]:
    """A given text as every answer."""
    for choice in range(times):
        yield Delta(choice, text, finish="stop")


def _nothing() -> None:
    pass
