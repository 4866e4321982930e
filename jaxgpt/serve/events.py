"""Server-sent events, which end when their client leaves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, MutableMapping
from contextlib import aclosing
from typing import Any, Protocol

from starlette.responses import Response

from jaxgpt.serve.errors import Refused, error_body, refusal


class Ending(Protocol):
    """The request of a stream.

    Attributes:
      id: of the request.
      seconds: that it may take in all.
      deadline: until when, on the event loop's clock.
    """

    id: str
    seconds: float
    deadline: float

    async def close(self, status: int, error: str = "") -> None:
        """Tell everyone that it ended."""
        ...


DONE = b"data: [DONE]\n\n"
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # the second: nginx sends each at once


LEFT = 499
"""Status, in logs, of a request whose client left."""


async def shielded(ending: Awaitable[None]) -> None:
    """Wait for what must be done also where the request is cancelled."""
    await asyncio.shield(asyncio.ensure_future(ending))


def too_long(seconds: float) -> Refused:
    """The refusal of a request that takes too much time."""
    message = f"the answer took more than {seconds:g} s; ask for fewer tokens, or try again later."
    return Refused(504, message, code="timeout")


async def left(receive: Callable[[], Awaitable[Any]]) -> None:
    """Return once the client left."""
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """A stream of JSON objects, each sent as it is made.

    An error after the first is an event of its own. The session is closed at the end, whatever that is.

    Args:
      events: what is sent; closed at the end.
      cancel: frees what makes them; called at the end.
    """

    media_type = "text/event-stream"
    session: Ending

    def __init__(self, events: AsyncGenerator[dict[str, Any], None], cancel: Callable[[], None]) -> None:
        super().__init__(headers=_HEADERS)
        del self.headers["content-length"]
        self.events, self.cancel = events, cancel

    async def __call__(
        self,
        scope: MutableMapping[str, Any],
        receive: Callable[[], Awaitable[Any]],
        send: Callable[[MutableMapping[str, Any]], Awaitable[None]],
    ) -> None:
        """Send it."""
        sending = asyncio.ensure_future(self._send(send))
        leaving = asyncio.ensure_future(left(receive))
        status, said = LEFT, "the client left."
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                status, said = sending.result()
        finally:
            self.cancel()  # the events may not have begun
            leaving.cancel()
            sending.cancel()
            await asyncio.gather(sending, leaving, return_exceptions=True)
            await shielded(self.session.close(status, said))

    async def _send(self, send: Callable[[MutableMapping[str, Any]], Awaitable[None]]) -> tuple[int, str]:
        """Send all events; the status for logs, and what went wrong."""
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        status, said = 200, ""
        try:
            async with asyncio.timeout_at(self.session.deadline), aclosing(self.events) as events:
                async for event in events:
                    await send({"type": "http.response.body", "body": as_event(event), "more_body": True})
        except Exception as error:
            error = too_long(self.session.seconds) if isinstance(error, TimeoutError) else error
            refused = refusal(error, self.session.id)
            status, said = refused.status, str(refused)
            event = as_event(error_body(status, said, refused.code, refused.param))
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": DONE})
        return status, said


def as_event(value: Any) -> bytes:
    """One event."""
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()
