"""The page of `jaxgpt explain`: one prediction, from every side, in one file that loads nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxgpt.report.arrays import maps
from jaxgpt.report.page import Html, commands, escaped, facts, shown, table, text, write

STYLE = """.toks{overflow:visible;line-height:2.1}.tok{position:relative;padding:2px 1px;border-radius:3px;
white-space:pre-wrap;font:.92rem/1.5 ui-monospace,Menlo,Consolas,"DejaVu Sans Mono",monospace;
background:color-mix(in srgb,var(--hue,var(--c0)) calc(var(--a,0)*55%),transparent)}.minus{--hue:var(--c1)}
.frame{font-style:italic}.asked{outline:2px solid var(--ok);outline-offset:1px}.pop{display:none;
position:absolute;left:0;top:100%;z-index:2;width:max-content;max-width:min(320px,80vw);white-space:pre-wrap;
background:var(--card);color:var(--ink);border:1px solid var(--dim);border-radius:6px;padding:6px 10px;
font-size:.8rem;line-height:1.5}.tok:hover>.pop,.tok:focus>.pop{display:block}.tok:focus-visible{
outline:2px solid var(--c0)}.lens td,.lens th{padding:3px 5px;white-space:pre;font-size:.78rem;
border:1px solid var(--line)}.lens td{background:color-mix(in srgb,var(--c0) calc(var(--a)*55%),transparent)}
.lens .here{outline:2px solid var(--ok);outline-offset:-2px}details{margin:8px 0}summary{cursor:pointer}
.array{background:#fff;color-scheme:light}.examples td{white-space:pre-wrap;overflow-wrap:anywhere}"""
NAMES = {
    "gradient_x_input": "Gradient × input",
    "integrated_gradients": "Integrated gradients",
    "leave_one_out": "Leave-one-out",
    "rollout": "Attention rollout",
}
METHODS = ("gradient_x_input", "integrated_gradients", "leave_one_out")
MOST_COLUMNS = 24
"""Tokens in the table of the lens: the last ones up to the explained place."""
TITLES = {
    "answer": "Why “{output}” follows",
    "masked": "Why “{output}” is expected",
    "tag": "Why “{word}” is tagged {output}",
    "label": "Why the label is {output}",
}


def write_explained(path: Path, record: Mapping[str, Any]) -> Path:
    """Write the page of a record (`evals.explain.record`), which has its `audit` by now."""
    sections = [
        ("What is explained", *_head(record)),
        ("Predictions", *_predictions(record)),
        ("Attribution", *_attributions(record)),
    ]
    drawn, scripts = _attention(record)
    sections.append(("Attention", *drawn))
    sections.append(("Logit lens", *_lens(record)))
    sections.append(("Training examples", *_examples(record)))
    sections.append(("Audit", *_audit(record)))
    first = record["attributions"][0]["output"]
    title = TITLES[record["kind"]].format(output=_seen(first).strip(), word=record["explained"]["word"])
    return write(path, title, sections, STYLE, scripts)


def _head(record: Mapping[str, Any]) -> list[Html]:
    first, place = record["attributions"][0], record["explained"]["place"]
    there = next(p for p in record["predictions"] if p["place"] == place)
    figures = {
        "Explained": (
            _seen(first["output"]),
            f"of {record['explained']['word']!r}" if _labels(record) else "",
        ),
        "Probability": (first["probability"], f"{first['logprob']:.4g} nats"),
        "Rank": there["rank"],
        "Entropy": (there["entropy"], "nats, of the distribution there"),
    }
    return [facts(figures)]


def _labels(record: Mapping[str, Any]) -> bool:
    return record["kind"] in ("tag", "label")


def _seen(token: str) -> str:
    """A token with white space that can be seen."""
    blank = token if token.strip() else token.replace(" ", "␣")
    return blank.replace("\n", "↵").replace("\t", "→")


def _token(words: str, amount: float, note: str, kinds: str = "") -> str:
    """One token: coloured by an amount from -1 to 1, with a note on hover and focus."""
    sign = " minus" if amount < 0 else ""
    style = f'style="--a:{min(abs(amount), 1.0):.3f}"'
    body = escaped(words).replace("\n", "↵\n")
    pop = f'<span class="pop" role="tooltip">{escaped(note)}</span>'
    return f'<span class="tok{sign}{kinds}" tabindex="0" {style}>{body}{pop}</span>'


def _tokens(parts: Sequence[str]) -> Html:
    return Html(f'<div class="card toks" dir="auto">{"".join(parts)}</div>')


def _predictions(record: Mapping[str, Any]) -> list[str]:
    made = {p["place"] + (record["kind"] == "answer"): p for p in record["predictions"]}
    asked = record["explained"]["place"] + (record["kind"] == "answer")
    parts = []
    for place, token in enumerate(record["tokens"]):
        one = made.get(place)
        kinds = (" frame" if token["part"] == "control" else "") + (" asked" if place == asked else "")
        if one is None:
            parts.append(
                _token(token["text"], 0.0, f"{_seen(token['text'])}\nnothing is predicted here", kinds)
            )
            continue
        words = one["text"] if record["kind"] == "masked" else token["text"]
        parts.append(_token(words, one["probability"], _note(one), kinds))
    about = {
        "answer": "Each token is coloured by the probability that the model gave it before it was read.",
        "masked": "Each token is coloured by its probability where it alone is hidden from the model.",
        "tag": "Words are coloured by the probability of their tag.",
        "label": "The token where the label is predicted is coloured by its probability.",
    }[record["kind"]]
    rows = [
        {
            "place": p["place"],
            "token": _seen(p["text"]),
            **({"label": p["output"]} if _labels(record) else {}),
            "probability": p["probability"],
            "rank": p["rank"],
            "entropy": p["entropy"],
            "likeliest": ", ".join(f"{_seen(name)} {share:.2f}" for name, share in p["top"]),
        }
        for p in record["predictions"]
    ]
    numbers = table(rows, "Probability, rank and entropy (nats) of each", ["probability"])
    return [
        about + " Point at one, or reach it with the tab key, for its rank, its entropy and the likeliest.",
        _tokens(parts),
        _folded("All numbers", numbers),
    ]


def _note(one: Mapping[str, Any]) -> str:
    lines = [
        f"{_seen(one['output'])}  p {one['probability']:.4g}, rank {one['rank']}, H {one['entropy']:.3g}"
    ]
    return "\n".join([*lines, *(f"  {_seen(name)}  {share:.3g}" for name, share in one["top"])])


def _folded(name: str, part: str) -> Html:
    return Html(f"<details><summary>{escaped(name)}</summary>{part}</details>")


def _attributions(record: Mapping[str, Any]) -> list[str]:
    baseline = record["audit"]["settings"]["baseline"]
    parts: list[str] = [
        "How much each token does for the log-probability: blue ones raise it, orange ones lower it. "
        f"Gradients compare with a baseline of {baseline} in the place of every embedding of the text; "
        "control tokens are the frame and stay. Leave-one-out takes a token away"
        + (" (a mask stands in its place)." if record["audit"]["settings"]["left_out"] == "masked" else ".")
    ]
    for one in record["attributions"]:
        size = f"log-probability {one['logprob']:.4g} nats, {one['baseline_logprob']:.4g} for the baseline"
        sure = (
            f"{one['steps']} steps: their sum is within {one['error']:.2%} of the difference"
            if one["reached"]
            else f"still off by {one['error']:.1%} of the difference after {one['steps']} steps: take care"
        )
        parts.append(Html(f"<h3>{escaped(_seen(one['output']))} <small>{escaped(size)}</small></h3>"))
        for method in METHODS:
            more = f" ({sure})" if method == "integrated_gradients" else ""
            parts.append(_coloured(record, NAMES[method] + more, one[method]))
        parts.append(_folded("All numbers", _attribution_table(record, one)))
        parts.append(_agreement(one))
    return parts


def _coloured(record: Mapping[str, Any], name: str, values: Sequence[float]) -> Html:
    """The text, coloured by these values of its tokens."""
    most = max(map(abs, values), default=0.0) or 1.0
    parts = [
        _token(
            token["text"], value / most, f"{_seen(token['text'])}  {value:.4g}",
            " frame" if token["part"] == "control" else "",
        )
        for token, value in zip(record["tokens"], values, strict=False)  # of an answer, up to the place
    ]  # fmt: skip
    return Html(f"<p><small>{escaped(name)}</small></p>{_tokens(parts)}")


def _attribution_table(record: Mapping[str, Any], one: Mapping[str, Any]) -> Html:
    columns = {name: one.get(method) or record.get(method) for method, name in NAMES.items()}
    rows = [
        {"place": i, "token": _seen(token["text"])}
        | {n: values[i] for n, values in columns.items() if values}
        for i, token in enumerate(record["tokens"][: len(one["leave_one_out"])])
    ]
    return table(rows, "Nats of log-probability; rollout: share of attention")


def _agreement(one: Mapping[str, Any]) -> Html:
    rows = [
        {
            "methods": " and ".join(NAMES[m].lower() for m in pair["methods"]),
            "Spearman": pair["spearman"],
            "Kendall": pair["kendall"],
        }
        for pair in one["agreement"]
    ]
    return table(rows, "Agreement of their ranks over the text's tokens (1: same order, -1: reversed)")


def _attention(record: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Rollout and maps, and the scripts that these need."""
    parts: list[str] = []
    if record["rollout"] is not None:
        parts.append(_coloured(record, NAMES["rollout"] + ", at the explained place", record["rollout"]))
    values = record["attention"]
    if values is None:
        why = "they are too many to draw" if parts else "this model's attention does not show them"
        return [*parts, f"There are no maps of the layers: {why}."], []
    names = [f"{i} {_seen(token['text'])}" for i, token in enumerate(record["tokens"])]
    axes = ("layer", "head", "token", "attends to")
    drawn, script = maps(np.asarray(values["shares"], np.float32), axes, {2: names, 3: names})
    about = (
        "Rollout multiplies the layers, each half attention and half the token itself (Abnar and Zuidema "
        "2020). Below is what each token (row) takes from each token (column), "
        + ("for each layer and head" if values["of"] == "heads" else "as a mean over the heads of each layer")
        + ", counted from 0. Attention says where a model looks, not why it decides (Jain and Wallace 2019)."
    )
    without = Html(
        "<noscript><p>The maps need JavaScript; their numbers are beside this page.</p></noscript>"
    )
    return [about, *parts, drawn, without], [script]


def _lens(record: Mapping[str, Any]) -> list[str]:
    lens, place = record["lens"], record["explained"]["place"]
    if not lens:
        return ["The model does not say what its head would read after each layer, so there is no lens."]
    first = max(0, place + 1 - MOST_COLUMNS)
    columns = range(first, len(lens[0]["likeliest"]) if record["kind"] != "answer" else place + 1)
    columns = columns[:MOST_COLUMNS] if record["kind"] != "answer" else columns
    heads = "".join(f'<th scope="col">{escaped(_seen(record["tokens"][t]["text"]))}</th>' for t in columns)
    lines = []
    for number, layer in enumerate(lens):
        cells = []
        for t in columns:
            name, share = layer["likeliest"][t]
            here = ' class="here"' if t == place else ""
            cells.append(f'<td{here} style="--a:{share:.3f}" title="{share:.3g}">{escaped(_seen(name))}</td>')
        lines.append(f'<tr><th scope="row">{_layer(number)}</th>{"".join(cells)}</tr>')
    grid = (
        f'<table class="lens"><thead><tr><th></th>{heads}</tr></thead><tbody>{"".join(lines)}</tbody></table>'
    )
    rows = [
        {
            "after": _layer(number),
            "probability": layer["probability"],
            "rank": layer["rank"],
            "entropy": layer["entropy"],
            "likeliest": ", ".join(f"{_seen(name)} {share:.2f}" for name, share in layer["top"]),
        }
        for number, layer in enumerate(lens)
    ]
    about = (
        "What the model's head makes of the stream after each layer (nostalgebraist 2020): the likeliest at "
        "each token, coloured by its probability; the explained place is framed. The last row is the model's "
        "own."
    )
    caption = f"{_seen(record['attributions'][0]['output'])} at the explained place, layer by layer"
    return [
        about,
        Html(f'<div class="card" tabindex="0">{grid}</div>'),
        table(rows, caption),
    ]


def _layer(number: int) -> str:
    return f"layer {number}" if number else "embedding"


def _examples(record: Mapping[str, Any]) -> list[str]:
    found = record["examples"]
    if "missing" in found:
        return [f"None were looked at: {found['missing']}."]
    parts: list[str] = [
        f"Of the first {found['looked_at']:,} documents that training read (its first epoch has "
        f"{found['rows']:,} rows). Influence is the dot product of the gradients of the example's loss and "
        "of this prediction's, by the output projection alone (TracIn; Pruthi et al. 2020): above 0, to "
        "learn the example makes the prediction likelier. Similarity is the cosine of mean final features."
    ]
    for name, caption in (
        ("for", "Most in favour"), ("against", "Most against"), ("alike", "Most alike in features")
    ):  # fmt: skip
        rows = [
            {"row": e["row"], "document": e["document"], "influence": e["influence"],
             "similarity": e["similarity"], "text": e["text"]} for e in found[name]
        ]  # fmt: skip
        if rows:
            parts.append(Html(f'<div class="examples">{table(rows, caption)}</div>'))
    if not found["for"] and not found["against"]:
        parts.append("This run's loss is not that of its rows' targets, so influence is not measured.")
    return parts


def _audit(record: Mapping[str, Any]) -> list[str]:
    audit = record["audit"]
    environment = audit["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    rows = [
        {"what": "model", "value": f"{audit['model']} of {audit['run']}, step {audit['step']}"},
        {"what": "parameters", "value": f"digest {audit['parameters']}"},
        {"what": "tokenizer", "value": f"digest {audit['tokenizer']}"},
        {"what": "training data", "value": audit["data"] or "not looked at"},
        {"what": "settings", "value": ", ".join(f"{k} {_plain(v)}" for k, v in audit["settings"].items())},
        {"what": "versions", "value": f"{versions}, Python {environment['python']}"},
        {"what": "code", "value": environment["git"] or "not in a repository"},
        {"what": "device", "value": f"{environment['devices']} × {environment['device']}, float32"},
    ]
    return [
        table(rows, "What this page was made of"),
        text(f"The same numbers are in `{audit['json']}`. To make the page again:"),
        commands(audit["command"]),
    ]


def _plain(value: Any) -> str:
    return shown(value) if isinstance(value, float) and math.isfinite(value) else str(value)
