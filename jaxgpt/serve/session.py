"""One request from its admission to its end, whatever ends it: an answer, an error, a client that leaves."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

from anyio.to_thread import run_sync
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, Response

from jaxgpt.errors import nearest
from jaxgpt.serve.errors import Refused, refusal
from jaxgpt.serve.events import LEFT, EventStream, left, shielded, too_long
from jaxgpt.serve.seams import Exchange, Passage, Usage
from jaxgpt.serve.service import Service


class Common(Protocol):
    """What every body says."""

    model: str
    user: str | None


class Session:
    """A request at work.

    Args:
      service: what answers.
      exchange: the request.

    Attributes:
      id: of the request.
      seconds: that it may take in all.
      deadline: until when, on the event loop's clock.
      usage: tokens so far.
      reasons: the finish_reason of every choice so far.
      filtered: why filters stopped it; empty where they did not.
    """

    def __init__(self, service: Service, exchange: Exchange) -> None:
        self.service, self.exchange = service, exchange
        self.id, self.seconds = exchange.id, service.limits.seconds
        self.deadline = asyncio.get_running_loop().time() + self.seconds
        self.usage, self.reasons, self.filtered = Usage(), list[str](), ""
        self._watches = [observer.open(exchange) for observer in service.observers]
        self.guard = service.filters.open(exchange)
        self._closed = False

    async def enter(self, passages: Sequence[Passage]) -> list[str]:
        """The texts as filters let them in."""
        return await run_sync(self.guard.enter, passages)

    async def reserve(self, tokens: int) -> None:
        """Set aside the most tokens that it may use, its prompt's included."""
        await self.service.access.reserve(self.exchange.client, tokens)

    async def read(self, tokens: int) -> None:
        """Reserve and count tokens that are read alone."""
        await self.reserve(tokens)
        self.prompted(tokens)

    def prompted(self, tokens: int) -> None:
        """Count tokens that were read."""
        self.usage = self.usage._replace(prompt=self.usage.prompt + tokens)

    def token(self, choice: int) -> None:
        """Count a token that was made."""
        self.usage = self.usage._replace(completion=self.usage.completion + 1)
        for watch in self._watches:
            watch.token(choice)

    async def close(self, status: int, error: str = "") -> None:
        """Tell everyone that it ended; the first call counts."""
        if self._closed:
            return
        self._closed = True
        for watch in self._watches:
            watch.close(status, self.usage, self.reasons, error, self.filtered)
        await self.service.access.spend(self.exchange.client, self.usage)
        await run_sync(self.guard.close, status)


Work = Callable[[Session], Awaitable[Any]]
"""What answers: with a JSON value, or an `EventStream`."""


async def conduct(service: Service, http: HTTPRequest, body: Common, work: Work) -> Response:
    """Answer one request.

    Args:
      service: what answers.
      http: the request; its body was read.
      body: that body.
      work: makes the answer.

    Raises:
      Refused: whatever goes wrong before the answer begins.
    """
    session = Session(service, exchange_of(service, http, body))
    http.state.opened = True
    try:
        made = await _while_there(http, work(session), session.seconds)
    except BaseException as error:
        refused = Refused(LEFT, "the client left.") if isinstance(error, asyncio.CancelledError) else error
        refused = refusal(refused, session.id)
        await shielded(session.close(refused.status, str(refused)))
        if isinstance(error, Exception):
            raise refused from error
        raise
    if isinstance(made, EventStream):
        made.session = session
        return made
    await shielded(session.close(200))
    return JSONResponse(made)


async def _while_there(http: HTTPRequest, work: Awaitable[Any], seconds: float) -> Any:
    """What the work gives, unless its client leaves or its time is up: it is then cancelled."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(left(http.receive))
    try:
        done, _ = await asyncio.wait({working, leaving}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        leaving.cancel()
        if not working.done():
            working.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await working
    if working in done:
        return working.result()
    if leaving in done:
        raise Refused(LEFT, "the client left.", code="client_left")
    raise too_long(seconds)


def exchange_of(service: Service, http: HTTPRequest, body: Common) -> Exchange:
    """The request as seams see it.

    Raises:
      Refused: 404 where there is no such model.
    """
    check_model(service, body.model)
    adapter = body.model.partition(":")[2]
    user = getattr(body, "user", None) or getattr(body, "safety_identifier", None) or ""
    stream = bool(getattr(body, "stream", False))
    return Exchange(
        http.state.request_id,
        http.url.path,
        http.state.client,
        body.model,
        adapter,
        stream,
        user,
        http.headers.get("traceparent", "")[:200],
    )


def check_model(service: Service, name: str) -> None:
    """Refuse a model that is not there.

    Raises:
      Refused: 404.
    """
    if name not in (names := model_names(service)):
        hint = nearest(name, names)
        message = f"there is no model {name!r:.200}{hint}{'' if hint.endswith('?') else '.'}"
        raise Refused(404, message, code="model_not_found", param="model")


def model_names(service: Service) -> list[str]:
    """All that a request may name."""
    return [service.name, *(f"{service.name}:{adapter}" for adapter in service.adapters)]
