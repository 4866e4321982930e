"""What a classifier (SST-2) and a tagger (Chinese resumes) lose under disturbance, plain and with FGM.

    python -m benchmarks.robustness ../shared/data --workdir /tmp/bench

Both start from the small base of `benchmarks/base.py`, which reads from left to right. Drops are of accuracy,
and of seqeval's F1 of entities, on test files; in brackets are 95 % intervals over examples.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import tyro

from benchmarks.base import COMPUTE, base_run
from benchmarks.common import machine
from jaxgpt.config import FGM, Classification, Classifier, Labelled, Optim, Run, Tagged, Train
from jaxgpt.data.readers.tagging import read_conll
from jaxgpt.evals.robust import label_robustness
from jaxgpt.sample.load import load_trained
from jaxgpt.train.loop import train


def main(
    data: Annotated[Path, tyro.conf.Positional], *, workdir: Path, steps: int = 120, limit: int = 500
) -> None:
    base = base_run(data, workdir)
    sst2, ner = data / "sst2", data / "resume-ner-zh"
    files = {split: (str(sst2 / f"{split}.tsv"),) for split in ("train", "dev", "test")}
    tags = {split: (str(ner / f"{split}.char.bmes"),) for split in ("train", "dev", "test")}
    kinds = {tag for sentence in read_conll(tags["train"]) for tag in sentence.tags}
    tasks: dict[str, tuple[Any, Any]] = {
        "sst2": (
            Classifier(labels=("0", "1"), pool="mean"),
            Labelled(train=files["train"], validation=files["dev"], test=files["test"]),
        ),
        "ner": (
            Classifier(labels=("O", *sorted(kinds - {"O"})), pool="token"),
            Tagged(train=tags["train"], validation=tags["dev"], test=tags["test"], joiner=""),
        ),
    }
    found: dict[str, Any] = {}
    print("| task | disturbance | plain: drop | with FGM: drop |\n|---|---|---:|---:|")
    for task, (model, source) in tasks.items():
        drops = {}
        for way, measures in {"plain": (), "fgm": (FGM(),)}.items():
            run = Run(
                name=f"{task}-{way}",
                runs=base.runs,
                init_from=str(base.folder),
                model=model,
                data=source,
                objective=Classification(),
                measures=measures,
                compute=COMPUTE,
                optim=Optim(peak_lr=5e-4, final_lr=5e-5, warmup_steps=20),
                train=Train(
                    steps=steps,
                    batch_size=8,
                    eval_every=steps // 2,
                    save_every=steps,
                    best_by="error",
                    track=(),
                ),
            )
            train(run)
            drops[way] = label_robustness(load_trained(run.folder), "test", limit=limit).drops
        found[task] = {way: [d._asdict() for d in ds] for way, ds in drops.items()}
        clean = " | ".join(f"{drops[way][0].clean:.1f}" for way in drops)
        print(f"| {task} | none: the score | {clean} |")
        for plain, moved in zip(drops["plain"], drops["fgm"], strict=True):
            cells = [f"{d.drop.value:.1f} ({d.drop.low:.1f} to {d.drop.high:.1f})" for d in (plain, moved)]
            print(f"| {task} | {plain.name} | {cells[0]} | {cells[1]} |", flush=True)
    (workdir / "robustness.json").write_text(json.dumps({"machine": machine(), "found": found}))


if __name__ == "__main__":
    tyro.cli(main)
