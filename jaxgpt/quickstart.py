"""`jaxgpt quickstart`: the whole recipe on the documentation that every installation carries.

Corpus, tokenizer, shards, pretraining, instruction tuning with the loss on the answers alone,
evaluation before and after, a report: no network, no data file. Every stage leaves its result in
the work folder, so that running it again goes on where it was stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, TypedDict, cast

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jaxgpt.config import GPT, Chat, Compute, Optim, Run, Text, Train
from jaxgpt.errors import UserError
from jaxgpt.files import parse_json, read_json, write_json, write_jsonl
from jaxgpt.lock import LOCK, owned

log = logging.getLogger(__name__)

STATE = "quickstart.json"
"""Marks a work folder as ours, and holds the seconds spent on it."""
VOCAB = 2048
AGAIN = "remove the work folder and run the command again"
LENGTH = 256
TEST_QUESTIONS = 256
TRAIN_DIALOGUES = 64_000
SEED = 0


class State(TypedDict):
    """What STATE holds."""

    seconds: Annotated[float, msgspec.Meta(ge=0)]


class Message(TypedDict):
    """A turn of a dialogue."""

    role: str
    content: str


class Example(TypedDict):
    """A line of the test's questions, which are dialogues of one question and its answer."""

    messages: Annotated[list[Message], msgspec.Meta(min_length=2)]
    skill: str


def model() -> GPT:
    """A small decoder of today's form; rotary positions learn to copy sooner than learned ones."""
    return GPT(
        vocab_size=VOCAB,
        context=LENGTH,
        layers=4,
        heads=4,
        width=160,
        mlp_width=448,
        position="rope",
        norm="rmsnorm",
        mlp="swiglu",
        bias=False,
        qk_norm=True,
    )


def pretrain_run(workdir: Path) -> Run:
    """Pretraining on the documentation."""
    return Run(
        name="pretrain",
        runs=str(workdir / "runs"),
        model=model(),
        data=Text(path=str(workdir / "text")),
        optim=Optim(
            name="muon", muon_lr=0.01, peak_lr=3e-3, final_lr=3e-4, warmup_steps=20, schedule="linear"
        ),
        train=Train(steps=250, batch_size=8, eval_every=50, eval_batches=16, save_every=125),
        compute=Compute(dtype="auto"),
    )


def tune_run(workdir: Path) -> Run:
    """Instruction tuning from the best pretrained checkpoint, loss on the answers alone."""
    folder = workdir / "instructions"
    return Run(
        name="tune",
        runs=str(workdir / "runs"),
        init_from=str(workdir / "runs" / "pretrain"),
        model=model(),
        data=Chat(train=(str(folder / "train.jsonl"),), validation=(str(folder / "validation.jsonl"),)),
        optim=Optim(
            name="muon",
            muon_lr=0.01,
            peak_lr=3e-3,
            final_lr=1e-4,
            warmup_steps=20,
            schedule="linear",
            weight_decay=0.0,
        ),
        train=Train(steps=500, batch_size=8, eval_every=100, save_every=250),
        compute=Compute(dtype="auto"),
    )


def quickstart(*, workdir: Path = Path("quickstart")) -> int:
    """The whole recipe on this machine: about five minutes on two CPU cores.

    Trains a tokenizer and a small GPT on the documentation installed with Python, tunes it on
    instructions, measures it before and after, and shows how to talk to it.

    Args:
      workdir: where everything is written; running it again resumes.
    """
    say = Console(stderr=True, highlight=False).print
    _claim(workdir)
    with owned(workdir), _clock(workdir):
        say("[bold]1/6[/] reading the documentation installed with Python")
        _write_corpus(workdir)
        say("[bold]2/6[/] training a tokenizer and writing shards of token ids")
        _prepare(workdir)
        pretrain, tune = pretrain_run(workdir), tune_run(workdir)
        say(f"[bold]3/6[/] pretraining {_size(pretrain)} on {_tokens(pretrain)} tokens of text")
        _train(pretrain)
        say(f"[bold]4/6[/] tuning on {_tokens(tune)} tokens of dialogues, loss on the answers alone")
        _train(tune)
        say("[bold]5/6[/] asking questions that it has never seen, before and after tuning")
        with _quiet():
            results, answers = _evaluate(workdir, pretrain, tune)
    say("[bold]6/6[/] writing the report")
    results["seconds"] = round(_spent(workdir), 1)
    try:
        _goodbye(workdir, tune, results, answers)
    finally:  # shown also where it cannot be saved, saved also where it cannot be shown
        write_json(workdir / "results.json", results)
        with _quiet():
            _report(workdir, pretrain, tune, results, answers)
    return 0


@contextlib.contextmanager
def _clock(workdir: Path) -> Iterator[None]:
    """Add the time spent inside to what earlier calls spent on this folder."""
    before, start = _spent(workdir), time.perf_counter()
    try:
        yield
    finally:
        write_json(workdir / STATE, {"seconds": before + time.perf_counter() - start})


def _spent(workdir: Path) -> float:
    return read_json(workdir / STATE, State, AGAIN)["seconds"]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what was said before, when the same data and runs were read for training."""
    logger = logging.getLogger("jaxgpt")
    level = logger.level
    logger.setLevel(max(level, logging.WARNING))
    try:
        yield
    finally:
        logger.setLevel(level)


# ------------------------------------------------------------------------------------- the stages


def _claim(workdir: Path) -> None:
    """Make the folder, or refuse one that holds something else."""
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"workdir {str(workdir)!r} is a file; give a folder.")
    if workdir.exists() and any(p.name != LOCK for p in workdir.iterdir()) and not (workdir / STATE).exists():
        raise UserError(
            f"workdir {str(workdir)!r} holds other files; give an empty or new folder with --workdir."
        )
    workdir.mkdir(parents=True, exist_ok=True)
    if not (workdir / STATE).exists():
        write_json(workdir / STATE, {"seconds": 0.0})


def _write_corpus(workdir: Path) -> None:
    from jaxgpt import quickstart_data as data

    done = workdir / "instructions" / "test.jsonl"  # the last file of this stage
    if done.exists():
        return
    corpus = data.corpus()
    train, validation, test = data.instructions(corpus, TRAIN_DIALOGUES, TEST_QUESTIONS, SEED)
    done.parent.mkdir(exist_ok=True)
    write_jsonl(workdir / "corpus.jsonl", ({"text": text} for text in corpus.documents))
    write_jsonl(done.parent / "train.jsonl", train)
    write_jsonl(done.parent / "validation.jsonl", validation)
    write_jsonl(done, test)
    log.info("corpus: %s", ", ".join(f"{n:,} {what}" for what, n in corpus.report.items()))


def _prepare(workdir: Path) -> None:
    from jaxgpt.data.prepare import prepare
    from jaxgpt.data.train_tokenizer import train_tokenizer

    corpus = str(workdir / "corpus.jsonl")
    if not (workdir / "tokenizer").exists():
        train_tokenizer([corpus], workdir / "tokenizer", vocab_size=VOCAB)
    prepare([corpus], workdir / "text", tokenizer=str(workdir / "tokenizer"), validation=0.02)


def _train(run: Run) -> None:
    from jaxgpt.train import loop
    from jaxgpt.train.signals import STOPPED_BY_SIGNAL

    result = loop.train(run)
    if result.reason not in ("finished", "patience"):
        log.warning("stopped by %s; run the same command to go on", result.reason)
        raise SystemExit(STOPPED_BY_SIGNAL)


def _evaluate(workdir: Path, pretrain: Run, tune: Run) -> tuple[dict[str, Any], dict[str, list]]:
    """Held-out numbers of both runs, and their answers to the held-out questions."""
    from jaxgpt.evals.exact_match import exact_match, share
    from jaxgpt.evals.loss import validation_loss
    from jaxgpt.quickstart_data import is_correct
    from jaxgpt.sample.generate import Generator

    test = _read(workdir / "instructions" / "test.jsonl")
    answers, losses = {}, {}
    for name, run in (("base", pretrain), ("tuned", tune)):
        generator = Generator.load(run.folder)
        answers[name] = exact_match(generator, test, is_correct)
        data = dataclasses.replace(cast("Chat", tune.data), tokenizer=str(workdir / "tokenizer"))
        losses[name] = validation_loss(run.folder, data)
    text = validation_loss(pretrain.folder)
    results = {
        "pretrain_bits_per_byte": round(text["bits_per_byte"], 4),
        "answer_loss_base": round(losses["base"]["loss"], 4),
        "answer_loss_tuned": round(losses["tuned"]["loss"], 4),
        "exact_match_base": round(share(answers["base"]), 4),
        "exact_match_tuned": round(share(answers["tuned"]), 4),
        "test_questions": len(test),
    }
    return results, answers


def _read(path: Path) -> list[Any]:
    lines = path.read_bytes().splitlines()
    return [parse_json(line, Example, f"{path}, line {i}", AGAIN) for i, line in enumerate(lines, 1)]


def _size(run: Run) -> str:
    from jaxgpt.models import parameter_counts

    return f"{parameter_counts(run.model)['total'] / 1e6:.1f} million parameters"


def _tokens(run: Run) -> str:
    return f"{run.train.steps * run.train.batch_size * run.length / 1e6:.1f} million"


# -------------------------------------------------------------------------------- what it shows


def _by_skill(answers: dict[str, list]) -> list[dict[str, Any]]:
    """One row a skill: questions, and the share answered right before and after tuning."""
    rows: dict[str, dict[str, Any]] = {}
    for name, made in answers.items():
        for answer in made:
            skill = answer.example["skill"]
            row = rows.setdefault(skill, {"skill": skill, "questions": 0, "base": 0, "tuned": 0})
            row["questions"] += name == "tuned"
            row[name] += answer.correct
    for row in rows.values():
        row["base"], row["tuned"] = (row[n] / row["questions"] for n in ("base", "tuned"))
    return sorted(rows.values(), key=lambda row: -row["tuned"])


def _report(
    workdir: Path, pretrain: Run, tune: Run, results: dict[str, Any], answers: dict[str, list]
) -> None:
    """`report.html`: the numbers, curves, what the loss sees, answers."""
    from jaxgpt import report
    from jaxgpt.data.readers import run_tokenizer
    from jaxgpt.data.show import examples

    tokenizer = run_tokenizer(tune)
    names = {number: name for name, number in tokenizer.control.items()}
    said = [
        {
            "title": answer.example["skill"],
            "messages": [
                *answer.example["messages"][:-1],
                {"role": "assistant", "content": answer.text},
            ],
            "ok": answer.correct,
            "expected": answer.example["messages"][-1]["content"],
        }
        for answer in _samples(answers["tuned"], 12)
    ]
    sections = {
        "Numbers": report.facts(
            {
                "exact match": (
                    f"{results['exact_match_tuned']:.0%}",
                    f"{results['exact_match_base']:.0%} before tuning",
                ),
                "answer loss": (
                    results["answer_loss_tuned"],
                    f"{results['answer_loss_base']:.3f} before tuning; nats per token",
                ),
                "bits per byte": (results["pretrain_bits_per_byte"], "of held-out text"),
                "parameters": _size(pretrain).split(" p")[0],
                "seconds": (results["seconds"], "for everything"),
            }
        ),
        "Pretraining": report.curves(report.read_metrics(pretrain.folder / "metrics.jsonl")),
        "Instruction tuning": report.curves(report.read_metrics(tune.folder / "metrics.jsonl")),
        "What the loss sees": report.mask_picture(
            examples(tune, tokenizer, 2), lambda t: names.get(t) or tokenizer.piece_bytes(t)
        ),
        "Answers to questions never seen": report.dialogues(said),
        "Skills": report.table(_by_skill(answers), "Share answered to the letter", shares=("base", "tuned")),
        "Go on": report.commands(
            "# Talk to it:",
            f"uv run jaxgpt chat {tune.folder}",
            "# Let it write on:",
            f'uv run jaxgpt sample {pretrain.folder} --prompt "The function returns" --n 3',
            "# Look at the loss mask in the terminal:",
            f"uv run jaxgpt data show {tune.folder} --n 1",
        ),
    }
    report.write(workdir / "report.html", "jaxgpt quick start", sections.items())


def _goodbye(workdir: Path, tune: Run, results: dict[str, Any], answers: dict[str, list]) -> None:
    """Sample dialogues, the numbers, and how to go on, on standard output."""
    console = Console(highlight=False, soft_wrap=True)  # a wrapped command could not be copied
    for answer in _samples(answers["tuned"]):
        mark = "[green]right[/]" if answer.correct else "[red]wrong[/]"
        console.print(f"[bold]you[/]    {escape(answer.example['messages'][0]['content'])}")
        console.print(f"[bold]jaxgpt[/] {escape(answer.text.strip())}  {mark}\n")
    table = Table(title="held-out numbers", title_justify="left")
    for column in ("", "base", "tuned"):
        table.add_column(column)
    for name, label in (
        ("answer_loss", "answer loss, nats per token"),
        ("exact_match", "exact match"),
    ):
        table.add_row(label, *(f"{results[f'{name}_{which}']:.3f}" for which in ("base", "tuned")))
    console.print(table)
    console.print(f"pretraining: {results['pretrain_bits_per_byte']:.3f} bits per byte of held-out text")
    console.print(f"in all: {results['seconds']:.0f} seconds; look at {workdir / 'report.html'}\n")
    console.print("talk to it:")
    console.print(f"  uv run jaxgpt chat {tune.folder}", style="bold")
    question = answers["tuned"][0].example["messages"][0]["content"]
    console.print(f"it knows small tasks with common words of its documentation: {escape(question)}")


def _samples(answers: list, n: int = 6) -> list:
    """One answer of each of the first n skills."""
    first: dict[str, Any] = {}
    for answer in answers:
        first.setdefault(answer.example["skill"], answer)
    return list(first.values())[:n]
