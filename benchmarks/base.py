"""A small pretrained GPT that the benchmarks of tasks, measures and continual learning start from.

    python -m benchmarks.base ../shared/data --workdir /tmp/bench [--steps 600]

A tokenizer of 8,000 pieces and a decoder of 3.4 M parameters, trained on English and Chinese text: web pages,
Shakespeare, a novel, sentences of the film reviews, passages of XQuAD, and four fifths of Tatoeba's pairs as
single sentences. No question, answer, label, instruction or reference of any benchmark is in it. Finished
parts are kept, so that all benchmarks of one folder share them.
"""

from __future__ import annotations

import csv
import itertools
import json
from pathlib import Path
from typing import Annotated, Any

import tyro

from jaxgpt.config import GPT, Compute, Optim, Run, Text, Train
from jaxgpt.data.prepare import prepare
from jaxgpt.files import read_json, write_jsonl
from jaxgpt.text.train import train_sentencepiece
from jaxgpt.train.loop import train

MODEL = GPT(
    vocab_size=8000, context=256, layers=4, width=192, heads=4, position="rope", norm="rmsnorm", mlp="swiglu",
    bias=False,
)  # fmt: skip
COMPUTE = Compute(dtype="float32")
HELD_OUT = 5
"""Every fifth pair of Tatoeba is left to validation and test."""


def pairs(data: Path) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Tatoeba's English-Chinese pairs for training, and those held out, told apart by their English side."""
    with (data / "tatoeba_en_zh.tsv").open(encoding="utf-8") as file:
        found = [(en, zh) for en, zh, *_ in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]
    held = set(sorted({en for en, _ in found})[::HELD_OUT])
    return [p for p in found if p[0] not in held], [p for p in found if p[0] in held]


def passages(data: Path, language: str) -> list[str]:
    """The passages of XQuAD."""
    articles: list[Any] = read_json(data / f"xquad.{language}.json", dict[str, Any], "bring it back")["data"]
    return [paragraph["context"] for article in articles for paragraph in article["paragraphs"]]


def documents(data: Path) -> list[str]:
    """What the base reads."""
    pages = [line for line in (data / "c4_300.jsonl").read_text("utf-8").splitlines() if line]
    plays = (data / "tinyshakespeare.txt").read_text("utf-8").split("\n\n")
    novel = (data / "hongloumeng.txt").read_text("utf-8")[:400_000].split("\n")
    reviews = [line.split("\t")[0] for line in (data / "sst2/train.tsv").read_text("utf-8").splitlines()]
    english, chinese = zip(*pairs(data)[0], strict=True)
    short = [*plays[: len(plays) // 2], *novel, *reviews, *dict.fromkeys(english), *dict.fromkeys(chinese)]
    grouped = ["\n".join(part) for part in itertools.batched(short, 20)]
    return (
        [json.loads(page)["text"] for page in pages] + passages(data, "en") + passages(data, "zh") + grouped
    )


def base_run(data: Path, workdir: Path, steps: int = 600) -> Run:
    """The run of the base, trained where it was not yet."""
    texts = workdir / "base.jsonl"
    if not (workdir / "tokenizer").exists():
        found = documents(data)
        write_jsonl(texts, [{"text": text} for text in found])
        train_sentencepiece(found, MODEL.vocab_size).save(workdir / "tokenizer")
    if not (workdir / "corpus").exists():
        prepare([str(texts)], workdir / "corpus", tokenizer=str(workdir / "tokenizer"), validation=0.02)
    run = Run(
        name="base",
        runs=str(workdir / "runs"),
        model=MODEL,
        compute=COMPUTE,
        data=Text(path=str(workdir / "corpus")),
        optim=Optim(peak_lr=2e-3, final_lr=2e-4, warmup_steps=50),
        train=Train(steps=steps, batch_size=16, eval_every=steps, save_every=steps, track=()),
    )
    train(run)
    return run


def main(data: Annotated[Path, tyro.conf.Positional], *, workdir: Path, steps: int = 600) -> None:
    workdir.mkdir(parents=True, exist_ok=True)
    print(base_run(data, workdir, steps).folder)


if __name__ == "__main__":
    tyro.cli(main)
