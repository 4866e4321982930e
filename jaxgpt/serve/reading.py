"""What is read and not written: embeddings, labels, scores of texts, and their tokens.

These run one at a time beside the engine, each in a thread.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable, Sequence
from dataclasses import asdict, is_dataclass
from typing import Any

import numpy as np
from anyio.to_thread import run_sync
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, Response

from jaxgpt.serve.chat import turn_of
from jaxgpt.serve.errors import Refused
from jaxgpt.serve.schemas import ClassifyBody, DetokenizeBody, EmbeddingBody, ScoreBody, TokenizeBody
from jaxgpt.serve.seams import Passage
from jaxgpt.serve.service import Service
from jaxgpt.serve.session import Session, check_model, conduct
from jaxgpt.text.chat import prompt_ids
from jaxgpt.text.tokenizer import before_text


class Reader:
    """What reads texts with a service's model.

    Args:
      service: the model and its limits.
    """

    def __init__(self, service: Service) -> None:
        self.service, self._turn = service, asyncio.Lock()

    async def embed(self, http: HTTPRequest, body: EmbeddingBody) -> Response:
        """Answer `/v1/embeddings`."""

        async def work(session: Session) -> dict[str, Any]:
            width = self.service.model.config.model.width
            if body.dimensions not in (None, width):
                message = f"dimensions is {body.dimensions} but vectors have {width}; drop it."
                raise Refused(400, message, param="dimensions")
            given: Any = body.input
            several = not isinstance(given, str) and not isinstance(given[0], int)
            rows = await self._rows(session, given if several else [given])
            await session.read(sum(map(len, rows)))
            vectors_ND = await self._one(lambda: self.service.model.embed(rows, body.pooling))
            data = [
                {"object": "embedding", "index": i, "embedding": _vector(vector_D, body.encoding_format)}
                for i, vector_D in enumerate(vectors_ND)
            ]
            return _listed(session, data)

        return await conduct(self.service, http, body, work)

    async def classify(self, http: HTTPRequest, body: ClassifyBody) -> Response:
        """Answer `/v1/classify`."""

        async def work(session: Session) -> dict[str, Any]:
            self._plain(session)
            given: Any = [body.input] if isinstance(body.input, str) else body.input
            self._few(given)
            parts = [[one] if isinstance(one, str) else one for one in given]
            passed = iter(await session.enter([Passage("input", text) for part in parts for text in part]))
            texts = [next(passed) if isinstance(one, str) else [next(passed) for _ in one] for one in given]
            await session.read(await self._count([text for part in parts for text in part]))
            found = await self._one(lambda: self.service.model.predict(texts))
            return _listed(session, [{"index": i, **_label(one)} for i, one in enumerate(found)])

        return await conduct(self.service, http, body, work)

    async def score(self, http: HTTPRequest, body: ScoreBody) -> Response:
        """Answer `/score`."""

        async def work(session: Session) -> dict[str, Any]:
            self._plain(session)
            continuations = [body.continuation] if isinstance(body.continuation, str) else body.continuation
            self._few(continuations)
            contexts = [body.context] * len(continuations) if isinstance(body.context, str) else body.context
            texts = await session.enter([Passage("input", text) for text in [*contexts, *continuations]])
            contexts, continuations = texts[: len(contexts)], texts[len(contexts) :]
            await session.read(await self._count(texts))
            found = await self._one(lambda: self.service.model.score(contexts, continuations))
            return _listed(
                session, [{"index": i, "logprob": x, "greedy": g} for i, (x, g) in enumerate(found)]
            )

        return await conduct(self.service, http, body, work)

    async def tokenize(self, http: HTTPRequest, body: TokenizeBody) -> Response:
        """Answer `/tokenize`."""
        self._check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise Refused(400, "give a prompt or messages, one of them.", param="prompt")
        if body.messages is not None and body.add_special_tokens:
            message = "add_special_tokens is for a prompt: a dialogue has those of its template; drop it."
            raise Refused(400, message, param="add_special_tokens")
        model = self.service.model

        def ids() -> list[int]:
            if body.messages is None:
                return self._ids(body.prompt or "", body.add_special_tokens is not False)
            roles = ["system" if m.role == "developer" else m.role for m in body.messages]
            turns = [turn_of(m, role, m.text) for m, role in zip(body.messages, roles, strict=True)]
            return prompt_ids(turns, model.tokenizer)

        tokens = await run_sync(ids)
        context = model.config.model.context
        return JSONResponse({"tokens": tokens, "count": len(tokens), "max_model_len": context})

    def _ids(self, text: str, whole: bool) -> list[int]:
        """The ids of a text as the model reads it, or of the text alone. There the name of a control token
        is that token, as in Hugging Face's tokenizers, so that a client finds out its id.
        """
        model = self.service.model
        if whole:
            return model.encode(text)
        named = {name: token for token, name in model.tokenizer.names.items()}
        return [named[text]] if text in named else model.tokenizer.encode(text)

    def tokenizer_info(self) -> dict[str, Any]:
        """What `/tokenizer_info` says, by Hugging Face's names."""
        model, tokenizer = self.service.model, self.service.model.tokenizer
        names, template = tokenizer.names, tokenizer.template
        begins = model.generator.bos if self.service.engine is not None else tokenizer.adds_bos
        return {
            "tokenizer_class": type(tokenizer).__name__,
            "bos_token": names[before_text(tokenizer, begins)],
            "eos_token": names[tokenizer.control["<|eos|>"]],
            "add_bos_token": begins,
            "vocab_size": tokenizer.vocab_size,
            "model_max_length": model.config.model.context,
            "chat_template": None if template is None else template.source,
        }

    async def detokenize(self, http: HTTPRequest, body: DetokenizeBody) -> Response:
        """Answer `/detokenize`."""
        self._check_model(body.model)
        tokenizer = self.service.model.tokenizer
        for token in body.tokens:
            if token >= tokenizer.vocab_size:
                message = f"tokens holds {token}; the tokenizer's ids are 0 to {tokenizer.vocab_size - 1}."
                raise Refused(400, message, param="tokens")
        return JSONResponse({"prompt": tokenizer.decode(body.tokens)})

    # ------------------------------------------------------------------------------------- parts

    def _check_model(self, name: str | None) -> None:
        """Refuse a model that is not there; none named means the one that is."""
        if name is not None:
            check_model(self.service, name)

    async def _one(self, work: Callable[[], Any]) -> Any:
        """What the work gives, after what came before it."""
        async with self._turn:
            return await run_sync(work)

    async def _rows(self, session: Session, given: Sequence[Any]) -> list[list[int]]:
        """The ids of texts, filtered, or ids as they are given where filters change nothing in them."""
        self._plain(session)
        self._few(given)
        encode = self.service.model.encode
        texts = [one if isinstance(one, str) else self._decoded(one) for one in given]
        passed = await session.enter([Passage("input", text) for text in texts])

        def ids() -> list[list[int]]:
            return [
                one if not isinstance(one, str) and before == after else encode(after)
                for one, before, after in zip(given, texts, passed, strict=True)
            ]

        return await run_sync(ids)

    async def _count(self, texts: Sequence[str]) -> int:
        """Tokens of texts."""
        ids = await run_sync(self.service.model.tokenizer.encode_batch, texts)
        return sum(map(len, ids))

    def _decoded(self, ids: Sequence[int]) -> str:
        size = self.service.model.tokenizer.vocab_size
        wrong = [token for token in ids if token >= size]
        if wrong:
            raise Refused(400, f"input holds the id {wrong[0]}; they are 0 to {size - 1}.", param="input")
        return self.service.model.tokenizer.decode(ids)

    def _few(self, given: Sequence[Any]) -> None:
        most = self.service.limits.inputs
        if len(given) > most:
            raise Refused(
                400, f"input has {len(given)} entries, of at most {most}; send fewer.", param="input"
            )

    def _plain(self, session: Session) -> None:
        """Refuse an adapter: it writes, and reads nothing by itself."""
        if session.exchange.adapter:
            message = (
                f"{session.exchange.model} is an adapter, which completes alone; name {self.service.name}."
            )
            raise Refused(400, message, param="model")


def _listed(session: Session, data: list[Any]) -> dict[str, Any]:
    tokens = session.usage.prompt
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "model": session.exchange.model, "data": data, "usage": usage}


def _vector(vector_D: np.ndarray, form: str | None) -> Any:
    if form == "base64":
        return base64.b64encode(vector_D.astype("<f4").tobytes()).decode()
    return vector_D.tolist()


def _label(found: Any) -> dict[str, Any]:
    """A label, or the spans of a text."""
    return asdict(found) if is_dataclass(found) else {"spans": [asdict(span) for span in found]}  # type: ignore[arg-type]
