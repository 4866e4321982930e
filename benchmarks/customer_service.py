"""Questions answered from documents, on XQuAD: what is found, what is refused, what is cited.

    python -m benchmarks.customer_service ../shared/data --workdir /tmp/service [--steps 1500]

The documents are the passages of every second article, English and Chinese. Of their questions, those on
every third passage calibrate `least` (95 % of them stay answered), and the others are measured;
questions on the remaining articles have no answer in the documents. No model takes part in that.

Then the whole service, on a small made-up shop: a model of about a million parameters learns from
nothing to answer customers from the passages before their question (`tasks.Support`), and is asked about
goods whose names and facts it has never seen, with the documents and without. It shows that training,
serving and scoring agree on what stands before a question, and not how well a large model reads: the
sentences are templates.
"""

from __future__ import annotations

import json
import random
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from benchmarks.common import machine
from jaxgpt.config import GPT, Compute, Knowledge, Optim, Run, Suite, Train
from jaxgpt.data.knowledge import open_library
from jaxgpt.evals.suite import Scores, run_suite
from jaxgpt.files import read_json, write_jsonl, write_text
from jaxgpt.sample.load import load_trained
from jaxgpt.serve.documents_command import least_of, shares_of
from jaxgpt.tasks import Support
from jaxgpt.tasks.support import UNKNOWN
from jaxgpt.text.train import train_sentencepiece
from jaxgpt.train.loop import train

LANGUAGES = ("en", "zh")
KEEP = 0.95
MODEL = GPT(
    vocab_size=700, context=192, layers=3, windows=(2, 0, 0), width=128, heads=4, position="rope",
    norm="rmsnorm", mlp="swiglu", bias=False,
)  # fmt: skip
FACTS = {
    "price": ("The {good} costs {n} crowns.", "What does the {good} cost?", "It costs {n} crowns."),
    "colour": ("The {good} comes in {colour}.", "Which colour has the {good}?", "It comes in {colour}."),
    "days": (
        "Delivery of the {good} takes {n} days.",
        "How long is delivery of the {good}?",
        "It takes {n} days.",
    ),
    "town": ("The {good} is made in {town}.", "Where is the {good} made?", "It is made in {town}."),
}
COLOURS = ("red", "blue", "green", "grey", "white", "black", "pink", "brown")


def refusals(data: Path, workdir: Path, language: str) -> dict[str, Any]:
    """What part of the questions is answered and refused with a calibrated limit."""
    articles: list[Any] = read_json(data / f"xquad.{language}.json", dict[str, Any], "bring it back")["data"]
    inside, outside = articles[::2], articles[1::2]
    folder = workdir / f"xquad-{language}"
    passages = [(a["title"], p) for a in inside for p in a["paragraphs"]]
    write_jsonl(folder / "documents.jsonl", [{"title": t, "text": p["context"]} for t, p in passages])
    known = Knowledge(documents=(str(folder),), passages=1, cited=True)
    library = open_library(known)
    asked = [list(p["qas"]) for _, p in passages]
    first = [q["question"] for group in asked[::3] for q in group]
    rest = [q for i, group in enumerate(asked) if i % 3 for q in group]
    others = [q["question"] for a in outside for p in a["paragraphs"] for q in p["qas"]]
    least = least_of(shares_of(library, first), KEEP)
    strict = open_library(replace(known, least=least, passages=3))
    near = [strict.near(q["question"]) for q in rest]
    gold = [q["answers"][0]["text"] for q in rest]
    hits = [[answer in p.text for p in found] for found, answer in zip(near, gold, strict=True)]
    return {
        "language": language,
        "least": least,
        "answered, of those that the documents answer": f"{sum(map(bool, near))} of {len(rest)}",
        "right passage first, of those answered": sum(bool(h) and h[0] for h in hits) / sum(map(bool, near)),
        "right passage of three": sum(any(h) for h in hits) / sum(map(bool, near)),
        "refused, of those on other articles": f"{sum(not strict.near(q) for q in others)} of {len(others)}",
    }


def shop(drawn: random.Random, goods: int) -> tuple[list[str], list[dict[str, Any]]]:
    """Sentences of documents, and dialogues about them; for every sixth of these no answer is there."""
    sentences, dialogues = list[str](), list[dict[str, Any]]()
    for _ in range(goods):
        good = "".join(drawn.choice("bdfgklmnprst") + drawn.choice("aeiou") for _ in range(3))
        town = "".join(drawn.choice("BDFGKLMNPRST".lower()) + drawn.choice("aeiou") for _ in range(2)).title()
        values = {"good": good, "n": drawn.randrange(2, 100), "colour": drawn.choice(COLOURS), "town": town}
        for fact, question, answer in FACTS.values():
            missing = drawn.random() < 1 / 6
            sentences += [] if missing else [fact.format_map(values)]
            turns = [("user", question.format_map(values)), ("assistant", answer.format_map(values))]
            dialogues.append(
                {"messages": [{"role": r, "content": c} for r, c in turns], "known": not missing}
            )
    return sentences, dialogues


def make_shop(workdir: Path) -> None:
    """The documents, dialogues and the tokenizer of the shop; goods of the test are new ones."""
    if (workdir / "tokenizer").is_dir():
        return
    every = list[str]()
    for seed, (split, goods) in enumerate((("train", 4000), ("test", 100))):
        sentences, dialogues = shop(random.Random(seed), goods)
        write_text(workdir / f"shop-{split}" / "help.txt", "\n\n".join(sentences) + "\n")
        for name, kinds in (("all", (True, False)), ("known", (True,)), ("unknown", (False,))):
            part = [{"messages": d["messages"]} for d in dialogues if d["known"] in kinds]
            write_jsonl(workdir / f"{split}.{name}.jsonl", part)
        every += sentences + [m["content"] for d in dialogues for m in d["messages"]]
    texts = [*every[:20000], *(f"[{i}]" for i in range(1, 5)), UNKNOWN["en"]]
    train_sentencepiece(texts, MODEL.vocab_size).save(workdir / "tokenizer")


def task(workdir: Path, split: str, part: str, known: bool) -> Support:
    """Dialogues of the shop with its documents, or without."""
    files = (str(workdir / f"{split}.{part}.jsonl"),)
    folder = str(workdir / f"shop-{split}")
    return Support(
        train=files if split == "train" else (),
        test=files if split == "test" else (),
        validation_fraction=0.02,
        tokenizer=str(workdir / "tokenizer"),
        metrics=("exact_match", "f1", "cited"),
        max_new_tokens=24,
        knowledge=Knowledge(documents=(folder,), passages=4, cited=True) if known else None,
    )


def trained(workdir: Path, steps: int) -> Run:
    """The tuned run."""
    run = Run(
        name=f"service-{steps}",
        runs=str(workdir / "runs"),
        model=MODEL,
        compute=Compute(dtype="float32"),
        data=task(workdir, "train", "all", True),
        optim=Optim(peak_lr=4e-3, final_lr=2e-4, warmup_steps=50),
        train=Train(steps=steps, batch_size=16, eval_every=steps, save_every=steps, track=()),
    )
    if not (run.folder / "report.html").is_file():
        train(run)
    return run


def show(scores: list[Scores]) -> None:
    """Print what the shop's customers were answered."""
    print("\n| questions on new goods | asked | exact match | F1 | right mark | says that none has it |")
    print("|---|---:|---:|---:|---:|---:|")
    for one in scores:
        figures = [one.figures[name] for name in ("exact_match", "f1", "cited")]
        cells = [f"{f.value:.1f} ({f.low:.1f} to {f.high:.1f})" for f in figures]
        none = 100 * sum(p.answer == UNKNOWN["en"] for p in one.predictions) / len(one.predictions)
        print(f"| {one.name} | {len(one.predictions)} | {' | '.join(cells)} | {none:.1f} |")


def main(
    data: Annotated[Path, tyro.conf.Positional], *, workdir: Path, steps: int = 1500, out: str = ""
) -> None:
    begun = time.perf_counter()
    found = [refusals(data, workdir, language) for language in LANGUAGES]
    about = {"command": " ".join(sys.argv), **machine()}
    print(f"\n`{about['command']}`  {about['cpu']}, load {about['load']}\n")
    for row in found:
        print("; ".join(f"{k}: {v:.3f}" if isinstance(v, float) else f"{k}: {v}" for k, v in row.items()))
    scores: list[Scores] = []
    if steps:
        make_shop(workdir)
        run = trained(workdir, steps)
        ways = {
            "with documents": ("known", True),
            "without": ("known", False),
            "not in them": ("unknown", True),
        }
        tasks = tuple(task(workdir, "test", part, known) for part, known in ways.values())
        scores = run_suite(load_trained(run.folder), Suite(name="shop", tasks=tasks, names=tuple(ways)))
        show(scores)
    print(f"\n{time.perf_counter() - begun:.0f} s")
    if out:
        rows = [{"name": s.name, "figures": s.figures} for s in scores]
        with Path(out).open("a", encoding="utf-8") as file:
            file.write(json.dumps(about | {"xquad": found, "shop": rows}, default=vars) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
