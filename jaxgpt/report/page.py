"""A page without network access: functions return parts as `Html`, and `write` joins them.

No script runs but those that are named to `render`, by their digests.

Strings that are not `Html` are escaped, so a prompt that contains markup is shown as text.
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from jaxgpt.files import write_text

PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{0}</title><meta
name="viewport" content="width=device-width,initial-scale=1"><meta http-equiv=
"Content-Security-Policy" content="default-src 'none';style-src 'unsafe-inline'{3}"><style>{1}</style>
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
user-select:all}.tiles,.pair{gap:12px;margin-bottom:12px}.tiles{display:flex;flex-wrap:wrap}
.tiles>*{flex:1 1 150px}.pair{display:grid;grid-template-columns:repeat(auto-fit,
minmax(min(100%,380px),1fr))}.pair>:first-child:nth-last-child(odd){grid-column:1/-1}.tiles>*,
.pair>*{margin:0}dd>*{display:block}dd b{font-size:1.5rem;line-height:1.3}figure{
container-type:inline-size}svg{display:block;width:100%;overflow:visible}text{fill:var(--dim);
font-size:15px}@container (min-width:600px){text{font-size:9.5px}}@container (max-width:400px){
text{font-size:18px}}.raw,.mean{color:var(--c0)}.dots,.best{color:var(--c1)}.bad{color:var(--bad)}.ok{
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
background:var(--bar)}"""


class Html(str):
    """Markup that is inserted into the page unchanged; every other string is escaped first."""


def escaped(value: Any) -> str:
    """A value as markup: `Html` unchanged, the rest escaped and without unprintable characters."""
    if isinstance(value, Html):
        return value
    whole = str(value).encode("utf-8", "replace").decode()  # UTF-8 cannot encode lone surrogates
    return escape(re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufffe\uffff]", "\ufffd", whole))


def drawable(value: Any) -> float:
    """The value as a number that can be drawn: NaN if it is not a number, infinite or absurdly large."""
    if not isinstance(value, int | float) or not -1e30 < value < 1e30:
        return float("nan")
    return float(value) if abs(value) > 1e-30 else 0.0


def shown(value: Any) -> str:
    """A value formatted for people, escaped."""
    if isinstance(value, bool) or not isinstance(value, int | float | None):
        return escaped(value)
    whole, size = isinstance(value, int), abs(drawable(value))
    if value is None or math.isnan(size):
        return "–"
    if 0 < size < 1e-3:
        mantissa, power = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(power)}"
    if size < (1e6 if whole else 1e4):
        return f"{value:,.0f}" if whole or size >= 1000 else f"{value:.4g}"
    unit, scale = next(p for p in zip("TBMk", (1e12, 1e9, 1e6, 1e3), strict=True) if size >= p[1])
    return f"{value / scale:.4g}{unit}"


def text(*paragraphs: str) -> Html:
    """Paragraphs; text in `backticks` becomes code."""
    coded = (re.sub("`([^`]+)`", r"<code>\1</code>", escaped(p)) for p in paragraphs)
    return Html("".join(f"<p>{p}</p>" for p in coded))


def commands(*lines: str) -> Html:
    """Shell commands, each in a box that one click selects entirely; `# text` becomes a paragraph."""
    box = '<pre class="card" tabindex="0">{}</pre>'.format
    return Html("".join(text(s[1:]) if s[:1] == "#" else box(escaped(s)) for s in lines))


def facts(values: Mapping[str, Any]) -> Html:
    """Key figures as tiles: from names to values, or to pairs of a value and a note."""
    tiles = []
    for name, value in values.items():
        value, note = value if isinstance(value, tuple) else (value, "")
        body = f"<dd><b>{shown(value)}</b><small>{escaped(note)}</small></dd>"
        tiles.append(f'<div class="card"><dt>{escaped(name)}</dt>{body}</div>')
    return Html(f'<dl class="tiles">{"".join(tiles)}</dl>')


def table(rows: Sequence[Mapping[str, Any]], caption: str, shares: Sequence[str] = ()) -> Html:
    """A table of rows (column to value); columns in `shares` are fractions, shown with a bar.

    A column without a value in any row is omitted.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row if row[name] is not None))
    numbers = {c for c in columns if any(isinstance(row.get(c), int | float) for row in rows)}
    style = {c: ' class="n"' if c in numbers else "" for c in columns}

    def cell(value: Any, column: str) -> str:
        fraction = 100 * drawable(value)
        if column not in shares or math.isnan(fraction):
            return f"<td{style[column]}>{shown(value)}</td>"
        bar = f"--v:{min(max(fraction, 0), 100):.1f}%"
        return f'<td class="n share" style="{bar}">{fraction:.0f} %</td>'

    head = "".join(f'<th scope="col"{style[c]}>{escaped(c)}</th>' for c in columns)
    body = "</tr><tr>".join("".join(cell(row.get(c), c) for c in columns) for row in rows)
    head = f"<caption>{escaped(caption)}</caption><thead><tr>{head}</tr></thead>"
    return Html(f'<div class="card"><table>{head}<tbody><tr>{body}</tr></tbody></table></div>')


def dialogues(items: Iterable[Sequence[Mapping] | Mapping]) -> Html:
    """Dialogues as chat bubbles: lists of messages (`role`, `content`), or mappings with such a list
    as `messages` and optionally `title`, `ok` (True, False) and `expected` (the answer).
    """
    parts = []
    for item in items:
        item = item if isinstance(item, Mapping) else {"messages": item}
        parts.append(f'<div class="card"><b>{escaped(item.get("title", ""))}</b>')
        for message in item["messages"]:
            role, said = escaped(message.get("role", "")), escaped(message.get("content") or "∅")
            parts.append(f'<div class="{"user" if role == "user" else "other"}"><small>{role}')
            parts.append(f'</small><p class="said" dir="auto">{said}</p></div>')
        if item.get("ok") is not None:
            parts.append(f'<b class="{"ok" if item["ok"] else "bad"}">')
            parts.append("✓ right</b> " if item["ok"] else "✗ wrong</b> ")
        if item.get("expected") is not None:
            parts.append(f"<small>expected</small> <code>{escaped(item['expected'])}</code>")
        parts.append("</div>")
    return Html(f'<div class="pair">{"".join(parts)}</div>')


def figure(title: str, words: str, svg: str) -> str:
    """A picture under its title, with a smaller note next to the title."""
    return f'<figure class="card"><figcaption>{title} <small>{words}</small></figcaption>{svg}</figure>'


def render(
    title: str, sections: Iterable[Sequence[str]], style: str = "", scripts: Iterable[str] = ()
) -> str:
    """The page; a section is a heading and its parts.

    Args:
      title: of the page.
      sections: a heading and its parts each.
      style: more rules of CSS.
      scripts: texts of the scripts in the parts that may run, and make functions of texts; no other one may.
    """
    body = []
    for heading, *parts in sections:
        body.append(f"<section><h2>{escaped(heading)}</h2>")
        body += [part if isinstance(part, Html) else text(part) for part in parts]
        body.append("</section>")
    digests = [hashlib.sha256(script.encode()).digest() for script in dict.fromkeys(scripts)]
    allowed = "".join(f" 'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
    policy = f";script-src 'unsafe-eval'{allowed}" if allowed else ""
    return PAGE.format(escaped(title), CSS + style, "".join(body), policy)


def write(
    path: str | Path,
    title: str,
    sections: Iterable[Sequence[str]],
    style: str = "",
    scripts: Iterable[str] = (),
) -> Path:
    """Write the page whole or not at all; see `render`."""
    path = Path(path)
    write_text(path, render(title, sections, style, scripts))
    return path
