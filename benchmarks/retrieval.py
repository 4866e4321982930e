"""What passages before a question bring to a small model on XQuAD: none, those of BM25, the right ones.

    python -m benchmarks.retrieval ../shared/data --workdir /tmp/retrieval [--steps 1000]

The documents are all sentences of XQuAD's passages, English and Chinese. A model of 0.9 M parameters learns,
from nothing, the questions on four fifths of the articles, each without a passage, with BM25's best
sentence, and with the sentence that holds the answer, in equal shares; and, as half of its rows, to copy
what follows some words of a sentence. Its first layer sees one token back alone, which brings copying about
much sooner. The questions on the other articles are then asked in each of these ways: nothing differs but
what stands before them. `quoted` answers keep a rule (`sample.constrained`): they are runs of words of the
passage; `by chance` is any such run. Finished parts are kept in the folder; `--out` adds the figures to a
file as one line of JSON.
"""

from __future__ import annotations

import itertools
import json
import random
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from benchmarks.common import machine
from jaxgpt.config import GPT, Compute, Knowledge, Mix, Optim, Run, Suite, Train
from jaxgpt.data.knowledge import open_library
from jaxgpt.data.readers.tasks import evaluation_samples, question
from jaxgpt.evals.metrics import Prediction, compare
from jaxgpt.evals.suite import Scores, run_suite, score
from jaxgpt.files import read_json, write_jsonl, write_text
from jaxgpt.sample.constrained import choices
from jaxgpt.sample.encode import RunEncoder, load_encoder
from jaxgpt.sample.generate import Generator
from jaxgpt.sample.load import load_trained
from jaxgpt.tasks import OpenQA
from jaxgpt.tasks.fields import MARKS
from jaxgpt.text.train import train_sentencepiece
from jaxgpt.train.loop import train

LANGUAGES = ("en", "zh")
HELD_OUT = 5
"""Every fifth article is asked about."""
WAYS = ("none", "bm25", "gold")
_END = {"en": re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'(])"), "zh": re.compile(r"(?<=[。！？；])")}
_WORD = {"en": re.compile(r"\S+"), "zh": re.compile(r"\S")}
MODEL = GPT(
    vocab_size=4000, context=192, layers=2, windows=(2, 0), width=128, heads=4, position="rope",
    norm="rmsnorm", mlp="swiglu", bias=False,
)  # fmt: skip
CUE, AFTER = {"en": 3, "zh": 4}, {"en": 16, "zh": 24}
"""Words (in Chinese characters) that copying is asked by, and that are copied."""
ROOM = 32
"""Tokens of an answer that is quoted."""
LONGEST = {"en": 6, "zh": 12}
"""Words (in Chinese characters) of an answer that is quoted."""


def sentences(text: str, language: str) -> Iterator[tuple[int, str]]:
    """(where it begins, sentence) of a passage."""
    edges = [0, *(m.end() for m in _END[language].finditer(text)), len(text)]
    for a, b in itertools.pairwise(edges):
        if text[a:b].strip():
            yield a, " ".join(text[a:b].split())


def questions(data: Path, language: str) -> dict[str, list[dict[str, Any]]]:
    """The questions of each split with their right sentence, and all sentences of the passages."""
    found: dict[str, list[dict[str, Any]]] = {"train": [], "test": [], "text": []}
    articles: list[Any] = read_json(data / f"xquad.{language}.json", dict[str, Any], "bring it back")["data"]
    for number, article in enumerate(articles):
        split = "test" if number % HELD_OUT == HELD_OUT - 1 else "train"
        for paragraph in article["paragraphs"]:
            parts = list(sentences(paragraph["context"], language))
            found["text"] += [{"text": text, "split": split} for _, text in parts]
            for asked in paragraph["qas"]:
                answers = asked["answers"]
                gold = next(text for at, text in reversed(parts) if at <= answers[0]["answer_start"])
                texts = [*dict.fromkeys(a["text"] for a in answers)]
                if any(one["question"] == asked["question"] for one in found["test"]):
                    continue  # the same of another passage
                found[split].append({"question": asked["question"], "answers": texts, "gold": gold})
    return found


def copies(texts: list[str], language: str, seed: int, each: int = 4) -> Iterator[dict[str, Any]]:
    """Questions whose answer is what follows some words of a sentence."""
    drawn, cue, after = random.Random(seed), CUE[language], AFTER[language]
    for text in texts:
        words = list(_WORD[language].finditer(text))
        for _ in range(each if len(words) > cue + 1 else 0):
            at = drawn.randrange(len(words) - cue)
            last = words[min(at + cue + after, len(words)) - 1].end()
            asked, answer = (
                text[words[at].start() : words[at + cue - 1].end()],
                text[words[at + cue].start() : last],
            )
            yield {"question": f"{asked} …", "answers": [answer], "gold": text}


def make_files(data: Path, workdir: Path) -> None:
    """The documents, the questions and the tokenizer, where they are not there yet."""
    if (workdir / "tokenizer").is_dir():
        return
    every = list[str]()
    for language in LANGUAGES:
        held = questions(data, language)
        texts = [*dict.fromkeys(one["text"] for one in held["text"])]
        every += [*texts, *(one["question"] for one in held["train"])]
        write_text(workdir / "documents" / f"{language}.txt", "\n\n".join(texts) + "\n")
        seen = [*dict.fromkeys(one["text"] for one in held["text"] if one["split"] == "train")]
        write_jsonl(workdir / "copies" / f"{language}.jsonl", copies(seen, language, 0))
        for split in ("test", "train"):
            write_jsonl(workdir / "questions" / f"{split}.{language}.jsonl", held[split])
    train_sentencepiece(every, MODEL.vocab_size).save(workdir / "tokenizer")


def task(workdir: Path, language: str, way: str) -> OpenQA:
    """The questions of a language, asked in a way."""
    known = Knowledge(documents=(str(workdir / "documents"),), passages=1)
    return OpenQA(
        train=(str(workdir / "questions" / f"train.{language}.jsonl"),),
        validation_fraction=0.02,
        test=(str(workdir / "questions" / f"test.{language}.jsonl"),),
        tokenizer=str(workdir / "tokenizer"),
        language=language,  # type: ignore[arg-type]
        prompts=("{context}{question}",),
        held_out="{context}{question}",
        passages="gold" if way == "gold" else "",
        knowledge=known if way == "bm25" else None,
        max_new_tokens=24,
    )


def trained_run(data: Path, workdir: Path, steps: int) -> Run:
    """The tuned run, trained where it was not yet."""
    sources = {f"{way}-{language}": task(workdir, language, way) for language in LANGUAGES for way in WAYS}
    for language in LANGUAGES:
        files = (str(workdir / "copies" / f"{language}.jsonl"),)
        one = task(workdir, language, "gold")
        sources[f"copies-{language}"] = replace(one, train=files, test=())
    weights = tuple(3.0 if name.startswith("copies") else 1.0 for name in sources)
    run = Run(
        name=f"retrieval-{steps}",
        runs=str(workdir / "runs"),
        model=MODEL,
        compute=Compute(dtype="float32"),
        data=Mix(sources=tuple(sources.values()), names=tuple(sources), weights=weights),
        optim=Optim(peak_lr=4e-3, final_lr=2e-4, warmup_steps=30),
        train=Train(steps=steps, batch_size=16, eval_every=steps, save_every=steps, track=()),
    )
    if not (run.folder / "report.html").is_file():
        train(run)
    return run


def spans(passage: str, language: str) -> list[str]:
    """The runs of words (in Chinese of characters) of a passage, without punctuation at their ends."""
    words = list(_WORD[language].finditer(passage))
    found = [
        passage[words[a].start() : words[b].end()].strip(MARKS)
        for a in range(len(words))
        for b in range(a, min(a + LONGEST[language], len(words)))
    ]
    return [*dict.fromkeys(filter(None, found))]


def quoted(generator: Generator, one: OpenQA, random_seed: int | None = None) -> list[Prediction]:
    """Answers that are runs of words of the passage, by a rule; with a seed, any of them by chance."""
    samples, drawn = [sample for _, sample in evaluation_samples(one, "test")], random.Random(random_seed)
    asked = [question(one, sample, one.held_out) for sample in samples]
    before = (
        t[-1]["content"].removesuffix(s.values["question"]) for t, s in zip(asked, samples, strict=True)
    )
    allowed = [spans(text.strip().removeprefix("[1] "), one.language) for text in before]
    texts = [drawn.choice(some or [""]) for some in allowed]
    if random_seed is None:
        ids = generator.dialogues(asked)["prompts"]
        fit = [i for i, prompt in enumerate(ids) if len(prompt) < generator.context - ROOM and allowed[i]]
        texts = [""] * len(ids)  # also where a passage leaves no room
        for part in (fit[at : at + 32] for at in range(0, len(fit), 32)):
            rules = [choices(allowed[i]) for i in part]
            call: Any = {"prompts": [ids[i] for i in part], "apart": True, "rules": rules}
            made = generator.generate(**call, decoding=one.decoding, max_new_tokens=ROOM)
            for i, completion in zip(part, made, strict=True):
                texts[i] = completion.text
    prompts = (turns[-1]["content"] for turns in asked)
    return [
        Prediction(sample, prompt, text, one.extract(text, sample), one.language)
        for sample, prompt, text in zip(samples, prompts, texts, strict=True)
    ]


def recall(
    workdir: Path, language: str, encode: RunEncoder | None = None, counts: tuple[int, ...] = (1, 3, 5)
) -> dict[int, float]:
    """Share of the held-out questions (%) whose right sentence is among so many of the best, by BM25 or by
    the vectors of an encoder.
    """
    known = Knowledge(documents=(str(workdir / "documents"),), passages=max(counts))
    library = open_library(known, encode)
    assert library.retriever is not None
    lines = (workdir / "questions" / f"test.{language}.jsonl").read_text("utf-8").splitlines()
    ranks = []
    for one in map(json.loads, lines):
        found = [" ".join(p.text.split()) for p in library.retriever.search(one["question"], max(counts))]
        ranks.append(found.index(one["gold"]) if one["gold"] in found else max(counts))
    return {k: 100 * sum(rank < k for rank in ranks) / len(ranks) for k in counts}


def main(
    data: Annotated[Path, tyro.conf.Positional], *, workdir: Path, steps: int = 1000, out: str = ""
) -> None:
    workdir.mkdir(parents=True, exist_ok=True)
    begun = time.perf_counter()
    make_files(data, workdir)
    run = trained_run(data, workdir, steps)
    tuned = time.perf_counter()
    names = tuple(f"{way}, {language}" for language in LANGUAGES for way in WAYS)
    tasks = tuple(task(workdir, language, way) for language in LANGUAGES for way in WAYS)
    suite = Suite(name="xquad", tasks=tasks, names=names)
    trained = load_trained(run.folder)
    scores = {one.name: one for one in run_suite(trained, suite)}
    generator = Generator(run.model, run.compute, trained.params, trained.tokenizer, mesh=trained.mesh)
    for language in LANGUAGES:
        for way, seed in (("bm25", None), ("gold", None), ("gold", 0)):
            one = task(workdir, language, way)
            name = f"{way}, {'by chance' if seed is not None else 'quoted'}, {language}"
            scores[name] = score(name, one, quoted(generator, one, seed), suite)
    encode = load_encoder(run.folder)
    found = {f"BM25, {language}": recall(workdir, language) for language in LANGUAGES}
    found |= {
        f"vectors of the model, {language}": recall(workdir, language, encode) for language in LANGUAGES
    }
    seconds = {"training": round(tuned - begun), "answers": round(time.perf_counter() - tuned)}
    report(scores, found, seconds, suite, out)


def report(
    scores: dict[str, Scores],
    found: dict[str, dict[int, float]],
    seconds: dict[str, int],
    suite: Suite,
    out: str,
) -> None:
    """Print the tables and write them as one JSON line."""
    record = {"command": " ".join(sys.argv), **machine(), "seconds": seconds, "recall": found, "scores": {}}
    print(f"\n`{record['command']}`  {record['cpu']}, seconds: {seconds}\n")
    print("| recall, % | @1 | @3 | @5 |\n|---|---:|---:|---:|")
    for name, by in found.items():
        print(f"| {name} | " + " | ".join(f"{value:.1f}" for value in by.values()) + " |")
    head = "| passage, language | questions | exact match | F1 | F1 less that of none, p |"
    print(f"\n{head}\n|---|---:|---:|---:|---:|")
    for name, one in scores.items():
        em, f1 = one.figures["exact_match"], one.figures["f1"]
        alone = scores[f"none, {name.rpartition(' ')[2]}"]
        gain = f1.value - alone.figures["f1"].value
        metric = one.metrics["f1"]
        p = compare(metric, one.rows["f1"], alone.rows["f1"], suite.resamples, suite.seed).p
        record["scores"][name] = {"exact_match": em, "f1": f1, "gain": gain, "p": p}
        print(
            f"| {name} | {len(one.predictions)} | {em.value:.1f} ({em.low:.1f} to {em.high:.1f}) | "
            f"{f1.value:.1f} ({f1.low:.1f} to {f1.high:.1f}) | {gain:+.1f}, {p:.3f} |"
        )
    if out:
        with Path(out).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
