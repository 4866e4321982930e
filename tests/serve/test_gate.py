"""What a request passes before its endpoint, and what a client that leaves or a server that ends changes."""

from __future__ import annotations

import dataclasses
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import httpx
import pytest
from tiny_serving import HI, serving

from jaxgpt.sample.engine import Engine
from jaxgpt.serve.app import make_app
from jaxgpt.serve.errors import Refused
from jaxgpt.serve.gate import State
from jaxgpt.serve.limits import Limits
from jaxgpt.serve.seams import Client, Usage
from jaxgpt.serve.service import Service

LONG: dict[str, Any] = {
    "model": "tiny",
    "messages": HI,
    "temperature": 1.0,
    "response_format": {"type": "regex", "regex": "a{900}"},
}
"""Makes a long answer."""


def error_of(response: httpx.Response) -> Any:
    return response.json()["error"]


def post(address: str, path: str = "/v1/chat/completions", **options: Any) -> httpx.Response:
    return httpx.post(address + path, timeout=60, **options)


def streaming(address: str, **fields: Any) -> Any:
    """A streamed answer."""
    body = LONG | {"stream": True} | fields
    return httpx.stream("POST", f"{address}/v1/chat/completions", json=body, timeout=60)


def until(condition: Any, seconds: float = 30.0) -> None:
    """Wait until something is so."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nope", 404),
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("GET", "/v1/models/nope", 404),
    ],
)
def test_unknown_addresses_are_told_in_openais_form(
    address: str, method: str, path: str, status: int
) -> None:
    response = httpx.request(method, address + path)
    assert response.status_code == status
    assert error_of(response)["type"] == "invalid_request_error"
    assert response.headers["x-request-id"].startswith("req-")


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"", 400, None),
        (b"{", 400, "not_json"),
        (b"[1]", 400, None),
        (b"\xff\xfe", 400, "not_json"),
        (b'{"model": NaN}', 400, None),
        (b'{"model": "\\ud800"}', 400, "not_text"),
        (b"[" * 5000, 400, None),
        (b'{"a":' * 5000 + b"1" + b"}" * 5000, 400, None),
        (b" " * (4 * 2**20 + 1), 413, "body_too_large"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_no_body_makes_the_server_fail(address: str, body: bytes, status: int, code: str | None) -> None:
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/tokenize", "/score"):
        response = post(address, path, content=body, headers={"content-type": "application/json"})
        assert response.status_code == status
        assert code is None or error_of(response)["code"] == code
        assert "\n" not in error_of(response)["message"]


@pytest.mark.parametrize(
    ("body", "header", "words"),
    [
        (b'{"model": "tiny"}', "text/plain", "send the header Content-Type: application/json."),
        (b'{"model": "tiny"}', "application/x-www-form-urlencoded", "send the header Content-Type"),
        (b"[1]", "application/json", "the body is [1]; send one JSON object."),
        (b'{"model": "\xe9"}', "application/json", "the body is not JSON in UTF-8; send one JSON object."),
    ],
)
def test_what_is_wrong_with_a_body_is_told(address: str, body: bytes, header: str, words: str) -> None:
    response = post(address, content=body, headers={"content-type": header})
    assert response.status_code == 400
    assert words in error_of(response)["message"]


def test_a_body_that_lies_about_its_size_is_cut(address: str) -> None:
    def parts() -> Iterator[bytes]:
        for _ in range(80):
            yield b" " * 2**16

    assert post(address, content=parts()).status_code == 413


def test_a_request_keeps_the_id_that_it_brings(address: str) -> None:
    own = httpx.get(address + "/v1/models", headers={"x-request-id": "mine-1"})
    assert own.headers["x-request-id"] == "mine-1"
    bad = httpx.get(address + "/v1/models", headers={"x-request-id": "a b\tc"})
    assert bad.headers["x-request-id"].startswith("req-")


def test_a_body_that_comes_too_slowly_ends(service: Service) -> None:
    slow = dataclasses.replace(service, limits=Limits(body_seconds=0.2))
    with serving(make_app(slow)) as address, socket.create_connection(address[7:].split(":")) as wire:
        wire.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{")
        wire.settimeout(20)
        assert b" 408 " in wire.recv(4096)


def test_an_answer_that_takes_too_long_ends_and_frees_its_slot(service: Service, engine: Engine) -> None:
    slow = dataclasses.replace(service, limits=Limits(seconds=0.1))
    with serving(make_app(slow)) as address:
        response = post(address, json=LONG)
        assert (response.status_code, error_of(response)["code"]) == (504, "timeout")
        with streaming(address) as made:
            assert made.status_code == 200
            lines = [line for line in made.iter_lines() if line]
        assert '"code":"timeout"' in lines[-2]
        assert lines[-1] == "data: [DONE]"
    until(lambda: engine.load().running == 0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot(address: str, engine: Engine, stream: bool) -> None:
    host = address.removeprefix("http://")
    body = httpx.Request("POST", address, json=LONG | {"stream": stream, "n": 2}).content
    lines = ("POST /v1/chat/completions HTTP/1.1", f"Host: {host}", f"Content-Length: {len(body)}")
    head = "\r\n".join([*lines, "Content-Type: application/json", "", ""])
    before = engine.load().new_tokens
    with socket.create_connection(host.split(":")) as wire:
        wire.sendall(head.encode() + body)
        until(lambda: engine.load().running == 2)
    until(lambda: engine.load().running == 0)
    assert engine.load().new_tokens - before < 2000
    assert httpx.get(address + "/health").status_code == 200


def test_a_full_queue_says_when_to_try_again(address: str, engine: Engine) -> None:
    answers = list[httpx.Response]()

    def ask() -> None:
        answers.append(post(address, json=LONG | {"max_tokens": 200}))

    threads = [threading.Thread(target=ask) for _ in range(24)]  # of 4 slots and 8 places
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    statuses = {response.status_code for response in answers}
    assert statuses == {200, 429}
    for response in answers:
        if response.status_code == 429:
            assert error_of(response)["type"] == "rate_limit_error"
            assert int(response.headers["retry-after"]) >= 1
    whole = {r.json()["choices"][0]["message"]["content"] for r in answers if r.status_code == 200}
    assert whole == {"a" * 200}


def test_requests_at_a_time_are_limited(service: Service) -> None:
    few, state = dataclasses.replace(service, limits=Limits(requests=1)), State()
    with serving(make_app(few, state)) as address:
        state.running += 1
        full = httpx.get(address + "/v1/models")
        assert (full.status_code, full.headers["retry-after"]) == (429, "1")
        assert httpx.get(address + "/ready").status_code == 200
        state.running -= 1
        assert post(address, json=LONG | {"max_tokens": 3}).status_code == 200
        until(lambda: state.running == 0)


def test_a_failed_request_hurts_no_other(service: Service, address: str) -> None:
    """An answer whose filter fails is the only one to fail."""

    class Broken:
        changes_output, stopped = True, ""

        def open(self, exchange: Any) -> Any:
            return self

        def enter(self, passages: Any) -> list[str]:
            if any("break" in passage.text for passage in passages):
                raise ZeroDivisionError
            return [passage.text for passage in passages]

        def leave(self) -> Any:
            return self

        def feed(self, text: str) -> str:
            return text

        def flush(self) -> str:
            return ""

        def close(self, status: int = 0) -> None:
            pass

    with serving(make_app(dataclasses.replace(service, filters=Broken()))) as broken:
        with streaming(broken, max_tokens=100) as made:
            bad = post(broken, json=LONG | {"messages": [{"role": "user", "content": "break"}]})
            assert (bad.status_code, error_of(bad)["type"]) == (500, "server_error")
            assert "ZeroDivision" not in bad.text
            assert sum('"content":"a' in line for line in made.iter_lines()) > 10
        hidden = post(broken, json=LONG | {"logprobs": True})
        assert (hidden.status_code, error_of(hidden)["param"]) == (400, "logprobs")


class Keyed:
    """One key, for completions alone; counts what is spent."""

    keyed = True

    def __init__(self) -> None:
        self.reserved, self.spent = list[int](), list[Usage]()

    async def admit(self, headers: Mapping[str, str], peer: str, path: str) -> Client:
        if headers.get("authorization") != "Bearer sesame":
            raise Refused(401, "no key.", code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        return Client("ali", frozenset({"generate"}), {"x-ratelimit-remaining-requests": "7"})

    async def reserve(self, client: Client, tokens: int) -> None:
        self.reserved.append(tokens)

    async def spend(self, client: Client, usage: Usage) -> None:
        self.spent.append(usage)

    async def close(self) -> None:
        pass


def test_keys_are_asked_for_before_anything_is_read(service: Service) -> None:
    access = Keyed()
    with serving(make_app(dataclasses.replace(service, access=access))) as address:
        assert httpx.get(address + "/health").status_code == 200
        assert post(address, content=b"x" * 2**23).status_code == 401
        none = post(address, json=LONG)
        assert (none.status_code, none.headers["www-authenticate"]) == (401, "Bearer")
        assert error_of(none)["type"] == "authentication_error"
        key = {"authorization": "Bearer sesame"}
        made = post(address, json=LONG | {"max_tokens": 5}, headers=key)
        assert made.headers["x-ratelimit-remaining-requests"] == "7"
        assert access.reserved == [11]
        assert access.spent == [Usage(6, 5)]
        body = {"model": "tiny", "input": "a"}
        other = post(address, "/v1/embeddings", json=body, headers=key)
        assert (other.status_code, error_of(other)["code"]) == (403, "no_scope")


def test_a_server_without_keys_answers_to_its_own_names_alone(service: Service) -> None:
    with serving(make_app(dataclasses.replace(service, hosts=("localhost", "127.0.0.1")))) as address:
        assert httpx.get(address + "/v1/models").status_code == 200
        assert httpx.get(address + "/v1/models", headers={"host": "evil.example:8000"}).status_code == 403


def test_a_draining_server_takes_nothing_new(service: Service) -> None:
    state = State()
    with serving(make_app(service, state)) as address:
        with streaming(address, max_tokens=300) as made:
            state.draining = True
            assert httpx.get(address + "/ready").status_code == 503
            assert httpx.get(address + "/health").status_code == 200
            assert post(address, json=LONG).status_code == 503
            assert [*made.iter_lines()][-2] == "data: [DONE]"
        until(lambda: state.running == 0)
