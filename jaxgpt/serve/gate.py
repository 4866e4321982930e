"""What a request passes before its endpoint: its id, the drain, its client, and the size of its body."""

from __future__ import annotations

import asyncio
import json
import re
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from jaxgpt.files import parse_json
from jaxgpt.serve.errors import Refused, error_body, refusal
from jaxgpt.serve.service import Service

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

ALIVE = ("/health", "/ready")
"""Answered always, to anyone."""
OPEN = (*ALIVE, "/openapi.json")
"""Addresses that need no key."""
WATCHED = ("/metrics",)
"""Answered also by a server that is full or ending, to a client with a key."""
NEEDED = {
    "/v1/chat/completions": "generate",
    "/v1/completions": "generate",
    "/v1/embeddings": "embed",
    "/v1/classify": "classify",
    "/score": "tokenize",
    "/tokenize": "tokenize",
    "/detokenize": "tokenize",
    "/tokenizer_info": "tokenize",
    "/metrics": "metrics",
}
"""Scope that a client needs, by address; others need none."""
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_FEW = 100
"""Brackets of a body that cannot be nested too deeply."""


class State:
    """What changes while a service runs.

    Attributes:
      draining: whether it is ending: no new requests, and not ready.
      running: requests at work.
    """

    def __init__(self) -> None:
        self.draining, self.running = False, 0


class Gate:
    """ASGI middleware around an app.

    Args:
      app: what answers.
      service: its limits, access and observers.
      state: counts requests.
    """

    def __init__(self, app: App, service: Service, state: State) -> None:
        self.app, self.service, self.state = app, service, state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]
        }
        given, path = headers.get("x-request-id", ""), scope["path"]
        name = given if _ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"
        scope.setdefault("state", {})["request_id"] = name
        marked = _Marking(send, scope["state"])
        try:
            self._check_host(headers.get("host", ""))
            if path in ALIVE:
                return await self.app(scope, receive, marked)
            if path in WATCHED:
                return await self._pass(scope, headers, receive, marked)
            self._admit_more()
            self.state.running += 1
            try:
                await self._pass(scope, headers, receive, marked)
            finally:
                self.state.running -= 1
        except Exception as error:
            refused = refusal(error, name)
            if marked.started:  # the rest of the answer is lost
                return None
            for observer in self.service.observers:
                observer.refused(path, refused.status, name)
            await send_error(refused, marked)

    def _check_host(self, host: str) -> None:
        name = host.rsplit(":", 1)[0] if re.search(r":\d*$", host) else host
        if self.service.hosts and name.lower() not in self.service.hosts:
            message = f"this server is not called {name!r:.100}; ask it as {self.service.hosts[0]}."
            raise Refused(403, message, code="wrong_host")

    def _admit_more(self) -> None:
        most = self.service.limits.requests
        if self.state.draining:
            raise Refused(503, "this server is ending; ask another.", code="draining", retry_after=1)
        if self.state.running >= most:
            message = f"{most} requests are at work, as many as there may be; try again."
            raise Refused(429, message, code="too_many_requests", retry_after=1)

    async def _pass(self, scope: Scope, headers: dict[str, str], receive: Receive, send: Send) -> None:
        path, opened = scope["path"], OPEN + self.service.open_paths
        if path not in opened and not any(path.startswith(one) for one in opened if one[-1] == "/" != one):
            peer = (scope.get("client") or ("", 0))[0]
            client = await self.service.access.admit(headers, peer, path)
            scope["state"]["client"] = client
            needed = NEEDED.get(path)
            if needed and needed not in client.scopes:
                message = f"the key {client.name!r} has no scope {needed!r}; use one that has."
                raise Refused(403, message, code="no_scope")
        body = await self._body(headers, receive)
        await self.app(scope, _replaying(body, receive), send)

    async def _body(self, headers: dict[str, str], receive: Receive) -> bytes:
        limits, parts, size = self.service.limits, list[bytes](), 0
        too_large = Refused(
            413, f"the body has more than {limits.body_bytes:,} bytes; send less.", code="body_too_large"
        )
        if (
            headers.get("content-length", "").isdecimal()
            and int(headers["content-length"]) > limits.body_bytes
        ):
            raise too_large
        try:
            async with asyncio.timeout(limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Refused(499, "the client left.", code="client_left")
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > limits.body_bytes:
                        raise too_large
                    if not message.get("more_body"):
                        break
        except TimeoutError:
            message = f"the body did not arrive within {limits.body_seconds:g} s; send it at once."
            raise Refused(408, message, code="body_too_slow") from None
        body = b"".join(parts)
        _check(body)
        return body


def _check(body: bytes) -> None:
    """Refuse what would be read but not written: values nested too deeply, and halves of characters.

    Raises:
      UserError: it holds such.
    """
    halves = rb"\ud" in body or rb"\uD" in body
    if halves or body.count(b"[") + body.count(b"{") > _FEW:
        value = parse_json(body, Any, "the body", "mend it")
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise Refused(
                400,
                "the body holds half of a surrogate pair (\\ud800 to \\udfff); write both.",
                code="not_text",
            ) from None


class _Marking:
    """What sends, with the request's id and what its client is told among the headers."""

    def __init__(self, send: Send, state: dict[str, Any]) -> None:
        self._send, self._state, self.started = send, state, False

    async def __call__(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            client = self._state.get("client")
            more = {"x-request-id": self._state["request_id"], **(client.headers if client else {})}
            own = [(key.lower().encode("latin-1"), value.encode("latin-1")) for key, value in more.items()]
            message["headers"] = [*message.get("headers", ()), *own]
        await self._send(message)


def _replaying(body: bytes, receive: Receive) -> Receive:
    """What receives: the body at once, then what comes, which is that the client left."""
    waiting = [body]

    async def replayed() -> MutableMapping[str, Any]:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        return await receive()

    return replayed


async def send_error(refused: Refused, send: Send) -> None:
    """Answer with an error."""
    from starlette.responses import JSONResponse

    body = error_body(refused.status, str(refused), refused.code, refused.param)
    response = JSONResponse(body, refused.status, refused.headers)
    start = {"type": "http.response.start", "status": refused.status, "headers": response.raw_headers}
    await send(start)
    await send({"type": "http.response.body", "body": response.body})
