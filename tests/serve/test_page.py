"""The page's files: what a browser is told of them, and how they show what a model writes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from browser import chromium
from fastapi import FastAPI
from fastapi.testclient import TestClient
from tiny_serving import serving

from jaxgpt.serve.page import FOLDER, HEADERS, page_router


def an_app() -> FastAPI:
    app = FastAPI()
    app.include_router(page_router())
    return app


@pytest.fixture(scope="module")
def page() -> Iterator[Any]:
    with serving(an_app()) as address, chromium() as browser:
        page = browser.new_page()
        page.goto(address)
        yield page


def test_every_file_comes_with_its_rules_and_only_once() -> None:
    client = TestClient(an_app())
    for path in ("/", *(f"/page/{file.name}" for file in FOLDER.iterdir())):
        answer = client.get(path)
        assert answer.status_code == 200
        assert {name: answer.headers[name] for name in HEADERS} == HEADERS
        assert client.get(path, headers={"If-None-Match": answer.headers["etag"]}).status_code == 304
        assert client.head(path).headers["content-length"] == str(len(answer.content))
    for path in ("/page/none.js", "/page/..%2fpage.py", "/page/%2e%2e%2fpage.py"):
        assert client.get(path).status_code == 404


def test_the_page_needs_nothing_from_elsewhere() -> None:
    for file in FOLDER.iterdir():
        text = file.read_text("utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"(src|href|url|from|import)\W{0,3}(https?:)?//\w", text), file.name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text), (
            file.name
        )


def test_no_text_becomes_markup_whatever_code_tries(page: Any) -> None:
    refused = page.evaluate("() => { try { document.body.innerHTML = '<b>'; } catch (e) { return e.name; } }")
    assert refused == "TypeError"
    assert page.evaluate("fetch('http://localhost:1/').catch((e) => 'refused')") == "refused"


SHOW = """async ([text, steps]) => {
  const { show } = await import("/page/markdown.js");
  const element = document.createElement("div");
  for (let i = 1; i < steps; i += 1) show(element, text.slice(0, (text.length * i) / steps));
  show(element, text);
  for (const head of element.querySelectorAll("header")) head.remove();
  return element.innerHTML;
}"""
CODE = '<div class="code"><pre tabindex="0"><code>{}</code></pre></div>'.format
LINK = '<a href="https://a.b/c" target="_blank" rel="noopener noreferrer">{}</a>'.format
SHOWN = {
    "plain": "<p>plain</p>",
    "two\nlines\n\nand more": "<p>two\nlines</p><p>and more</p>",
    "# Head\ntext": "<h3>Head</h3><p>text</p>",
    "**bold _both_** *it* ~~no~~ `a*b*`": "<p><strong>bold <em>both</em></strong> <em>it</em> <del>no</del> "
    "<code>a*b*</code></p>",
    "2 * 3 * 4, snake_case_name, \\*no\\*": "<p>2 * 3 * 4, snake_case_name, *no*</p>",
    "**never closed": "<p>**never closed</p>",
    "```py\nx = '**'\n\ny\n```\nend": CODE("x = '**'\n\ny") + "<p>end</p>",
    "```\nstill open": CODE("still open"),
    "````\n```\n````": CODE("```"),
    "- a\n- b\n  - c\n\n  d\n\nend": "<ul><li><p>a</p></li><li><p>b</p><ul><li><p>c</p></li></ul>"
    "<p>d</p></li></ul><p>end</p>",
    "3. a\n4) b": '<ol start="3"><li><p>a</p></li><li><p>b</p></li></ol>',
    "> a\n> > b": "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote>",
    "a\n\n---": "<p>a</p><hr>",
    "<think>\na\n\nb\n</think>\n\nc": '<details class="thought"><summary>Thoughts</summary><p>a</p><p>b</p>'
    "</details><p>c</p>",
    "<think>a\n- b": '<details class="thought" open=""><summary>Thoughts</summary><p>a</p>'
    "<ul><li><p>b</p></li></ul></details>",
    "|a|b|\n|-|-|\n|1|`2`|": '<div class="table" tabindex="0"><table>'
    "<thead><tr><th>a</th><th>b</th></tr></thead><tbody><tr><td>1</td><td><code>2</code></td></tr></tbody></table></div>",
    "see [*it*](https://a.b/c).": f"<p>see {LINK('<em>it</em>')}.</p>",
    "(https://a.b/c)": f"<p>({LINK('https://a.b/c')})</p>",
    "[x](javascript:alert(1))": "<p>[x](javascript:alert(1))</p>",
    "[x](https://a.b/c_(d))": f"<p>{LINK('x')}</p>".replace("/c", "/c_(d)"),
    "![x](https://a.b/c)": f"<p>!{LINK('x')}</p>",
    "<img src=x onerror=alert(1)>": "<p>&lt;img src=x onerror=alert(1)&gt;</p>",
    '[x](https://a.b/c"onclick="x)': f'<p>[x]({LINK("https://a.b/c")}"onclick="x)</p>',
    "": "",
}


@pytest.mark.parametrize("text", SHOWN)
def test_markdown(page: Any, text: str) -> None:
    assert page.evaluate(SHOW, [text, 1]) == SHOWN[text]


def test_a_growing_text_is_shown_like_a_whole_one(page: Any) -> None:
    text = "\n\n".join(SHOWN)
    assert page.evaluate(SHOW, [text, len(text)]) == page.evaluate(SHOW, [text, 1])


def test_hostile_texts_are_shown_in_time(page: Any) -> None:
    for unit in ("**a ", "`", "[", "> ", "- ", "|", "_a", "#" * 7 + " ", "  - x\n"):
        page.evaluate(SHOW, [unit * 5000, 1])


ALIGN = """async ([text, tokens]) => {
  const { show } = await import("/page/markdown.js");
  const { writer } = await import("/page/tokens.js");
  const element = document.createElement("div");
  const known = tokens.map((token) => ({ logprob: -1, n: token.length, top: [] }));
  show(element, text, writer({ tokens: known }));
  const spans = [...element.querySelectorAll(".token")];
  return spans.map((span) => [Number(span.dataset.token), span.textContent]);
}"""


def test_tokens_are_found_under_what_is_shown(page: Any) -> None:
    tokens = ["A **", "bo", "ld** ", "\\*", "\n", "\n- i", "tem\n- ", "`co", "de`"]
    found = page.evaluate(ALIGN, ["".join(tokens), tokens])
    assert found == [
        [0, "A "],
        [1, "bo"],
        [2, "ld"],
        [2, " "],
        [3, "*"],
        [5, "i"],
        [6, "tem"],
        [7, "co"],
        [8, "de"],
    ]
