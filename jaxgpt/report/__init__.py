"""`report.html`: one file without network or script: key figures, curves, tables, masks, dialogues.

Each part is a function that returns `Html`; `write` puts parts on a page. What is not `Html` is
escaped, so a prompt that holds markup shows as the text it is. Standard library only.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from html import escape
from itertools import groupby, pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

log = logging.getLogger(__name__)
Point, Record, NAN = tuple[float, float], dict[str, Any], float("nan")
LOSSES = {"loss": "Loss (nats a target)", "bits_per_byte": "Bits per byte"}
PANELS = {  # metric: title, factor, whether the axis is linear from zero
    "val_accuracy": ("Validation accuracy (%)", 100, False),
    "learning_rate": ("Learning rate", 1, True),
    "grad_norm": ("Gradient norm", 1, False),
    "tokens_per_second": ("Tokens per second", 1, True),
    "mfu": ("Model FLOPs utilisation (%)", 100, True),
}
PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{0}</title><meta
name="viewport" content="width=device-width,initial-scale=1"><meta http-equiv=
"Content-Security-Policy" content="default-src 'none';style-src 'unsafe-inline'"><style>{1}</style>
</head><body><main><h1>{0}</h1>{2}</main></body></html>\n"""
CSS = """:root{color-scheme:light dark;--page:#f5f6f8;--card:#fff;--ink:#1b1f24;--dim:#5b6570;
--line:#dde1e6;--c0:#2463c8;--c1:#c24a0a;--ok:#15803d;--bad:#c4262e;--mark:#c9ecd3;--bar:#d5e3fa}
@media (prefers-color-scheme:dark){:root{--page:#0f1318;--card:#181d24;--ink:#e6e9ed;--dim:#9aa5b1;
--line:#2e3641;--c0:#6ea8fe;--c1:#ffa657;--ok:#56d364;--bad:#ff7b72;--mark:#1a4d2f;--bar:#20385e}}
*{box-sizing:border-box;margin:0}body{background:var(--page);color:var(--ink);font:16px/1.5
system-ui,-apple-system,Roboto,"Noto Sans","DejaVu Sans",sans-serif}main{max-width:960px;
margin:auto;padding:28px 12px 60px}h1{font-size:1.7rem;line-height:1.2}h2{font-size:1.2rem;
margin:36px 0 10px}p{margin:8px 0;max-width:70ch}small,dt{color:var(--dim);font-size:.8rem;
font-weight:400}.card{background:var(--card);border:1px solid var(--line);padding:14px;
border-radius:10px;margin-bottom:12px;min-width:0;overflow:auto;overflow-wrap:anywhere}code,pre,
.row{font:.86rem/1.6 ui-monospace,"SF Mono",Menlo,Consolas,"DejaVu Sans Mono",monospace}pre{
user-select:all}.tiles,.pair{display:grid;gap:12px;grid-template-columns:repeat(auto-fit,
minmax(150px,1fr))}.pair{grid-template-columns:repeat(auto-fit,minmax(min(100%,380px),1fr));
align-items:start}.tiles>*,.pair>*{margin:0}dd b{display:block;font-size:1.5rem;line-height:1.3}
svg{display:block;width:100%;overflow:visible}text{fill:var(--dim);font-size:9.5px}.pair text{
font-size:15px}.raw,.mean{color:var(--c0)}.dots,.best{color:var(--c1)}.bad{color:var(--bad)}.ok{
color:var(--ok)}.left{text-anchor:end}.mid{text-anchor:middle}text.mean,text.dots{
fill:currentColor;font-weight:600}path{fill:none;stroke:currentColor;
vector-effect:non-scaling-stroke;stroke-width:2;stroke-linecap:round;stroke-linejoin:round}.grid{
stroke:var(--line);stroke-width:1}.raw{stroke-width:1;opacity:.4}circle{fill:currentColor;
stroke:var(--card)}.best{stroke:currentColor;stroke-width:1;stroke-dasharray:2 3;fill:none}table{
border-collapse:collapse;width:100%;font-size:.92rem}caption,figcaption{text-align:left;
font-weight:600;padding-bottom:8px}th,td{text-align:left;padding:6px 8px;vertical-align:top;
border-top:1px solid var(--line)}th{color:var(--dim);border:0}.n{text-align:right;
white-space:nowrap;font-variant-numeric:tabular-nums}.share{background:linear-gradient(90deg,
var(--bar) var(--v),#0000 0) no-repeat 0/100% 72%}.row{white-space:pre-wrap;color:var(--dim);
margin-top:8px;padding-left:10px;border-left:3px solid var(--line)}mark{color:var(--ink);
background:var(--mark);border-radius:3px}kbd{font:inherit;font-size:.76rem;border:1px solid;
border-radius:4px;padding:0 3px}s{opacity:.55;text-decoration:none}.said{white-space:pre-wrap;
border:1px solid var(--line);border-radius:12px;margin:0 0 8px;padding:6px 12px;width:fit-content;
max-width:94%}.user{text-align:right}.user>.said{text-align:left;margin-left:auto;
background:var(--bar)}@media (max-width:600px){text{font-size:18px}}"""


class Html(str):
    """Markup that goes onto the page as it is; every other string is escaped first."""


def _escape(value: Any) -> str:
    if isinstance(value, Html):
        return value
    whole = str(value).encode("utf-8", "replace").decode()  # lone surrogates cannot be written
    return escape(re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufffe\uffff]", "\ufffd", whole))


def _float(value: Any) -> float:
    """A number that can be drawn: NaN for what is none, is infinite or is absurdly large."""
    if not isinstance(value, int | float) or not -1e30 < value < 1e30:
        return NAN
    return float(value) if abs(value) > 1e-30 else 0.0


def _show(value: Any) -> str:
    """A value as a person would write it, escaped."""
    if isinstance(value, bool) or not isinstance(value, int | float | None):
        return _escape(value)
    whole, size = isinstance(value, int), abs(_float(value))
    if value is None or math.isnan(size):
        return "–"
    if 0 < size < 1e-3:
        mantissa, power = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(power)}"
    if size < (1e6 if whole else 1e4):
        return f"{value:,.0f}" if whole or size >= 1000 else f"{value:.4g}"
    unit, scale = next(p for p in zip("TBMk", (1e12, 1e9, 1e6, 1e3), strict=True) if size >= p[1])
    return f"{value / scale:.4g}{unit}"


def read_metrics(path: str | Path) -> list[Record]:
    """The records of a `metrics.jsonl` that have a step; cut or damaged lines are left out."""
    lines, records = list(filter(bytes.strip, Path(path).read_bytes().split(b"\n"))), []
    with suppress(ValueError, RecursionError):  # all at once takes two thirds of the time
        records = json.loads(b"[%b]" % b",".join(lines))
    if len(records) != len(lines):
        records = []
        for line in lines:
            with suppress(ValueError, RecursionError):
                records.append(json.loads(line))
    return [r for r in records if isinstance(r, dict) and _float(r.get("step")) >= 0]


def text(*paragraphs: str) -> Html:
    """Paragraphs; words in `backticks` become code."""
    coded = (re.sub("`([^`]+)`", r"<code>\1</code>", _escape(p)) for p in paragraphs)
    return Html("".join(f"<p>{p}</p>" for p in coded))


def commands(*lines: str) -> Html:
    """Shell commands, each in a box that one click selects whole; `# words` become a paragraph."""
    box = '<pre class="card" tabindex="0">{}</pre>'.format
    return Html("".join(text(s[1:]) if s[:1] == "#" else box(_escape(s)) for s in lines))


def facts(values: Mapping[str, Any]) -> Html:
    """Key figures as tiles: name to a value, or to a pair of a value and a note."""
    tiles = []
    for name, value in values.items():
        value, note = value if isinstance(value, tuple) else (value, "")
        body = f"<dd><b>{_show(value)}</b><small>{_escape(note)}</small></dd>"
        tiles.append(f'<div class="card"><dt>{_escape(name)}</dt>{body}</div>')
    return Html(f'<dl class="tiles">{"".join(tiles)}</dl>')


def table(rows: Sequence[Mapping[str, Any]], caption: str, shares: Sequence[str] = ()) -> Html:
    """A table of rows (column to value); columns in `shares` are fractions, shown with a bar.

    A column without a value in any row is left out.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row if row[name] is not None))
    numbers = {c for c in columns if any(isinstance(row.get(c), int | float) for row in rows)}
    style = {c: ' class="n"' if c in numbers else "" for c in columns}

    def cell(value: Any, column: str) -> str:
        fraction = 100 * _float(value)
        if column not in shares or math.isnan(fraction):
            return f"<td{style[column]}>{_show(value)}</td>"
        bar = f"--v:{min(max(fraction, 0), 100):.1f}%"
        return f'<td class="n share" style="{bar}">{fraction:.0f} %</td>'

    head = "".join(f'<th scope="col"{style[c]}>{_escape(c)}</th>' for c in columns)
    body = "</tr><tr>".join("".join(cell(row.get(c), c) for c in columns) for row in rows)
    head = f"<caption>{_escape(caption)}</caption><thead><tr>{head}</tr></thead>"
    return Html(f'<div class="card"><table>{head}<tbody><tr>{body}</tr></tbody></table></div>')


def dialogues(items: Iterable[Sequence[Mapping] | Mapping]) -> Html:
    """Dialogues as bubbles: lists of messages (`role`, `content`), or mappings with such a list
    as `messages` and, where wanted, `title`, `ok` (True, False) and `expected` (the answer).
    """
    parts = []
    for item in items:
        item = item if isinstance(item, Mapping) else {"messages": item}
        parts.append(f'<div class="card"><b>{_escape(item.get("title", ""))}</b>')
        for message in item["messages"]:
            role, said = _escape(message.get("role", "")), _escape(message.get("content") or "∅")
            parts.append(f'<div class="{"user" if role == "user" else "other"}"><small>{role}')
            parts.append(f'</small><p class="said" dir="auto">{said}</p></div>')
        if item.get("ok") is not None:
            parts.append(f'<b class="{"ok" if item["ok"] else "bad"}">')
            parts.append("✓ right</b> " if item["ok"] else "✗ wrong</b> ")
        if item.get("expected") is not None:
            parts.append(f"<small>expected</small> <code>{_escape(item['expected'])}</code>")
        parts.append("</div>")
    return Html(f'<div class="pair">{"".join(parts)}</div>')


def mask_picture(examples: Iterable[Mapping], piece: Callable | None = None) -> Html:
    """Packed rows as text: trained tokens highlighted, the others dimmed, segments apart.

    `examples` are those of `jaxgpt.data.show.examples`, with `piece` from a token's id to the name
    (str) of a control token or the bytes of another; or hold a list `pieces` in place of `tokens`.
    """
    parts = ["<p><mark>Highlighted</mark> tokens are learned, the dimmed ones are only read. Each "]
    parts.append("bar at the left is one segment: attention never crosses into another.</p>")
    for number, row in enumerate(examples, 1):
        pieces = [piece(token) for token in row["tokens"]] if piece else row["pieces"]
        names = (isinstance(p, str) and p[:2] == "<|" for p in pieces)
        kinds = list(zip(row["segments"], (w > 0 for w in row["weights"]), names, strict=True))
        trained, segments = sum(kind[1] for kind in kinds), len({kind[0] for kind in kinds})
        title = f"Row {number}: {len(kinds)} tokens, {trained} trained, {segments} segments"
        parts.append(f'<figure class="card"><figcaption>{title}</figcaption>')
        for _, part in groupby(zip(kinds, pieces, strict=True), key=lambda pair: pair[0][0]):
            parts.append('<div class="row">')
            for (_, on, named), run in groupby(part, key=lambda pair: pair[0]):
                words = _words([p for _, p in run], named)
                parts.append(f"<mark>{words}</mark>" if on else words)
            parts.append("</div>")
        parts.append("</figure>")
    return Html("".join(parts))


def _words(pieces: Sequence[Any], named: bool) -> str:
    """Tokens as text; whitespace shows where it would be missed: at an edge, doubled, tabs."""
    if named:
        return "".join(f"<kbd>{_escape(name)}</kbd>" for name in pieces)
    data = b"".join(p if isinstance(p, bytes) else p.encode("utf-8", "replace") for p in pieces)
    words = re.sub(r"(?<!\S) | (?!\S)", "\0", _escape(data.decode("utf-8", "replace")))
    for sign, seen in (("\0", "·"), ("\t", "→\t"), ("\n", "↵\n")):
        words = words.replace(sign, f"<s>{seen}</s>")
    return words


def axis(values: Sequence[float], start: float, end: float, zero: bool = False) -> tuple[Any, ...]:
    """The map from values to pixels, some round values to mark, and whether it is logarithmic:
    it is where the values span a factor of 3 or more, but never where it must begin at `zero`.
    """
    low, high = min(values, default=0.0), max(values, default=1.0)
    low, high = (min(low, 0.0), max(high, 0.0)) if zero else (low, high)
    curved = low > 0 and high >= 3 * low
    scale: Callable[[float], float] = math.log if curved else float
    a, b = scale(low), scale(high)
    room = 0.05 * (b - a) or 0.1 * abs(b) or 1.0
    a, b = a if zero and low == 0 else a - room, b + room
    step = 10.0 ** math.floor(math.log10((b - a) / 6))
    step *= next(m for m in (1, 2, 5, 10, 20) if m * step >= (b - a) / 6)
    ticks = [i * step for i in range(math.ceil(a / step), math.floor(b / step) + 1)]
    if curved:
        digits = (1, 2, 3, 4, 5, 6, 8) if b - a < 2.4 else (1, 2, 5) if b - a < 5 else (1,)
        powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
        ticks = [d * 10.0**p for p in powers for d in digits if a <= math.log(d * 10.0**p) <= b]
        ticks = ticks[:: 1 + len(ticks) // 8]
    return lambda value: start + (scale(value) - a) / (b - a) * (end - start), ticks, curved


def points(records: Iterable[Record], metric: str, factor: float = 1) -> list[Point]:
    """(step, value) of the records that have the metric; NaN where it cannot be drawn."""
    return [(r["step"], factor * _float(r[metric])) for r in records if metric in r]


def _runs(line: Sequence[Point]) -> list[list[Point]]:
    """The stretches of a line between its gaps."""
    return [list(g) for gap, g in groupby(line, key=lambda p: math.isnan(p[1])) if not gap]


def smooth(line: Sequence[Point], half: int) -> list[Point]:
    """Running mean over `half` points either side, at some 300 places; gaps stay gaps.

    The window shrinks evenly at the start, where curves are steep, and is one-sided at the end.
    """
    means = []
    for run in _runs(line):
        values = [y for _, y in run]
        for i in sorted({*range(0, len(run), 1 + len(run) // 300), len(run) - 1}):
            near = values[i - min(half, i) : i + min(half, i) + 1]
            means.append((run[i][0], sum(near) / len(near)))
        means.append((run[-1][0], NAN))
    return means


def downsample(line: Sequence[Point], most: int = 600) -> list[Point]:
    """Some `most` of the points: the first, the last, and each bucket's lowest and highest."""
    size, kept = 1 + 2 * len(line) // most, {0, len(line) - 1}
    for start in range(0, len(line), size):
        values = [y for _, y in line[start : start + size]]
        kept |= {start + values.index(min(values)), start + values.index(max(values))}
    return list(line) if len(line) <= most else [line[i] for i in sorted(kept)]


def _tag(name: str, kind: str, inside: str = "", **values: str | float) -> str:
    shown = (f' {k}="{v:.1f}"' if isinstance(v, float) else f' {k}="{v}"' for k, v in values.items())
    return f'<{name} class="{kind}"{"".join(shown)}>{inside}</{name}>'


def chart(title: str, lines: Mapping[str, Sequence[Point]], zero: bool = False) -> Html:
    """An SVG chart over steps: `raw` a faint line, `mean` a line with its last value, `dots` points
    with the lowest named as the best, `skips` steps marked at the bottom; `zero` as of `axis`.
    """
    runs = {name: _runs(line) for name, line in lines.items() if name != "skips"}
    x, x_ticks, _ = axis([a for line in lines.values() for a, _ in line], 52, 608, zero=True)
    finite = [b for found in runs.values() for run in found for _, b in run]
    y, y_ticks, curved = axis(finite, 272, 22, zero)
    parts = [f"<title>{_escape(title)}</title><desc>{len(finite)} points</desc>"]
    parts += [_tag("path", "grid", d=f"M52 {y(tick):.1f}H582") for tick in y_ticks]
    parts += [_tag("text", "left", _show(t), x=45, y=y(t) + 4) for t in y_ticks]
    parts += [_tag("text", "mid", _show(t), x=x(t), y=292) for t in x_ticks]
    parts += [_tag("text", "left", "log", x=45, y=13)] if curved else []
    parts += [_tag("path", "bad", d=f"M{x(a):.1f} 272v-9") for a, _ in lines.get("skips", ())]
    for kind, run in [(name, run) for name, found in runs.items() for run in found]:
        kept = downsample(run, 8 + 600 * len(run) // len(lines[kind]))
        d = "L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in kept)
        parts.append(_tag("path", kind, d=f"M{d}" + "h0" * (len(run) == 1)))
        for a, b in kept if kind == "dots" else ():
            tip = f"<title>step {a:,}: {_show(b)}</title>"
            parts.append(_tag("circle", "dots", tip, cx=x(a), cy=y(b), r=3.2))
    ends = sorted((y(r[-1][-1][1]), k, r[-1][-1][1]) for k, r in runs.items() if r and k != "raw")
    for i, (at, kind, value) in enumerate(ends):
        at = max(at, ends[i - 1][0] + 17) if i else at
        parts.append(_tag("text", f"{kind} end", _show(value), x=588, y=at + 4))
    for run in runs.get("dots", [])[:1]:
        best, step = min((b, a) for run in runs["dots"] for a, b in run)
        parts.append(_tag("path", "best", d=f"M{x(step):.1f} 18V{y(best) - 7:.1f}"))
        parts.append(_tag("circle", "best", cx=x(step), cy=y(best), r=7))
        side = "right" if x(step) < 150 else "left" if x(step) > 480 else "mid"
        words = f"best {_show(best)} at step {step:,}"
        parts.append(_tag("text", f"dots {side}", words, x=x(step), y=13))
    return Html(f'<svg viewBox="0 0 640 300" role="img">{"".join(parts)}</svg>')


def curves(records: Sequence[Record], metric: str = "loss") -> Html:
    """A run's training and validation `loss` (or `bits_per_byte`), then small charts of learning
    rate, gradient norm, tokens a second and MFU.
    """
    train = points(records, metric)
    counts = [(0, 0.0), *(p for p in points(records, "skipped") if not math.isnan(p[1]))]
    half, skips = len(train) // 40, [b for a, b in pairwise(counts) if b[1] > a[1]]
    lines = {"raw": train, "mean": smooth(train, half), "dots": points(records, f"val_{metric}")}
    words = f"<span class=mean>━ training, mean of {2 * half + 1} records (faint: each)</span> "
    words += "<span class=dots>● validation</span> " if lines["dots"] else ""
    words += f"<span class=bad>┃ {counts[-1][1]:.0f} updates skipped</span>" if skips else ""
    parts = [_figure(LOSSES[metric], words, chart(LOSSES[metric], lines | {"skips": skips}))]
    parts.append('<div class="pair">')
    for name, (title, factor, zero) in PANELS.items():
        line = points(records, name, factor)
        lines = {"raw": line, "mean": smooth(line, len(line) // 40)}
        parts.append(_figure(title, "", chart(title, lines, zero)) if line else "")
    return Html("".join(parts) + "</div>")


def _figure(title: str, words: str, svg: str) -> str:
    return f'<figure class="card"><figcaption>{title} <small>{words}</small></figcaption>{svg}</figure>'


def write(path: str | Path, title: str, sections: Iterable[Sequence[str]]) -> Path:
    """Write the page whole or not at all; a section is a heading and its parts."""
    body = []
    for heading, *parts in sections:
        body.append(f"<section><h2>{_escape(heading)}</h2>")
        body += [part if isinstance(part, Html) else text(part) for part in parts]
        body.append("</section>")
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(PAGE.format(_escape(title), CSS, "".join(body)), "utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def run_report(folder: str | Path) -> Path | None:
    """Write `report.html` into a run's folder; None, with a warning in the log, where there is
    nothing to write or no way to: a picture must never stop a training run.
    """
    folder, config = Path(folder), {}
    try:
        records = read_metrics(folder / "metrics.jsonl")
        with suppress(OSError, ValueError):
            config = json.loads((folder / "config.json").read_bytes())
        config = config if isinstance(config, dict) else {}
        told, place = json.dumps(config), shlex.quote(str(folder))
        words = f"jaxgpt sample {place} --prompt 'Once upon a time'"
        if '"kind": "Chat"' in told:
            words = f"jaxgpt chat {place}"
        elif '"kind": "Classification"' in told or '"kind": "MaskedLM"' in told:
            words = f"jaxgpt eval {place}"
        figures = facts(_figures(records, config))
        evals = [("Evaluations", *tables)] if (tables := _evaluations(folder)) else []
        parts = ("Key figures", figures), ("Curves", curves(records)), *evals, ("Try it", commands(words))
        return write(folder / "report.html", f"Run {folder.resolve().name}", parts)
    except Exception as error:
        log.warning("no report of %s: %s", folder, error)
        return None


def _evaluations(folder: Path) -> list[Html]:
    """What `jaxgpt eval` left in a run's folder, a table each; damaged files are left out."""
    tables = []
    for path in sorted(folder.glob("eval/*.json")):
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            found = json.loads(path.read_bytes())
            tables.append(table(list(found["figures"].values()), f"{found['title']}, step {found['step']}"))
            if found.get("report"):
                from jaxgpt.report.confusion import confusion_picture  # late: it draws with what is here

                tables.append(Html(f'<pre class="card" tabindex="0">{_escape(found["report"])}</pre>'))
                labels, counts = found["confusion"]
                tables.append(confusion_picture(labels, np.asarray(counts)))
    return tables


def _figures(records: Sequence[Record], config: Record) -> dict[str, Any]:
    """What is known of validation, speed, compilation and size."""
    val = [r for r in records if not math.isnan(_float(r.get("val_loss")))]
    best = min(val, key=lambda r: r["val_loss"], default={})
    accuracies = [p for p in points(records, "val_accuracy") if p[1] == p[1]]
    step, right = max(accuracies, key=lambda p: p[1], default=(0, None))
    speed = [v for _, v in points(records, "tokens_per_second") if v == v]
    found = {
        "Best validation loss": (best.get("val_loss"), f"nats a target, at step {_show(best.get('step'))}"),
        "Best validation accuracy": (right, f"share of targets that were likeliest, at step {step:,}"),
        "Bits per byte": (best.get("val_bits_per_byte"), "of validation text, at that step"),
        "Tokens per second": (median(speed) if speed else None, "median"),
        "Parameters": (config.get("parameters"), ""),
    }
    for record in records:
        if record.get("event") == "compiled":
            seconds = [_float(v) for k, v in record.items() if k.endswith("_seconds")]
            found["Seconds to compile"] = sum(seconds), "trace, lower and compile"
    return {name: pair for name, pair in found.items() if pair[0] is not None}
