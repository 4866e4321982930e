"""One run on seven tasks against seven runs on one task each, at equal steps.

    python -m benchmarks.multitask ../shared/data --workdir /tmp/bench [--steps 120] [--limit 100]

All start from the small base of `benchmarks/base.py`. The run on all tasks sees each of them in about a
seventh of its rows (temperature 2), so it learns every task from fewer examples than the run on that task.
Scores are of held-out questions asked in a way that training does not use, with 95 % intervals. Finished runs
are kept.
"""

from __future__ import annotations

import csv
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import tyro

from benchmarks.base import COMPUTE, MODEL, base_run, pairs
from benchmarks.common import machine
from jaxgpt.config import Mix, Optim, Run, Suite, Task, Train
from jaxgpt.evals.suite import run_suite
from jaxgpt.sample.load import load_trained
from jaxgpt.tasks import DataToText, Dialogue, ExtractiveQA, TextClassification, Translation
from jaxgpt.train.loop import train

MAIN = {"alpaca": "perplexity"}
"""Metric of a task that is shown, where it is not its first one."""


def tasks(data: Path, workdir: Path) -> dict[str, Task]:
    """The tasks; pairs of sentences that the base saw are for training alone."""
    for name, part in zip(("train", "test"), pairs(data), strict=True):
        with (workdir / f"pairs.{name}.tsv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, delimiter="\t", quoting=csv.QUOTE_NONE, escapechar="\\").writerows(part)
    both = {
        "train": (str(workdir / "pairs.train.tsv"),),
        "validation": (str(workdir / "pairs.test.tsv"),),
        "header": ("en", "zh"),
    }
    sst2, e2e = data / "sst2", data / "e2e-nlg"
    held = {"validation_fraction": 0.2}
    return {
        "en-zh": Translation(**both, source="en", into="zh"),
        "zh-en": Translation(**both, source="zh", into="en"),
        "e2e": DataToText(train=(str(e2e / "devset.csv"),), validation=(str(e2e / "testset_w_refs.csv"),)),
        "sst2": TextClassification(
            train=(str(sst2 / "train.tsv"),),
            validation=(str(sst2 / "dev.tsv"),),
            test=(str(sst2 / "test.tsv"),),
        ),
        "xquad-en": ExtractiveQA(train=(str(data / "xquad.en.json"),), **held),
        "xquad-zh": ExtractiveQA(train=(str(data / "xquad.zh.json"),), language="zh", **held),
        "alpaca": Dialogue(train=(str(data / "instruct/alpaca_en_demo.json"),), **held),
    }


def run_of(name: str, sources: dict[str, Task], base: Run, steps: int) -> Run:
    mix = Mix(sources=tuple(sources.values()), names=tuple(sources), temperature=2.0)
    return Run(
        name=f"tasks-{name}-{steps}",
        runs=base.runs,
        init_from=str(base.folder),
        model=replace(MODEL, context=384),
        compute=COMPUTE,
        data=mix,
        optim=Optim(peak_lr=1e-3, final_lr=1e-4, warmup_steps=10),
        train=Train(steps=steps, batch_size=16, eval_every=steps, eval_batches=4, save_every=steps, track=()),
    )


def main(
    data: Annotated[Path, tyro.conf.Positional], *, workdir: Path, steps: int = 120, limit: int = 100
) -> None:
    base = base_run(data, workdir)
    known = tasks(data, workdir)
    runs = {"all": run_of("all", known, base, steps)}
    runs |= {name: run_of(name, {name: task}, base, steps) for name, task in known.items()}
    found: dict[str, dict[str, dict[str, tuple[float, float | None, float | None]]]] = {}
    for name, run in runs.items():
        start = time.perf_counter()
        train(run, progress=True)
        chosen = known if name == "all" else {name: known[name]}
        suite = Suite(name="bench", tasks=tuple(chosen.values()), names=tuple(chosen), limit=limit)
        for scores in run_suite(load_trained(run.folder, which="newest"), suite):
            found.setdefault(scores.name, {})[name if name == "all" else "alone"] = {
                key: tuple(figure) for key, figure in scores.figures.items()
            }
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
        (workdir / "multitask.json").write_text(json.dumps({"machine": machine(), "found": found}))
    print("\n| task | metric | alone | all tasks |\n|---|---|---:|---:|")
    for name, sides in found.items():
        for key in [k for k in sides["all"] if k in (MAIN.get(name), *list(sides["all"])[:2])]:
            cells = [_cell(sides[side][key]) for side in ("alone", "all")]
            print(f"| {name} | {key} | {cells[0]} | {cells[1]} |")


def _cell(figure: tuple[float, float | None, float | None]) -> str:
    value, low, high = figure
    return f"{value:.1f}" if low is None else f"{value:.1f} ({low:.1f} to {high:.1f})"


if __name__ == "__main__":
    tyro.cli(main)
