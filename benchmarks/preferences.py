"""Measures DPO from a tuned run: margin and accuracy on held-out pairs, before and after.

    python benchmarks/preferences.py ../shared/data/instruct [--workdir DIR] [--dpo-steps 32]

A small GPT is tuned on the answers of alpaca_en_demo.json (from scratch: nothing larger fits into a few
minutes on two cores), then learns from dpo_en_demo.json, whose pairs of one prompt are held out together.
Two kinds of figures of the held-out pairs are compared: DPO's own (of log-probabilities less the
reference's, so 0 and one half before), and which side is likelier by the mean over its tokens. `--json`
prints one object instead of a table.
"""

from __future__ import annotations

import json as jsonlib
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from benchmarks.common import machine
from jaxgpt.config import DPO, GPT, Chat, Compute, Optim, Pairs, Run, SimPO, Train
from jaxgpt.evals.loss import loss_of
from jaxgpt.files import read_json
from jaxgpt.sample.load import Trained, load_trained
from jaxgpt.text.train import train_sentencepiece
from jaxgpt.train.loop import train

Folder = Annotated[Path, tyro.conf.Positional]
MODEL = GPT(
    vocab_size=2048, context=512, layers=3, width=128, heads=4, position="rope", norm="rmsnorm", mlp="swiglu",
    bias=False,
)  # fmt: skip
COMPUTE = Compute(dtype="float32")


def texts(folder: Path) -> list[str]:
    """What the tokenizer is trained on: the dialogues that the model is tuned on."""
    records = read_json(folder / "alpaca_en_demo.json", list[dict[str, Any]], "bring it back")
    return [str(value) for record in records for value in record.values() if value]


def runs(folder: Path, workdir: Path, sft_steps: int, dpo_steps: int, beta: float) -> tuple[Run, Run]:
    """The tuned run and the one that learns from preferences."""
    shared = {"model": MODEL, "compute": COMPUTE, "runs": str(workdir)}
    every = {"log_every": 10, "save_every": 10_000, "track": ()}
    tuned = Run(
        name="tuned", **shared,
        data=Chat(
            train=(str(folder / "alpaca_en_demo.json"),), tokenizer=str(workdir / "tokenizer"), length=256
        ),
        optim=Optim(peak_lr=3e-3, final_lr=3e-4, warmup_steps=10),
        train=Train(steps=sft_steps, batch_size=16, eval_every=sft_steps // 2, **every),
    )  # fmt: skip
    dpo = Run(
        name="dpo", **shared, init_from=str(tuned.folder),
        data=Pairs(train=(str(folder / "dpo_en_demo.json"),), validation_fraction=0.2),
        objective=DPO(beta=beta),
        optim=Optim(peak_lr=2e-4, final_lr=2e-5, warmup_steps=4, weight_decay=0.0),
        train=Train(steps=dpo_steps, batch_size=8, eval_every=dpo_steps // 4, **every),
    )  # fmt: skip
    return tuned, dpo


def figures(trained: Trained, run: Run) -> dict[str, float]:
    """Of held-out pairs: margin and accuracy of rewards, and which side is likelier."""
    mean = replace(run, objective=SimPO(beta=1.0, margin=0.0))
    rewards, likelier = (loss_of(trained._replace(run=one, folder=run.folder)) for one in (run, mean))
    names = (
        "loss",
        "margin",
        "accuracy",
        "reward_chosen",
        "reward_rejected",
        "length_chosen",
        "length_rejected",
    )
    found = {name: rewards[name] for name in names}
    return found | {
        "mean_logprob_margin": likelier["margin"],
        "mean_logprob_accuracy": likelier["accuracy"],
        "nll_chosen": likelier["chosen_nll"],
        "pairs": rewards["targets"],
    }


def main(
    folder: Folder,
    *,
    workdir: Path | None = None,
    sft_steps: int = 100,
    dpo_steps: int = 32,
    beta: float = 0.1,
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
) -> None:
    workdir = workdir or Path(tempfile.mkdtemp())
    train_sentencepiece(texts(folder), MODEL.vocab_size).save(workdir / "tokenizer")
    tuned, dpo = runs(folder, workdir, sft_steps, dpo_steps, beta)
    seconds = {}
    for run in (tuned, dpo):
        start = time.perf_counter()
        train(run, progress=False)
        seconds[run.name] = round(time.perf_counter() - start, 1)
    after = figures(load_trained(dpo.folder, which="newest"), dpo)
    before = figures(load_trained(tuned.folder), dpo)
    if json:
        print(jsonlib.dumps({"machine": machine(), "seconds": seconds, "before": before, "after": after}))
        return
    print(f"seconds: {seconds}\n\n| held-out pairs | before | after |\n|---|---|---|")
    for name in before:
        print(f"| {name} | {before[name]:.3f} | {after[name]:.3f} |")


if __name__ == "__main__":
    tyro.cli(main)
