"""Measures what GRPO makes of a config: reward over steps with three seeds, and the speed of its rollouts.

    jaxgpt quickstart --workdir quickstart && jaxgpt train configs/sums.py     # what the two start from
    python benchmarks/grpo.py configs/grpo_skills.py [--plot benchmarks/results/NAME.svg]
    python benchmarks/grpo.py configs/grpo_arithmetic.py

Validation prompts are those that the config holds out, answered greedily. Rollout tokens/s count the tokens
of completions over the whole rollout, rewards included; its share is that of a training step's time. The
first step, which compiles, is left out.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from benchmarks.common import machine
from jaxgpt.checkpoint import load_params
from jaxgpt.config import Run, load, load_run
from jaxgpt.data.readers import run_tokenizer
from jaxgpt.report import read_metrics
from jaxgpt.sharding import make_mesh
from jaxgpt.train.loop import train
from jaxgpt.train.rollout import Rollouts
from jaxgpt.train.state import make_program

SEEDS, WINDOW = (0, 1, 2), 5
Config = Annotated[Path, tyro.conf.Positional]


def main(config: Config, plot: Path | None = None) -> None:
    about = machine()
    with tempfile.TemporaryDirectory() as scratch:
        run = replace(load(config), runs=scratch)
        runs = [replace(run, name=f"seed{s}", train=replace(run.train, seed=s)) for s in SEEDS]
        before = untrained(run)
        for run in runs:
            train(run, progress=False)
        records = [read_metrics(run.folder / "metrics.jsonl") for run in runs]
    rewards = [[r["reward"] for r in lines if "reward" in r] for lines in records]
    held = [
        [(0, before)] + [(r["step"], r["val_reward"]) for r in lines if "val_reward" in r]
        for lines in records
    ]
    made = [
        r for lines in records for r in lines if "reward" in r and r["step"] > 1
    ]  # the first one compiles
    print(f"`{' '.join(['python', *sys.argv])}`  {about}\n")
    print(
        "| seed | first 5 steps | last 5 steps | held-out prompts before | after |\n| - | -: | -: | -: | -: |"
    )
    for seed, reward, points in zip(SEEDS, rewards, held, strict=True):
        ends = (statistics.mean(reward[:WINDOW]), statistics.mean(reward[-WINDOW:]))
        print(f"| {seed} | {ends[0]:.3f} | {ends[1]:.3f} | {before:.3f} | {points[-1][1]:.3f} |")
    seconds = statistics.median(r["step_seconds"] for r in made)
    figures = {
        "rollout_tokens_per_second": statistics.median(r["rollout_tokens_per_second"] for r in made),
        "rollout_share_of_a_step": statistics.median(r["rollout_seconds"] for r in made) / seconds,
        "step_seconds": seconds,
        "largest_logprob_gap": max(r["logprob_gap"] for r in made),
        "tokens_per_completion": statistics.mean(r["completion_length"] for r in made),
    }
    print("\n" + json.dumps({name: round(value, 7) for name, value in figures.items()}))
    if plot:
        draw(plot, rewards, held)


def untrained(run: Run) -> float:
    """The validation reward of what the runs start from."""
    mesh = make_mesh(run.check_mesh(1))
    params, _ = load_params(run.init_from, load_run(run.init_from), mesh)
    rollouts: Any = Rollouts(run, run_tokenizer(run))
    rollouts.begin(make_program(run, mesh))
    rollouts.use(0, params)
    return rollouts.evaluate()["reward"]


def draw(path: Path, rewards: list[list[float]], held: list[list[tuple[int, float]]]) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.2), layout="constrained")
    for i, (reward, points) in enumerate(zip(rewards, held, strict=True)):
        smooth = [statistics.mean(reward[max(0, s - WINDOW + 1) : s + 1]) for s in range(len(reward))]
        colour = f"C{i}"
        axes.plot(range(1, len(reward) + 1), smooth, color=colour, label=f"seed {SEEDS[i]}")
        axes.plot(*zip(*points, strict=True), "o", color=colour, markersize=4)
    axes.set(xlabel="step", ylabel="mean reward", ylim=(0, 1.02))
    axes.set_title(f"rollouts (mean of {WINDOW} steps); dots: held-out prompts, greedy", fontsize=9)
    axes.legend(loc="lower right", fontsize=8)
    axes.grid(alpha=0.3)
    pyplot.rcParams["svg.fonttype"] = "none"
    figure.savefig(path)


if __name__ == "__main__":
    tyro.cli(main)
