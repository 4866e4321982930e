"""Measures what GRPO makes of the quick start's chat model: reward over steps, three seeds, and the rollouts.

    jaxgpt quickstart --workdir quickstart
    python benchmarks/grpo.py quickstart [--steps 80] [--plot benchmarks/results/grpo_DATE.svg]

Each seed trains `configs/grpo_skills.py` from `quickstart/runs/tune`. Validation questions are new ones of
the same skill, which neither stage has seen, answered greedily. Rollout tokens/s count the tokens of
completions over the whole rollout, rewards included; its share is that of a training step's time.
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
from jaxgpt import quickstart_data
from jaxgpt.checkpoint import load_params
from jaxgpt.config import Run, load, load_run
from jaxgpt.data.readers import run_tokenizer
from jaxgpt.files import write_jsonl
from jaxgpt.report import read_metrics
from jaxgpt.sharding import make_mesh
from jaxgpt.train.loop import train
from jaxgpt.train.rollout import Rollouts
from jaxgpt.train.state import make_program

ROOT, SEEDS, WINDOW = Path(__file__).parents[1], (0, 1, 2), 5
Folder = Annotated[Path, tyro.conf.Positional]


def main(quickstart: Folder, steps: int = 80, plot: Path | None = None) -> None:
    about = machine()
    with tempfile.TemporaryDirectory() as scratch:
        questions = unseen(Path(scratch) / "unseen.jsonl", load(ROOT / "configs/grpo_skills.py"))
        runs = [seeded(quickstart, Path(scratch), questions, steps, seed) for seed in SEEDS]
        before = untrained(runs[0])
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
        "| seed | first 5 steps | last 5 steps | unseen questions before | after |\n| - | -: | -: | -: | -: |"
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


def unseen(path: Path, run: Run) -> str:
    """A file of questions of the run's skill that are in no split of training."""
    skill = run.data.where.partition("=")[2]
    corpus = quickstart_data.corpus()
    write_jsonl(path, quickstart_data.instructions(corpus, 0, 80, skills=(skill,))[2])
    return str(path)


def seeded(quickstart: Path, folder: Path, questions: str, steps: int, seed: int) -> Run:
    run = load(ROOT / "configs/grpo_skills.py")
    files = (str(quickstart / "instructions/train.jsonl"),)
    return replace(
        run,
        name=f"seed{seed}",
        runs=str(folder),
        init_from=str(quickstart / "runs/tune"),
        data=replace(run.data, train=files, validation=(questions,)),
        train=replace(run.train, seed=seed, steps=steps, eval_every=steps // 4, save_every=steps),
    )


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
    axes.set_title(f"rollouts (mean of {WINDOW} steps); dots: unseen questions, greedy", fontsize=9)
    axes.legend(loc="lower right", fontsize=8)
    axes.grid(alpha=0.3)
    pyplot.rcParams["svg.fonttype"] = "none"
    figure.savefig(path)


if __name__ == "__main__":
    tyro.cli(main)
