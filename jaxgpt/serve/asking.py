"""From a request's fields to what an engine is asked: prompt, sampling, seeds, rule, length."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from jaxgpt.config import Sampling
from jaxgpt.errors import UserError
from jaxgpt.sample.constrained import Rule, choices, grammar, json_schema, regex
from jaxgpt.sample.request import Request
from jaxgpt.sample.settings import CHAT_DEFAULT, SAMPLE_DEFAULT, Asked
from jaxgpt.serve.errors import Refused
from jaxgpt.serve.schemas import Generation, ResponseFormat
from jaxgpt.serve.seams import Exchange
from jaxgpt.serve.service import Engine, Service

LEAST = 1e-9
"""Of `top_p`."""
_FIELDS = (
    *("temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty", "no_repeat_ngram"),
    *("presence_penalty", "frequency_penalty"),
)


@dataclass(frozen=True)
class Asker:
    """Turns requests into the engine's.

    Attributes:
      service: the model, its engine and limits.
    """

    service: Service

    @cached_property
    def engine(self) -> Engine:
        """What generates.

        Raises:
          Refused: the model writes no text.
        """
        if self.service.engine is None:
            message = f"{self.service.name} writes no text; use /v1/embeddings or /v1/classify."
            raise Refused(400, message, code="not_generative", param="model")
        return self.service.engine

    @cached_property
    def defaults(self) -> tuple[Sampling, Sampling]:
        """Settings of completions and of chats, where a request says nothing."""
        own = self.service.model.tokenizer.sampling
        return Asked().settle(own, SAMPLE_DEFAULT), Asked().settle(own, CHAT_DEFAULT)

    @cached_property
    def longest(self) -> int:
        """Most bytes of UTF-8 that may be read: beyond, they cannot be tokens of one context."""
        return self.service.model.generator.context * max(
            1, int(np.max(self.service.model.tokenizer.token_bytes()))
        )

    def check_size(self, texts: Sequence[str], param: str) -> None:
        """Refuse at once what is far beyond the context.

        Raises:
          Refused: 400 with the code `context_length_exceeded`.
        """
        size = sum(len(text) for text in texts)
        if size > self.longest or len(texts) > self.service.model.generator.context:
            raise self._too_long(f"the texts have {size:,} characters", param)

    def check_prompt(self, prompt: Sequence[int], param: str) -> None:
        """Refuse a prompt that leaves no room, or holds ids of no token.

        Raises:
          Refused: 400.
        """
        if len(prompt) >= self.service.model.generator.context:
            raise self._too_long(f"the prompt has {len(prompt):,} tokens", param)
        try:
            self.service.model.generator.check_prompts([prompt])
        except UserError as error:
            raise Refused(400, str(error), param=param) from None

    def _too_long(self, what: str, param: str) -> Refused:
        context = self.service.model.generator.context
        message = f"{what} but the model's context is {context:,} tokens, new ones included; shorten it."
        return Refused(400, message, code="context_length_exceeded", param=param)

    def check_count(self, count: int) -> None:
        """Refuse more completions than may be asked for at once.

        Raises:
          Refused: 400.
        """
        if count > (most := self.service.limits.choices):
            message = f"{count:,} completions are asked for, of at most {most:,}; lower n or best_of."
            raise Refused(400, message, param="n")

    def sampling(self, body: Generation, chat: bool) -> Sampling:
        """How tokens are chosen: as the request says, else as the model does, else as the command does."""
        given = {name: value for name in _FIELDS if (value := getattr(body, name)) is not None}
        if body.top_p == 0:  # the likeliest token alone
            given["top_p"] = LEAST
        if body.logit_bias:
            given["logit_bias"] = tuple((int(token), bias) for token, bias in body.logit_bias.items())
        sampling = Asked(**given).settle({}, self.defaults[chat])
        try:
            self.service.model.generator.check_bias([sampling])
        except UserError as error:
            raise Refused(400, str(error), param="logit_bias") from None
        return sampling

    def most(self, asked: int | None, prompt: Sequence[int], field: str = "max_tokens") -> int:
        """New tokens of an answer.

        Args:
          asked: by the request; None means what the context leaves.
          prompt: what it follows.
          field: of the request, that asked.
        """
        most, room = self.service.limits.answer_tokens, self.service.model.generator.context - len(prompt)
        if asked is not None and most and asked > most:
            message = f"{field} is {asked:,} but answers have at most {most:,} here; lower it."
            raise Refused(400, message, param=field)
        return min(room, asked if asked is not None else most or room)

    def requests(
        self,
        body: Generation,
        exchange: Exchange,
        prompts: Sequence[tuple[Sequence[int], int]],
        times: int,
        *,
        chat: bool,
        alternatives: int = 0,
        rule: Rule | None = None,
    ) -> list[Request]:
        """What the engine is asked: every prompt `times` times, with seeds that follow each other.

        Args:
          body: the request.
          exchange: the request.
          prompts: token ids, and new tokens.
          times: answers of each.
          chat: whether it is a dialogue.
          alternatives: to each token, that are asked for.
          rule: what answers must follow.

        Raises:
          Refused: 400 for more answers than may be, or settings that cannot be.
        """
        self.check_count(len(prompts) * times)
        seed = secrets.randbits(32) if body.seed is None else body.seed  # of which 32 bits count
        stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
        sampling = self.sampling(body, chat)
        return [
            Request(
                prompt=prompt,
                max_new_tokens=most,
                sampling=sampling,
                seed=(seed + i) % 2**32,
                stop_strings=stop,
                apart=chat,
                adapter=exchange.adapter or None,
                rule=rule,
                alternatives=alternatives,
                owner=exchange.client.name,
            )
            for prompt, most in prompts
            for i in range(times)
        ]


def rule_of(asked: ResponseFormat | None) -> Rule | None:
    """What an answer may be.

    Raises:
      Refused: 400 for what cannot be followed.
    """
    if asked is None or asked.type == "text":
        return None
    try:
        return _RULES[asked.type](getattr(asked, asked.type, None))
    except UserError as error:
        raise Refused(400, str(error), code="invalid_schema", param="response_format") from None


_RULES: dict[str, Callable[[Any], Rule]] = {
    "json_object": lambda _: json_schema({"type": "object"}),
    "json_schema": lambda given: json_schema({"type": "object"} if given.schema_ is None else given.schema_),
    "regex": regex,
    "choices": choices,
    "grammar": grammar,
}
"""By the type of a `response_format`."""
