"""`/v1/completions`: texts that go on from prompts, whole or as they are made."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from anyio.to_thread import run_sync
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from jaxgpt.sample.request import Alternative, Piece
from jaxgpt.serve.answers import Answers, Delta
from jaxgpt.serve.asking import Asker
from jaxgpt.serve.chat import usage_of
from jaxgpt.serve.errors import Refused
from jaxgpt.serve.events import EventStream
from jaxgpt.serve.schemas import CompletionBody
from jaxgpt.serve.seams import Passage
from jaxgpt.serve.session import Session, conduct
from jaxgpt.serve.tokens import TokenNames

DEFAULT_TOKENS = 16
"""New tokens where a request does not say: OpenAI's."""


async def complete(asker: Asker, http: HTTPRequest, body: CompletionBody) -> Response:
    """Go on from prompts."""
    return await conduct(asker.service, http, body, _Completions(asker, body).answer)


@dataclass
class _Made:
    """One completion so far."""

    text: str = ""
    pieces: list[Piece] = field(default_factory=list)
    finish: str = ""

    @property
    def score(self) -> float:
        """Mean log-probability of its tokens, by which the best are chosen."""
        return float(np.mean([piece.logprob for piece in self.pieces])) if self.pieces else -np.inf


class _Completions:
    """Some prompts to go on from."""

    def __init__(self, asker: Asker, body: CompletionBody) -> None:
        self._asker, self._body = asker, body
        self._names = TokenNames(asker.service.model.tokenizer)
        self._n, self._times = body.n or 1, max(body.n or 1, body.best_of or 1)
        self._most = DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens
        self._head: dict[str, Any] = {}

    async def answer(self, session: Session) -> dict[str, Any] | EventStream:
        """The completions' JSON, or their stream."""
        body, engine = self._body, self._asker.engine
        self._asker.check_count(self._times)
        self._check()
        self._head = {
            "id": f"cmpl-{session.exchange.id}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": body.model,
            "system_fingerprint": self._asker.service.fingerprint,
        }
        prompts = await self._prompts(session)
        heads = [_Made() for _ in prompts]
        if body.echo:
            heads = [await run_sync(self._echo, ids) for ids in prompts]
        if not self._most:
            await session.read(sum(map(len, prompts)))
            return self._whole(session, [[_Made(finish="length")] * self._n for _ in prompts], heads)
        requests = self._asker.requests(
            body,
            session.exchange,
            [(ids, self._asker.most(self._most, ids)) for ids in prompts],
            self._times,
            chat=False,
            alternatives=body.logprobs or 0,
        )
        most = sum(map(len, prompts)) + sum(request.max_new_tokens for request in requests)
        await session.reserve(most)
        answers = Answers(session, requests, [None] * len(requests))
        await answers.begin(engine)
        if body.stream:
            return EventStream(self._chunks(session, answers.deltas(), heads), answers.cancel)
        made = [_Made() for _ in requests]
        async with aclosing(answers.deltas()) as deltas:
            async for delta in deltas:
                one = made[delta.choice]
                one.text, one.finish = one.text + delta.text, delta.finish
                one.pieces += delta.pieces
        groups = [made[i : i + self._times] for i in range(0, len(made), self._times)]
        if self._times > self._n:
            groups = [sorted(group, key=lambda one: -one.score)[: self._n] for group in groups]
        return self._whole(session, groups, heads)

    def _check(self) -> None:
        """Refuse fields that exclude each other.

        Raises:
          Refused: 400.
        """
        body = self._body
        hidden = body.logprobs is not None and self._asker.service.filters.changes_output
        for wrong, param, message in (
            (
                body.best_of is not None and body.best_of < self._n,
                "best_of",
                f"best_of is {body.best_of} but n is {self._n}; make it at least that.",
            ),
            (
                bool(body.stream) and self._times > self._n,
                "best_of",
                "best_of is known at the end alone, so it is not streamed; drop stream or best_of.",
            ),
            (
                not self._most and not body.echo,
                "max_tokens",
                "max_tokens is 0, which asks for nothing; make it at least 1, or add echo: true.",
            ),
            (
                not self._most and bool(body.stream),
                "stream",
                "max_tokens is 0, so there is nothing to stream; drop stream.",
            ),
            (
                body.stream_options is not None and not body.stream,
                "stream_options",
                "stream_options is given without stream; add stream: true, or drop it.",
            ),
            (
                bool(body.echo and ":" in body.model) and body.logprobs is not None,
                "echo",
                "log-probabilities of a prompt are the model's, not an adapter's; drop echo or logprobs.",
            ),
            (hidden, "logprobs", "logprobs would show tokens that this server's filters may mask; drop it."),
        ):
            if wrong:
                raise Refused(400, message, param=param)

    async def _prompts(self, session: Session) -> list[list[int]]:
        """The prompts' ids, filtered."""
        given: Any = self._body.prompt or ""
        each: list[Any] = [given] if isinstance(given, str) or isinstance(given[0], int) else given
        if len(each) > self._asker.service.limits.choices:
            message = (
                f"there are {len(each)} prompts, of at most {self._asker.service.limits.choices}; send fewer."
            )
            raise Refused(400, message, param="prompt")
        tokenizer = self._asker.service.model.tokenizer
        for one in each:
            if not isinstance(one, str):
                self._asker.check_prompt(one, "prompt")
        texts = [one if isinstance(one, str) else tokenizer.decode(one) for one in each]
        for text in texts:
            self._asker.check_size([text], "prompt")
        self._asker.check_count(len(each) * self._times)
        passed = await session.enter([Passage("prompt", text) for text in texts])
        return await run_sync(self._ids, each, texts, passed)

    def _ids(self, given: Sequence[Any], texts: Sequence[str], passed: Sequence[str]) -> list[list[int]]:
        generator = self._asker.service.model.generator
        prompts = [
            list(one)
            if not isinstance(one, str) and after == before
            else generator.texts([after])["prompts"][0]
            for one, before, after in zip(given, texts, passed, strict=True)
        ]
        for ids in prompts:
            self._asker.check_prompt(ids, "prompt")
        return prompts

    def _echo(self, ids: list[int]) -> _Made:
        """A prompt as what an answer begins with; its first token has no log-probability."""
        tokenizer, model = self._asker.service.model.tokenizer, self._asker.service.model
        made = _Made(tokenizer.decode(ids))
        if self._body.logprobs is None:
            return made
        logits_TV = model.logits([ids])[0][:, : tokenizer.vocab_size].astype(np.float64)
        top = logits_TV.max(axis=-1, keepdims=True)
        logprobs_TV = logits_TV - top - np.log(np.exp(logits_TV - top).sum(axis=-1, keepdims=True))
        made.pieces.append(Piece(ids[0], float("nan"), "", None))
        for row_V, token in zip(logprobs_TV[:-1], ids[1:], strict=True):
            best = _likeliest(row_V, self._body.logprobs)
            others = tuple(Alternative(int(i), float(row_V[i])) for i in best)
            made.pieces.append(Piece(token, float(row_V[token]), "", None, others))
        return made

    def _whole(
        self, session: Session, groups: Sequence[Sequence[_Made]], heads: Sequence[_Made]
    ) -> dict[str, Any]:
        choices = list[dict[str, Any]]()
        for group, head in zip(groups, heads, strict=True):
            for one in group:
                logprobs = self._logprobs([*head.pieces, *one.pieces], 0)
                choices.append(_choice(len(choices), head.text + one.text, logprobs, one.finish))
        return {**self._head, "choices": choices, "usage": usage_of(session)}

    async def _chunks(
        self, session: Session, deltas: AsyncGenerator[Delta, None], heads: Sequence[_Made]
    ) -> AsyncGenerator[dict[str, Any], None]:
        """The completions as they are made."""
        counted = bool(self._body.stream_options and self._body.stream_options.include_usage)
        usage = {"usage": None} if counted else {}
        offsets = [0] * (len(heads) * self._n)
        async with aclosing(deltas) as made:
            for i in range(len(offsets)):
                head = heads[i // self._n]
                if head.text:
                    choice = _choice(i, head.text, self._logprobs(head.pieces, 0), None)
                    offsets[i] = len(head.text)
                    yield {**self._head, "choices": [choice], **usage}
            async for delta in made:
                if not (delta.text or delta.finish or self._body.logprobs is not None):
                    continue
                logprobs = self._logprobs(delta.pieces, offsets[delta.choice])
                offsets[delta.choice] += sum(self._names.width(piece.id) for piece in delta.pieces)
                choice = _choice(delta.choice, delta.text, logprobs, delta.finish or None)
                yield {**self._head, "choices": [choice], **usage}
        if counted:
            yield {**self._head, "choices": [], "usage": usage_of(session)}

    def _logprobs(self, pieces: Sequence[Piece], offset: int) -> dict[str, Any] | None:
        if self._body.logprobs is None:
            return None
        return self._names.completion(pieces, self._body.logprobs, offset)


def _choice(index: int, text: str, logprobs: Any, finish: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}


def _likeliest(logprobs_V: np.ndarray, count: int) -> list[int]:
    """The ids of the largest, the first of those that tie."""
    if not count:
        return []
    least = np.partition(logprobs_V, -count)[-count]
    found = np.flatnonzero(logprobs_V >= least).tolist()
    return sorted(found, key=lambda i: -logprobs_V[i])[:count]
