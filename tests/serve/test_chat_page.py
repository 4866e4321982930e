"""The chat page in a real browser, on a real server of a tiny model."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from browser import chromium
from tiny_serving import CONTEXT, serving, tiny_model

from jaxgpt.config import Batching
from jaxgpt.sample.constrained import regex
from jaxgpt.sample.engine import Engine, Handle
from jaxgpt.sample.request import Emit, Piece, Request
from jaxgpt.serve.access import KeyAccess
from jaxgpt.serve.app import make_app
from jaxgpt.serve.keys import KeyFile, Keys, make_key, write_keys
from jaxgpt.serve.page import page_router
from jaxgpt.serve.quotas import MemoryQuotas
from jaxgpt.serve.seams import Exchange, Knowledge, NoDocuments, Unfiltered
from jaxgpt.serve.service import Service

pytest.importorskip("playwright.sync_api")
from playwright.sync_api import Locator, Page, expect

LETTERS = regex("[a-z ]{400,}")


class Paced(Engine):
    """An engine whose answers are letters without an end, with a pause before each that leaves time to
    stop."""

    pause = 0.0

    def submit(self, request: Request, emit: Emit) -> Handle:
        def later(piece: Piece) -> None:
            time.sleep(self.pause)
            emit(piece)

        return super().submit(replace(request, rule=LETTERS), later)


@pytest.fixture(scope="module")
def engine() -> Iterator[Paced]:
    with Paced(tiny_model().generator, Batching(slots=4, page=16, chunk=32, queue=8)) as engine:
        yield engine


@pytest.fixture(autouse=True)
def quick(browser: Any, engine: Paced) -> None:
    engine.pause = 0.0


def app(engine: Paced, **seams: Any) -> Any:
    routers = (page_router(),)
    return make_app(Service(name="tiny", model=tiny_model(), engine=engine, routers=routers, **seams))


@pytest.fixture(scope="module")
def address(engine: Paced) -> Iterator[str]:
    with serving(app(engine)) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Page]:
    """The page in a new profile, at a seed, with short answers; nothing may go wrong in its scripts."""
    context = browser.new_context(viewport={"width": 1200, "height": 800})
    page = context.new_page()
    wrong = list[str]()
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda said: "Security Policy" in said.text and wrong.append(said.text))
    page.goto(address)
    page.locator("#open-settings").click()
    page.locator("#seed").fill("1")
    page.locator("#max_tokens").fill("12")
    page.locator("#settings .close").click()
    yield page
    context.close()
    assert not wrong


def ask(page: Page, text: str) -> Locator:
    """Ask and wait for the answer; its turn."""
    page.get_by_label("Message").fill(text)
    page.keyboard.press("Enter")
    return answered(page)


def answered(page: Page) -> Locator:
    """The last turn, once it is whole."""
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()
    expect(page.locator(".turn").last.locator(".bar")).to_be_visible()
    return page.locator(".turn").last


def said(turn: Locator) -> str:
    return turn.locator(".body").inner_text()


def kept(page: Page) -> Any:
    """The only conversation that the browser keeps."""
    return page.evaluate("JSON.parse(Object.entries(localStorage).find(([key]) => key.includes('tion.'))[1])")


def test_a_conversation_outlives_a_reload(page: Page) -> None:
    first = said(ask(page, "What is a tuple?"))
    expect(page.locator(".stats").last).to_contain_text("tokens/s")
    ask(page, "<b>And a list?</b>")
    assert page.locator(".turn .body").count() == 4
    assert page.get_by_label("Message").input_value() == ""
    before = page.locator(".turn .body").all_inner_texts()
    assert before[:3] == ["What is a tuple?", first, "<b>And a list?</b>"]
    expect(page).to_have_title("What is a tuple? · jaxgpt")
    page.reload()
    expect(page.locator(".turn .body")).to_have_count(4)
    assert page.locator(".turn .body").all_inner_texts() == before
    assert page.locator("#seed").input_value() == "1"
    assert page.locator(".token").count() > 0


def test_the_same_seed_says_the_same_as_the_interface(page: Page, address: str) -> None:
    turn = ask(page, "Hi")
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "seed": 1, "max_tokens": 12}
    answer = page.request.post(f"{address}/v1/chat/completions", data=body).json()
    stored = kept(page)
    assert stored["turns"][1]["content"] == answer["choices"][0]["message"]["content"]
    tokens = stored["turns"][1]["tokens"]
    assert len(tokens) == answer["usage"]["completion_tokens"]
    assert sum(token["n"] for token in tokens) >= len(stored["turns"][1]["content"].encode("utf-16-le")) // 2
    assert all(len(token["top"]) == 5 for token in tokens)
    turn.locator(".token").first.hover()
    expect(page.get_by_role("tooltip")).to_contain_text("%")
    assert page.get_by_role("tooltip").locator("tr.own").count() == 1


def test_going_on_from_the_text(page: Page, address: str) -> None:
    page.locator("#open-settings").click()
    page.get_by_label("Go on from the text").check()
    ask(page, "Once upon ")
    ask(page, " and then")
    *before, last = [turn["content"] for turn in kept(page)["turns"]]
    body = {"model": "tiny", "prompt": "".join(before), "seed": 1, "max_tokens": 12}
    answer = page.request.post(f"{address}/v1/completions", data=body).json()
    assert last == answer["choices"][0]["text"]
    assert page.locator(".token").count() > 10


def test_stop(page: Page, engine: Paced) -> None:
    engine.pause = 0.03
    page.locator("#max_tokens").evaluate(
        "(field) => { field.value = ''; field.dispatchEvent(new Event('input')); }"
    )
    page.get_by_label("Message").fill("Go on")
    page.keyboard.press("Enter")
    expect(page.locator(".token").nth(5)).to_be_visible()
    assert engine.load().running == 1
    page.get_by_role("button", name="Stop", exact=True).click()
    turn = answered(page)
    expect(turn.locator(".stats")).to_contain_text("Stopped")
    shown = said(turn)
    until = time.monotonic() + 20
    while engine.load().running and time.monotonic() < until:
        time.sleep(0.02)
    assert engine.load().running == 0, "the client left, so its slot is free"
    assert said(turn) == shown
    ask(page, "Again")
    assert page.locator(".turn").count() == 4


def test_a_page_that_is_left_keeps_what_has_come(page: Page, engine: Paced) -> None:
    engine.pause = 0.03
    page.get_by_label("Message").fill("Go on")
    page.keyboard.press("Enter")
    expect(page.locator(".token").nth(5)).to_be_visible()
    page.reload()
    expect(page.locator(".stats")).to_contain_text("Interrupted")
    assert said(page.locator(".turn").last)


def test_an_error_is_said_in_words_and_tried_again(browser: Any, engine: Paced) -> None:
    context = browser.new_context()
    with serving(app(engine)) as address:
        page = context.new_page()
        page.goto(address)
        turn = ask(page, "x" * CONTEXT)
        expect(turn.get_by_role("alert")).to_contain_text(re.compile("tokens"))
        expect(turn.get_by_role("button", name="Try again")).to_be_visible()
        page.get_by_role("button", name="New conversation").click()
    turn = ask(page, "Are you there?")
    expect(turn.get_by_role("alert")).to_contain_text("cannot be reached")
    with serving(app(engine), int(address.rsplit(":", 1)[1])):
        turn.get_by_role("button", name="Try again").click()
        answered(page)
        expect(page.locator(".turn").last.locator(".body")).not_to_be_empty()
        assert page.get_by_role("alert").count() == 0
        assert page.locator(".turn").count() == 2
    context.close()


def test_an_edit_and_a_second_answer_lose_nothing(page: Page) -> None:
    old = said(ask(page, "One"))
    ask(page, "Two")
    page.locator(".turn").first.hover()
    page.locator(".turn").first.get_by_role("button", name="Edit").click()
    page.get_by_label("Text of this turn").fill("Uno")
    page.get_by_role("button", name="Send", exact=True).first.click()
    answered(page)
    assert page.locator(".user .body").all_inner_texts() == ["Uno"]
    page.get_by_role("button", name="Answer again").click()
    expect(page.locator(".assistant .versions")).to_have_text("2 / 2")
    answered(page)
    page.locator(".user").get_by_role("button", name="Version before").click()
    assert page.locator(".user .body").all_inner_texts() == ["One", "Two"]
    assert said(page.locator(".turn").nth(1)) == old
    page.locator(".turn").last.get_by_role("button", name="Edit").click()
    page.get_by_label("Text of this turn").fill("I *say* three.")
    page.get_by_role("button", name="Save").click()
    expect(page.locator(".turn em")).to_have_text("say")
    ask(page, "Four")
    sent = kept(page)["turns"]
    assert sent[sent[-2]["parent"]]["content"] == "I *say* three."


def test_keyboard_alone(page: Page) -> None:
    page.reload()
    page.keyboard.type("First")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("line")
    page.keyboard.press("Enter")
    answered(page)
    assert page.locator(".user .body").inner_text() == "First\nline"
    page.keyboard.press("ArrowUp")  # edits the last question
    page.keyboard.type("!")
    page.keyboard.press("Control+Enter")
    answered(page)
    assert page.locator(".user .versions").inner_text().split() == ["2", "/", "2"]
    page.keyboard.press("Shift+Tab")  # from the message field to the last button of the answer
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "Token probabilities"
    page.keyboard.press("Enter")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("tooltip")).to_be_visible()
    assert "%" in (page.locator("#status").text_content() or "")
    page.keyboard.press("Alt+n")
    expect(page.locator(".turn")).to_have_count(0)
    page.keyboard.type("Second")
    page.keyboard.press("Enter")
    answered(page)
    names = page.locator("#list a span")
    assert names.all_inner_texts() == ["Second", "First"]
    page.locator("#list a").last.focus()
    page.keyboard.press("F2")
    page.keyboard.type("Renamed")
    page.keyboard.press("Enter")
    assert names.all_inner_texts() == ["Second", "Renamed"]
    page.keyboard.press("Delete")
    assert names.all_inner_texts() == ["Second"]
    page.get_by_role("button", name="Undo").focus()
    page.keyboard.press("Enter")
    assert sorted(names.all_inner_texts()) == ["Renamed", "Second"]
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "prompt"


def test_export_and_import(page: Page, tmp_path: Path) -> None:
    ask(page, "Keep this")
    with page.expect_download() as download:
        page.get_by_role("button", name="Export").click()
    file = tmp_path / "kept.json"
    download.value.save_as(file)
    page.get_by_role("button", name="Delete").click()
    expect(page.locator("#list li")).to_have_count(0)
    hostile = {"id": "x", "title": "<img src=x onerror=alert(1)>", "turns": [], "settings": {}, "chosen": {}}
    exported = json.loads(file.read_text())
    exported["conversations"].append(hostile)
    file.write_text(json.dumps(exported))
    page.locator("#file").set_input_files(file)
    expect(page.locator("#list a")).to_have_count(2)
    expect(page.locator(".user .body")).to_have_text("Keep this")
    file.write_text('{"conversations": [{"id": 1}]}')
    page.locator("#file").set_input_files(file)
    expect(page.locator(".toast")).to_contain_text("no conversations exported from this page")
    assert page.locator("#list a").count() == 2


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone(browser: Any, address: str, scheme: str) -> None:
    size = {"width": 360, "height": 640}
    context = browser.new_context(viewport=size, has_touch=True, is_mobile=True, color_scheme=scheme)
    page = context.new_page()
    page.goto(address)
    ask(page, f"{'long' * 60} `code` {'word ' * 20}")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    page.locator("#open-conversations").click()
    expect(page.locator("#list a")).to_be_visible()
    assert page.locator("main").evaluate("(main) => main.inert")
    page.keyboard.press("Escape")
    expect(page.locator("#conversations")).to_be_hidden()
    page.locator("#open-settings").click()
    page.locator("#system").fill("Be short.")
    page.locator("#settings .close").click()
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    color = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (color == "rgb(255, 255, 255)") == (scheme == "light")
    context.close()


class Masked(Unfiltered):
    """Filters that may change answers, so that log-probabilities are refused."""

    changes_output = True


class Shop(NoDocuments):
    """One passage, whatever is asked."""

    def find(self, exchange: Exchange, messages: list[dict[str, Any]]) -> Knowledge:
        source = {"number": 1, "title": "Returns", "source": "shop.md", "text": "Within <b>30</b> days."}
        return Knowledge(messages, sources=[source])


def test_a_server_with_keys_filters_and_documents(browser: Any, engine: Paced, tmp_path: Path) -> None:
    key, entry = make_key("alice")
    write_keys(tmp_path / "keys.json", KeyFile(keys=(entry,)))
    access = KeyAccess(Keys(str(tmp_path / "keys.json")), MemoryQuotas())
    context = browser.new_context()
    page = context.new_page()
    with serving(app(engine, access=access, filters=Masked(), documents=Shop())) as address:
        page.goto(address)
        expect(page.get_by_role("alert")).to_contain_text("wants an API key")
        page.get_by_role("button", name="Enter a key").click()
        page.keyboard.type(key)
        page.keyboard.press("Enter")
        expect(page.locator("#notice")).to_be_hidden()
        page.locator("#max_tokens").fill("8")
        turn = ask(page, "May I return it?")
        assert turn.locator(".token").count() == 0, "asked again without log-probabilities"
        expect(turn.locator(".body")).not_to_be_empty()
        turn.get_by_text("Returns").click()
        expect(turn.locator(".sources p")).to_have_text("Within <b>30</b> days.")
    stores = page.evaluate("[JSON.stringify(localStorage), JSON.stringify(sessionStorage)]")
    assert key not in stores[0] and key in stores[1], "the key is forgotten with its tab"
    context.close()
