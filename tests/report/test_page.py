"""A page: nothing that a model said becomes markup, and it asks the network for nothing."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markup import Parts

from jaxgpt.report import Html, chart, commands, curves, dialogues, facts, mask_picture, table, text, write
from jaxgpt.report.page import CSS

NASTY = st.text(st.sampled_from("<>&\"'/=!-;# abscript\n\t\0\ud800é一")) | st.text()
PARTS: dict[str, Callable[[str], str]] = {
    "text": lambda s: text(s, s),
    "commands": lambda s: commands("$" + s, "# " + s),
    "facts": lambda s: facts({s: s, s + "2": (s, s)}),
    "table": lambda s: table([{s: s, "n": 1}, {"n": s}], s, shares=(s, "n")),
    "dialogues": lambda s: dialogues(
        [
            [{"role": s, "content": s}],
            {"messages": [{"role": "user", "content": s}], "title": s, "ok": False, "expected": s},
        ]
    ),
    "mask of strings": lambda s: mask_picture(
        [{"pieces": ["a" + s, "<|" + s], "weights": [1, 0], "segments": [1, 2]}]
    ),
    "mask of bytes": lambda s: mask_picture(
        [{"tokens": [0], "weights": [1.0], "segments": [1]}],
        lambda token: ("b" + s).encode("utf-8", "replace"),
    ),
    "chart": lambda s: chart("t" + s, {"raw": [(0, 1.0), (1, 2.0)]}),
}


@pytest.mark.parametrize("part", PARTS)
@settings(deadline=None, max_examples=60)
@given(NASTY)
@example("</p></div></td><script>alert(1)</script>")
@example('" onload="alert(1)" x="')
@example("&lt;b&gt;<!--")
def test_no_words_become_markup(part: str, words: str) -> None:
    """The page has the elements and attributes that it has for one harmless letter."""
    words = words.replace("`", "'")  # which makes code of the words between two of them
    make = PARTS[part]
    assert Parts(make(words)).skeleton == Parts(make("x")).skeleton
    assert readable(words) in readable(Parts(make(words)).words)  # and they are all there to be read


def readable(words: str) -> str:
    """Printable ASCII without whitespace, which is marked; half of a surrogate pair is a question mark."""
    return re.sub("[^!-~]", "", words.encode("utf-8", "replace").decode())


@settings(deadline=None, max_examples=30)
@given(NASTY)
@example("</title><script>alert(1)</script>")
def test_a_page_escapes_its_title_headings_and_bare_strings(
    tmp_path_factory: pytest.TempPathFactory, words: str
) -> None:
    words = words.replace("`", "'")

    def page(words: str) -> Parts:
        path = write(tmp_path_factory.getbasetemp() / "page.html", words, [(words, words)])
        return Parts(path.read_text("utf-8"))

    parts = page(words)
    assert parts.skeleton == page("x").skeleton
    assert readable(parts.words).count(readable(words)) >= 4  # in the title twice, heading, paragraph


def test_what_is_html_goes_onto_the_page_as_it_is() -> None:
    assert Parts(facts({"a": Html("<i>b</i>")})).of("i") == [{}]
    assert Parts(text("run `a <b>` now")).of("code") == [{}]
    assert Parts(text("run `a <b>` now")).words == "run a <b> now"


def test_control_characters_and_lone_surrogates_can_be_written(tmp_path: Path) -> None:
    page = write(tmp_path / "r.html", "a\ud800\0<b>", [("h\x1b<i>", "p\ud800<u>")])
    parts = Parts(page.read_text("utf-8"))
    assert not parts.of("b") + parts.of("i") + parts.of("u")
    assert "a?\ufffd<b>" in parts.words
    assert not re.search("[\x00-\x08\x0b-\x1f]", page.read_text("utf-8"))


# ------------------------------------------------------------------------------------- the page


def full_page(folder: Path) -> str:
    records = [{"step": i, "loss": 5 - i / 9, "val_loss": 4.0, "grad_norm": 1.0} for i in range(9)]
    sections = [(name, make("x")) for name, make in PARTS.items()] + [("Curves", curves(records))]
    return write(folder / "report.html", "T", sections).read_text("utf-8")


def test_the_page_needs_no_network_and_runs_nothing(tmp_path: Path) -> None:
    page = full_page(tmp_path)
    parts = Parts(page)
    assert not {"script", "link", "img", "iframe", "object", "base", "a"} & {tag for tag, _ in parts.elements}
    for _, attributes in parts.elements:
        assert not {"src", "href", "srcset", "action"} & set(attributes)
        assert not any(name.startswith("on") for name in attributes)
    assert not re.search(r"https?://|url\(|@import|javascript:", page)
    (policy,) = [a for a in parts.of("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy["content"] == "default-src 'none';style-src 'unsafe-inline'"


def test_the_page_is_closed_where_it_is_opened(tmp_path: Path) -> None:
    open_tags: list[str] = []
    for end, tag in re.findall(r"<(/?)([a-z0-9]+)[^>]*>", full_page(tmp_path).replace(CSS, "")):
        if end:
            assert open_tags.pop() == tag
        elif tag != "meta":
            open_tags.append(tag)
    assert open_tags == []


def test_a_page_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    page = write(tmp_path / "r.html", "first", [("h", "p")])
    before = page.read_bytes()

    def broken():
        yield "h", "p"
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        write(page, "second", broken())
    assert page.read_bytes() == before
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        write(tmp_path / "folder", "cannot be replaced by a file", [])
    assert {p.name for p in tmp_path.iterdir()} == {"r.html", "folder"}  # and nothing half-written
    write(page, "second", [])
    assert "second" in page.read_text("utf-8")
