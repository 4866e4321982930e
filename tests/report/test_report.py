"""The report: nothing that a model said becomes markup, nothing missing breaks a curve, and the page
asks the network for nothing."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxgpt.report import (
    CSS,
    Html,
    axis,
    chart,
    commands,
    curves,
    dialogues,
    downsample,
    facts,
    mask_picture,
    points,
    read_metrics,
    run_report,
    smooth,
    table,
    text,
    write,
)

NAN = float("nan")


class Parts(HTMLParser):
    """What a browser would see: elements with their attributes, and the words between them."""

    def __init__(self, markup: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.ends: list[str] = []
        self.words = ""
        self.feed(markup)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        self.ends.append(tag)

    def handle_data(self, data: str) -> None:
        self.words += data

    def of(self, tag: str, kind: str | None = None) -> list[dict[str, str | None]]:
        """Attributes of the elements of this tag, and of this class where one is given."""
        found = [attributes for name, attributes in self.elements if name == tag]
        return [a for a in found if kind is None or kind in (a.get("class") or "").split()]

    @property
    def skeleton(self) -> list[Any]:
        """Elements without their words; <s> marks whitespace, which words have more or less of."""
        return [e for e in self.elements if e[0] != "s"] + [e for e in self.ends if e != "s"]


# ---------------------------------------------------------------------------------- escaping

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


# -------------------------------------------------------------------------------------- curves


def drawn(markup: str, kind: str) -> list[list[tuple[float, float]]]:
    """Coordinates of the paths of a class."""
    paths = [re.findall(r"[ML]([\d.-]+) ([\d.-]+)", a["d"] or "") for a in Parts(markup).of("path", kind)]
    return [[(float(x), float(y)) for x, y in path] for path in paths]


def test_a_curve_goes_right_with_the_steps_and_down_with_the_loss() -> None:
    svg = chart("c", {"raw": [(0, 4.0), (10, 3.0), (20, 3.5)], "dots": [(10, 3.2), (20, 3.1)]})
    ((a, b, c),) = drawn(svg, "raw")
    assert a[0] < b[0] < c[0]
    assert b[0] - a[0] == pytest.approx(c[0] - b[0], abs=0.11)  # of a pixel
    assert b[1] > c[1] > a[1]  # y grows downwards
    assert (c[1] - a[1]) / (b[1] - a[1]) == pytest.approx(0.5, abs=0.01)
    (best,) = Parts(svg).of("circle", "best")
    assert float(best["cx"]) == c[0]
    assert "best 3.1 at step 20" in Parts(svg).words


@pytest.mark.parametrize("hole", [NAN, None, float("inf"), "high", [1]], ids=str)
def test_what_cannot_be_drawn_is_a_gap(hole: object) -> None:
    losses = [4.0, 3.0, hole, 2.0, 1.5]
    records = [{"step": i, "loss": loss, "mfu": hole} for i, loss in enumerate(losses)]
    page = curves(records)
    assert [len(line) for line in drawn(page, "raw")] == [2, 2]
    assert "nan" not in Parts(page).words.lower()
    assert "nan" not in page.replace("tabular-nums", "")


def test_a_missing_metric_is_no_gap() -> None:
    """Training and validation come in records of their own."""
    records = [{"step": 1, "loss": 4.0}, {"step": 1, "val_loss": 3.5}, {"step": 2, "loss": 3.0}, {"step": 3}]
    page = curves(records)
    assert [len(line) for line in drawn(page, "raw")] == [2]
    assert len(Parts(page).of("circle", "dots")) == 1


def test_skipped_updates_are_marked_where_their_number_grows() -> None:
    records = [{"step": i, "loss": 1.0, "skipped": n} for i, n in enumerate((0, 0, 2, 2, 3))]
    page = curves(records)
    assert len(Parts(page).of("path", "bad")) == 2
    assert "3 updates skipped" in Parts(page).words
    assert "skipped" not in Parts(curves(records[:2])).words


VALUES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.lists(st.integers())
)
NAMES = st.sampled_from(["loss", "val_loss", "skipped", "grad_norm", "mfu", "tokens_per_second", "event"])
STEPS = st.integers(0, 10**9) | st.floats(0, 1e9)
RECORDS = st.lists(
    st.builds(lambda step, rest: {"step": step, **rest}, STEPS, st.dictionaries(NAMES, VALUES)), max_size=12
)


@settings(deadline=None, max_examples=150)
@given(RECORDS)
def test_any_metrics_make_a_picture_with_finite_coordinates(records: list[dict[str, Any]]) -> None:
    page = curves(records)
    parts = Parts(page)
    assert "nan" not in parts.words
    for tag, attributes in parts.elements:
        for name in ("d", "x", "y", "cx", "cy"):
            value = attributes.get(name) or "" if tag in ("path", "text", "circle") else ""
            assert not re.search("nan|inf|e", value), (tag, name, value)


NUMBERS = st.floats(-1e6, 1e6) | st.floats(1e-6, 1.0)


@settings(deadline=None)
@given(st.lists(NUMBERS, max_size=6), st.booleans())
def test_an_axis_keeps_order_and_holds_values_and_marks(values: list[float], zero: bool) -> None:
    place, ticks, curved = axis(values, 0.0, 100.0, zero)
    found = [place(v) for v in sorted(values)]
    assert found == sorted(found)
    assert all(-1e-6 <= p <= 100 + 1e-6 for p in found)
    assert all(-1e-6 <= place(t) <= 100 + 1e-6 for t in ticks)
    assert not (curved and (zero or min(values) <= 0))
    assert 1 <= len(ticks) <= 16


LINES = st.lists(st.floats(-1e3, 1e3) | st.just(NAN), max_size=60).map(lambda ys: list(enumerate(ys)))


@given(LINES, st.integers(0, 9))
def test_smoothing_is_the_mean_of_neighbours_within_a_stretch(line: list, half: int) -> None:
    kept = dict(p for p in smooth(line, half) if not math.isnan(p[1]))
    assert set(kept) == {x for x, y in line if not math.isnan(y)}
    for x, mean in kept.items():
        left, right = x, x
        while left and not math.isnan(line[left - 1][1]):
            left -= 1
        while right + 1 < len(line) and not math.isnan(line[right + 1][1]):
            right += 1
        reach = min(half, x - left)  # evenly at the start, one-sided at the end
        near = [y for _, y in line[x - reach : min(x + reach, right) + 1]]
        assert mean == pytest.approx(sum(near) / len(near), abs=1e-6)


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=3000), st.integers(10, 700))
@settings(deadline=None, max_examples=50)
def test_fewer_points_keep_ends_and_extremes(values: list[float], most: int) -> None:
    line = list(enumerate(values))
    kept = downsample(line, most)
    assert len(kept) <= most + 2
    assert kept == sorted(set(kept))
    assert set(kept) <= set(line)
    assert {line[0], line[-1]} <= set(kept)
    assert {min(values), max(values)} <= {y for _, y in kept}


# ----------------------------------------------------------------------------------- run_report


def test_damaged_records_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    good = [{"step": i, "loss": 1.0} for i in range(3)]
    lines = [json.dumps(r).encode() for r in good]
    path.write_bytes(b"\n".join(lines))
    assert read_metrics(path) == good
    for damage in (
        b'{"step": 9, "lo',
        b"\xff\xfe",
        b"\0\0\0",
        b"[" * 9999,
        b"3",
        b'{"loss": 1}',
        b'{"step": -1}',
    ):
        path.write_bytes(b"\n\n".join([lines[0], damage, *lines[1:]]) + b"\n")
        assert read_metrics(path) == good, damage
    # Halves that make one record together, and two records on one line, are no records.
    path.write_bytes(b"\n".join([*lines, b'{"step": 7', b'"loss": 7}']))
    assert read_metrics(path) == good
    path.write_bytes(b"\n".join([b",".join(lines), *lines]))
    assert read_metrics(path) == good


@settings(deadline=None, max_examples=60)
@given(st.lists(st.binary(max_size=30) | RECORDS.map(lambda r: json.dumps(r[:1])[1:-1].encode()), max_size=6))
def test_a_report_is_written_whatever_metrics_hold(
    tmp_path_factory: pytest.TempPathFactory, lines: list
) -> None:
    folder = tmp_path_factory.mktemp("run")
    (folder / "metrics.jsonl").write_bytes(b"\n".join(lines))
    assert run_report(folder) == folder / "report.html"


def test_the_report_of_a_run_says_its_best_and_how_to_go_on(tmp_path: Path) -> None:
    folder = tmp_path / "a run <b>"
    folder.mkdir()
    records = [
        {"step": 0, "event": "compiled", "lower_seconds": 1.0, "compile_seconds": 2.5},
        {"step": 1, "loss": 3.0, "tokens_per_second": 1000.0},
        {"step": 2, "loss": None, "tokens_per_second": 3000.0},
        {"step": 2, "val_loss": 2.5, "val_bits_per_byte": 1.25},
        {"step": 4, "val_loss": None},
        {"step": 6, "val_loss": 2.75, "val_bits_per_byte": 1.5, "val_accuracy": 0.375},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (folder / "config.json").write_text('{"parameters": 124439808}')
    page = run_report(folder)
    assert page == folder / "report.html"
    words = Parts(page.read_text("utf-8")).words
    for part in (
        "2.5nats a target, at step 2",
        "1.25of",
        "0.375share",
        "step 6",
        "2,000median",
        "124.4M",
        "3.5trace",
    ):
        assert part in words
    assert f"jaxgpt sample '{folder}' --prompt" in words  # quoted as a shell needs it
    assert not Parts(page.read_text("utf-8")).of("i")
    (folder / "config.json").write_text('{"run": {"objective": {"kind": "MaskedLM"}}}')
    run_report(folder)
    assert f"jaxgpt eval '{folder}'" in Parts(page.read_text("utf-8")).words  # it writes no text


@pytest.mark.parametrize("config", ["{", "[1]", '{"parameters": {"a": "<b>"}}', "\udcff"], ids=ascii)
def test_a_damaged_config_costs_its_figure_alone(config: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    (tmp_path / "config.json").write_bytes(config.encode("utf-8", "surrogateescape"))
    assert run_report(tmp_path) == tmp_path / "report.html"


def test_a_report_that_cannot_be_made_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert run_report(tmp_path / "nowhere") is None
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    (tmp_path / "report.html").mkdir()
    assert run_report(tmp_path) is None
    assert [r.levelname for r in caplog.records] == ["WARNING"] * 2
    assert f"no report of {tmp_path}: " in caplog.text


def test_points_take_what_has_the_metric() -> None:
    records = [{"step": 1, "mfu": 0.5}, {"step": 2}, {"step": 3, "mfu": None}]
    assert points(records, "mfu", 100)[0] == (1, 50.0)
    assert [step for step, _ in points(records, "mfu")] == [1, 3]
