"""`jaxgpt serve RUN`: the server's process, from its first line to its drain."""

from __future__ import annotations

import dataclasses
import ipaddress
import logging
import socket
import sys
import time
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from jaxgpt.config.bounds import Bounds, bounded
from jaxgpt.errors import UserError, require
from jaxgpt.serve.opening import FLAT, Options, open_service

if TYPE_CHECKING:
    from jaxgpt.serve.gate import State
    from jaxgpt.serve.service import Service

log = logging.getLogger(__name__)

Folder = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
DEFAULT = Options()
OWN_NAMES = ("localhost", "127.0.0.1", "[::1]")
"""Hosts by which a server without keys may be asked: else a web page could ask it by a name of its own."""


@bounded
def serve(
    run: Folder,
    *,
    host: str = "127.0.0.1",
    port: Annotated[int, Bounds(0, 65535)] = 8000,
    log_format: Literal["text", "json"] = "text",
    options: Annotated[Options, FLAT] = DEFAULT,
) -> None:
    """Answer requests over HTTP as OpenAI's API does, many at a time, with a page at `/`.

    SIGTERM and Ctrl-C drain: `/ready` says 503, new requests are refused, those that run are answered. A
    second one ends at once.

    Args:
      run: folder of a run, or of a Hugging Face model.
      host: address to listen on; any but this machine's own needs keys.
      port: to listen on; 0 takes any that is free.
      log_format: lines for people, or JSON objects.
      options: of the service.

    Raises:
      UserError: what is asked does not fit the model or this machine, or the port is taken.
    """
    require(
        bool(options.keys) or _is_own(host),
        f"--host is {host!r}, so others could ask, but there are no keys; add --keys FILE (`jaxgpt serve "
        "keys add` makes one), or listen on 127.0.0.1.",
    )
    _require_installed()
    if log_format == "json":
        from jaxgpt.serve.logs import log_json

        log_json()
    with _listen(host, port) as bound, open_service(run, options) as service:
        run_server(service, bound, host)


def run_server(service: Service, bound: socket.socket, host: str) -> None:
    """Serve on a bound socket until a signal ends it.

    Args:
      service: what answers.
      bound: to listen on.
      host: as it was asked for.
    """
    import uvicorn

    from jaxgpt.serve.app import make_app

    if not service.access.keyed:
        service = dataclasses.replace(service, hosts=OWN_NAMES)
    app = make_app(service)
    settings = uvicorn.Config(
        app, log_config=None, access_log=False, server_header=False, timeout_graceful_shutdown=1
    )
    port, shown = bound.getsockname()[1], f"[{host}]" if ":" in host else host
    whom = "who has a key" if service.access.keyed else "this machine alone, as there are no keys"
    print(f"{service.name} answers {whom}: http://{shown}:{port}/ and /v1", file=sys.stderr, flush=True)
    _draining(settings, app.state.run, service.limits.drain_seconds).run(sockets=[bound])


def _draining(settings: Any, state: State, seconds: float) -> Any:
    """A server that ends after what runs."""
    import uvicorn

    class Draining(uvicorn.Server):
        until = float("inf")

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if state.draining:
                self.should_exit = self.force_exit = True
                return
            log.info("draining: %d requests at work", state.running)
            state.draining, self.until = True, time.monotonic() + seconds

        async def on_tick(self, counter: int) -> bool:
            if state.draining and (state.running == 0 or time.monotonic() > self.until):
                self.should_exit = True
            return await super().on_tick(counter)

    return Draining(settings)


def _listen(host: str, port: int) -> socket.socket:
    """A bound socket.

    Raises:
      UserError: it cannot be.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        why = error.strerror or str(error)
        raise UserError(
            f"--host {host} --port {port} cannot be used ({why}); name another, or --port 0 for any."
        ) from None


def _is_own(host: str) -> bool:
    """Whether an address is this machine's alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _require_installed() -> None:
    try:
        import fastapi
        import uvicorn  # noqa: F401

        assert fastapi
    except ImportError:
        raise UserError(
            "serving needs FastAPI and uvicorn, which are not installed; run `pip install 'jaxgpt[serve]'`."
        ) from None
