"""Web pages of named origins may ask from a browser, and no others; by default none."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import httpx
import pytest
from tiny_serving import HI, serving

from jaxgpt.errors import UserError
from jaxgpt.serve.app import make_app
from jaxgpt.serve.origins import check_origins
from jaxgpt.serve.service import Service

OURS, OTHER = "https://a.example", "https://b.example"
CHAT = "/v1/chat/completions"
BODY = {"model": "tiny", "messages": HI, "max_tokens": 3, "seed": 1}


def preflight(address: str, origin: str, method: str = "POST", path: str = CHAT) -> httpx.Response:
    """What a browser asks before a page of this origin may send what OpenAI's client sends."""
    headers = {
        "Origin": origin,
        "Access-Control-Request-Method": method,
        "Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang",
    }
    return httpx.options(address + path, headers=headers)


def allowed(headers: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name.startswith("access-control-")}


@pytest.fixture(scope="module")
def opened(service: Service) -> Iterator[str]:
    with serving(make_app(dataclasses.replace(service, origins=(OURS, "http://localhost:3000")))) as url:
        yield url


def test_by_default_no_page_may_ask(address: str) -> None:
    made = preflight(address, OURS)
    assert made.status_code == 405
    assert not allowed(made.headers)
    answer = httpx.post(address + CHAT, json=BODY, headers={"Origin": OURS}, timeout=60)
    assert answer.status_code == 200
    assert not allowed(answer.headers)


@pytest.mark.parametrize("origin", [OURS, "http://localhost:3000"])
def test_pages_of_named_origins_may(opened: str, origin: str) -> None:
    made = preflight(opened, origin)
    assert made.status_code == 200
    found = allowed(made.headers)
    assert found["access-control-allow-origin"] == origin
    assert "POST" in found["access-control-allow-methods"]
    assert "x-stainless-lang" in found["access-control-allow-headers"]
    assert "access-control-allow-credentials" not in found
    for fields in ({}, {"stream": True}, {"nope": 1}):  # an answer, a stream, an error
        answer = httpx.post(opened + CHAT, json=BODY | fields, headers={"Origin": origin}, timeout=60)
        assert answer.status_code == (400 if "nope" in fields else 200)
        assert answer.headers["access-control-allow-origin"] == origin
        assert "x-request-id" in answer.headers["access-control-expose-headers"]
        assert "Origin" in answer.headers["vary"]


def test_others_may_not(opened: str) -> None:
    for origin in (OTHER, "null", OURS + ".evil.example", "http://a.example"):
        made = preflight(opened, origin)
        assert made.status_code == 400
        assert "access-control-allow-origin" not in made.headers
        answer = httpx.post(opened + CHAT, json=BODY, headers={"Origin": origin}, timeout=60)
        assert "access-control-allow-origin" not in answer.headers
    assert preflight(opened, OURS, "DELETE").status_code == 400


def test_all_may_where_all_are_named(service: Service) -> None:
    with serving(make_app(dataclasses.replace(service, origins=("*",)))) as url:
        assert preflight(url, OTHER).headers["access-control-allow-origin"] == "*"
        answer = httpx.get(f"{url}/v1/models", headers={"Origin": OTHER})
        assert answer.headers["access-control-allow-origin"] == "*"


@pytest.mark.parametrize(
    "origin",
    [
        *("a.example", "https://", "https://a.example/", "https://a.example/chat", "https://A.example"),
        *("https://a.example:443", "http://a.example:80", "https://a.example:x", "https://a.example:0443"),
        *("https://user@a.example", "https://*.a.example", "https://a.example?b", "https://[::1", "null", ""),
        *("https://ä.example", "https://a.example:99999", "https://a.example, https://b.example"),
    ],
)
def test_what_no_browser_sends_is_refused_in_one_sentence(origin: str) -> None:
    with pytest.raises(UserError) as caught:
        check_origins([OURS, origin], keyed=True)
    assert str(caught.value).startswith(f"--origins has {origin!r}; write an origin as browsers do")
    assert "\n" not in str(caught.value)


def test_origins_are_taken_as_browsers_send_them() -> None:
    given = ["http://localhost:3000", "https://a.example:8443", "http://[::1]:8080", "app://page", "*"]
    check_origins(given, keyed=True)
    check_origins(given[:-1], keyed=False)
    with pytest.raises(UserError, match=r"^--origins is \*, so any web page could ask"):
        check_origins(["*"], keyed=False)
