"""How a browser lays the page out: rows are filled at every width, nothing is cut off or too small."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from typing import Any

import pytest

from jaxgpt.report import Html, curves, dialogues, facts, lines, write

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTHS = (360, 400, 600, 800, 1000, 1400)
LOOK = """
const box = e => { const r = e.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]; };
const found = [...document.querySelectorAll("iframe")].map(frame => {
  const all = (e, which) => [...e.querySelectorAll(which)], page = frame.contentDocument;
  return {
    grids: all(page, ".tiles,.pair").map(grid => ({grid: box(grid), cells: [...grid.children].map(box)})),
    charts: all(page, "figure svg").map(svg => {
      const unit = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
      const texts = all(svg, "text").map(t => (
        {words: t.textContent, box: box(t), size: parseFloat(getComputedStyle(t).fontSize) * unit}));
      return {card: box(svg.closest("figure")), scrolls: svg.matches(".runs"), texts};
    }),
  };
});
document.body.innerHTML = "<pre>" + JSON.stringify(found) + "</pre>";
"""


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Boxes of a page with 5 tiles, 5 small charts, 3 dialogues and two lines compared, per width."""
    if CHROMIUM is None:
        pytest.skip("no chromium here to lay a page out")
    folder = tmp_path_factory.mktemp("layout")
    last = {"learning_rate": 6.12e-5, "tokens_per_second": 0.001234, "mfu": 0.5432}
    records = [{"step": i, "loss": 5 - i / 9, "val_loss": 4.1 - i / 9, "val_accuracy": 0.2} for i in range(9)]
    # From 65 down by 3 a step: the axis ends just above 100, so that its mark is as high as one can be.
    records = [r | last | {"grad_norm": 65 / 3 ** r["step"]} for r in records]
    told = [[{"role": "user", "content": "a " * n}] for n in (1, 300, 1)]
    tiles = facts(
        {f"Figure {i}": (i, "a note that is long enough to be broken " * (i == 1)) for i in range(5)}
    )
    sections = [("Figures", tiles), ("Curves", curves(records)), ("Dialogues", dialogues(told))]
    compared = lines.chart({"a": [(1, 3.0), (9, 2.0)], "b": [(1, 2.0), (9, 1.5)]})
    sections.append(("Runs", Html(lines.STYLE), compared))
    page = html.escape(write(folder / "page.html", "T", sections).read_text("utf-8"))
    frames = [f'<iframe style="width:{w}px;height:900px;border:0" srcdoc="{page}"></iframe>' for w in WIDTHS]
    frames += [f"<script>onload = () => {{{LOOK}}}</script>"]
    (folder / "frames.html").write_text(f"<!doctype html><body>{''.join(frames)}", "utf-8")
    words = [CHROMIUM, "--headless", "--no-sandbox", f"--user-data-dir={folder / 'profile'}", "--dump-dom"]
    words += ["--hide-scrollbars"]  # those of a phone take no width
    done = subprocess.run([*words, (folder / "frames.html").as_uri()], capture_output=True, timeout=60)
    found = re.search(r"<pre>(.*)</pre>", done.stdout.decode("utf-8"), re.DOTALL)
    assert found, done.stderr.decode()[-2000:]
    return json.loads(html.unescape(found[1]))


def test_every_row_of_a_grid_is_filled(layouts: list[dict[str, Any]]) -> None:
    for width, layout in zip(WIDTHS, layouts, strict=True):
        assert [len(grid["cells"]) for grid in layout["grids"]] == [5, 5, 3]
        for grid in layout["grids"]:
            left, _, right, _ = grid["grid"]
            for row in rows_of(grid["cells"]):
                edges = [left - 12, *(x for cell in row for x in (cell[0], cell[2])), right + 12]
                gaps = [b - a for a, b in zip(edges[::2], edges[1::2], strict=True)]
                assert gaps == pytest.approx([12] * len(gaps), abs=0.1), (width, row)
                assert max(cell[3] for cell in row) - min(cell[3] for cell in row) < 0.1, (width, row)


def rows_of(cells: list[list[float]]) -> list[list[list[float]]]:
    """Cells (left, top, right, bottom) that begin at the same height, from the left."""
    return [sorted(c for c in cells if c[1] == top) for top in sorted({c[1] for c in cells})]


def test_a_plot_of_several_lines_leaves_the_rest_of_a_page_as_it_is(layouts: list[dict[str, Any]]) -> None:
    for grid in layouts[WIDTHS.index(1400)]["grids"]:
        left, _, right, _ = grid["grid"]
        assert right - left == 960 - 2 * 12  # the page's own width


def test_nothing_sticks_out_of_a_card(layouts: list[dict[str, Any]]) -> None:
    for width, layout in zip(WIDTHS, layouts, strict=True):
        for chart in layout["charts"]:
            left, _, right, _ = chart["card"]
            for one in () if chart["scrolls"] else chart["texts"]:
                assert left < one["box"][0] and one["box"][2] < right, (width, one, left, right)


def test_words_of_charts_are_read_at_every_width(layouts: list[dict[str, Any]]) -> None:
    """At least 8 CSS pixels high, and smaller than the 16 of the page's text."""
    for width, layout in zip(WIDTHS, layouts, strict=True):
        assert [len(chart["texts"]) > 3 for chart in layout["charts"]] == [True] * 7
        for chart in layout["charts"]:
            assert all(8 <= one["size"] < 16 for one in chart["texts"]), (width, chart["texts"][0])


def test_log_does_not_stand_in_a_number(layouts: list[dict[str, Any]]) -> None:
    seen = 0
    for width, layout in zip(WIDTHS, layouts, strict=True):
        for texts in (chart["texts"] for chart in layout["charts"] if not chart["scrolls"]):
            for sign in (one for one in texts if one["words"] == "log"):
                seen += 1
                _, _, right, bottom = sign["box"]
                beside = [t["box"] for t in texts if t is not sign and abs(t["box"][2] - right) < 1]
                top = min(box[1] for box in beside) + 0.2 * sign["size"]  # above digits a font has room
                assert bottom <= top, (width, sign, beside)
    assert seen >= len(WIDTHS)
