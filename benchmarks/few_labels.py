"""SST-2 with one per cent of the labels: self-training and active selection against the obvious baselines.

    python -m benchmarks.few_labels ../shared/data --workdir /tmp/bench [--seeds 0 1 2]

A classifier of film reviews starts from the small base of `benchmarks/base.py`, which has read the sentences
of the training file without labels. It learns from 69 labels of 6,919; labels the rest itself (`jaxgpt
label`, as many of each label) and begins anew on both, twice; has a person label 69 more, drawn at random or
those that it is least certain of (`jaxgpt select`); or learns from all labels. Accuracy is that of the test
file at the last step: no checkpoint is chosen, since that would take labels too. Finished runs are kept.
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated

import tyro

from benchmarks.base import COMPUTE, base_run
from benchmarks.common import machine
from jaxgpt.config import Classification, Classifier, Labelled, Optim, Run, Train
from jaxgpt.data.readers.labelled import LabelledText, read_labelled
from jaxgpt.errors import UserError
from jaxgpt.evals.few_labels_command import label, select
from jaxgpt.evals.labels import label_report
from jaxgpt.files import write_text
from jaxgpt.sample.load import load_trained
from jaxgpt.train.loop import train

SHARE = 0.01
ROUNDS = 2


def table(path: Path, examples: list[LabelledText]) -> str:
    """Write a labelled file; its path."""
    write_text(path, "text\tlabel\n" + "".join(f"{e.text}\t{e.label}\n" for e in examples))
    return str(path)


class Bench:
    """The runs of one seed.

    Args:
      data: folder of SST-2's files.
      base: the run that all start from.
      folder: for the files of this seed.
      seed: draws the labelled texts, and is that of training.
      above: least confidence of a text that a run labels itself.
      steps: of a run on few labels; those on thousands take twice as many, on all labels four times.
    """

    def __init__(self, data: Path, base: Run, folder: Path, seed: int, above: float, steps: int) -> None:
        self.data, self.base, self.folder, self.seed = data, base, folder, seed
        self.above, self.steps = above, steps
        self.examples = read_labelled([data / "train.tsv"])
        self.gold = {e.text: e.label for e in self.examples}
        folder.mkdir(parents=True, exist_ok=True)
        self.order = random.Random(seed).sample(self.examples, len(self.examples))
        self.count = round(SHARE * len(self.examples))
        self.rest = table(folder / "rest.tsv", self.order[self.count :])

    def run(self, name: str, files: list[str], steps: int) -> tuple[Path, float]:
        """Train on these files: the run's folder, and its accuracy on the test file."""
        run = Run(
            name=f"few-labels-{self.seed}-{name}",
            runs=self.base.runs,
            init_from=str(self.base.folder),
            model=Classifier(labels=("0", "1"), pool="mean", head_dropout=0.1),
            data=Labelled(
                train=tuple(files),
                validation=(str(self.data / "dev.tsv"),),
                test=(str(self.data / "test.tsv"),),
                length=128,
            ),
            objective=Classification(),
            optim=Optim(peak_lr=5e-4, final_lr=5e-5, warmup_steps=10, weight_decay=0.1),
            train=Train(
                steps=steps,
                batch_size=8,
                eval_every=steps,
                eval_batches=1,
                save_every=steps,
                seed=self.seed,
                track=(),
            ),
            compute=COMPUTE,
        )
        train(run)
        found = label_report(load_trained(run.folder, which="newest"), "test")
        return run.folder, found.figures["label_accuracy"]

    def self_trained(self, folder: Path, files: list[str]) -> list[tuple[str, float]]:
        """Rows of rounds of self-training that begin with the run in `folder`, trained on `files`."""
        rows = []
        for number in range(1, ROUNDS + 1):
            out = str(self.folder / f"self-{number}.tsv")
            try:
                label(str(folder), self.rest, out=out, above=self.above, balance=True, checkpoint="newest")
            except UserError as error:  # no text is sure enough
                print(error)
                break
            files = [*files, out]
            made = read_labelled([out])
            right = mean(e.label == self.gold[e.text] for e in made)
            print(f"seed {self.seed}, round {number}: {len(made)} texts, {right:.1%} of their labels right")
            folder, accuracy = self.run(f"self-{number}", files, 2 * self.steps)
            rows.append((f"self-trained, round {number}", accuracy))
        return rows

    def asked(self, folder: Path, first: str, diverse: bool) -> tuple[str, float]:
        """The row of twice the labels, the second half by those that the run in `folder` selects."""
        name = "diverse" if diverse else "uncertain"
        out = str(self.folder / f"{name}.jsonl")
        select(str(folder), self.rest, out=out, count=self.count, diverse=diverse, checkpoint="newest")
        texts = [json.loads(line)["text"] for line in Path(out).read_text("utf-8").splitlines()]
        filled = table(self.folder / f"{name}.tsv", [LabelledText(t, None, self.gold[t]) for t in texts])
        _, accuracy = self.run(name, [first, filled], self.steps)
        return f"{2 * self.count} labels, the second half the {name} ones", accuracy

    def rows(self) -> list[tuple[str, float]]:
        """What was tried and its accuracy."""
        first = table(self.folder / "first.tsv", self.order[: self.count])
        folder, accuracy = self.run("first", [first], self.steps)
        made = [(f"{self.count} labels", accuracy), *self.self_trained(folder, [first])]
        second = table(self.folder / "second.tsv", self.order[self.count : 2 * self.count])
        name = f"{2 * self.count} labels, drawn at random"
        made.append((name, self.run("random", [first, second], self.steps)[1]))
        made += [self.asked(folder, first, diverse) for diverse in (False, True)]
        everything = str(self.data / "train.tsv")
        made.append(("all labels", self.run("all", [everything], 4 * self.steps)[1]))
        return made


def main(
    data: Annotated[Path, tyro.conf.Positional],
    *,
    workdir: Path,
    seeds: tuple[int, ...] = (0, 1, 2),
    above: float = 0.9,
    steps: int = 60,
) -> None:
    start, base = time.perf_counter(), base_run(data, workdir)
    found: dict[str, list[float]] = {}
    for seed in seeds:
        bench = Bench(data / "sst2", base, workdir / f"few-labels-{seed}", seed, above, steps)
        for name, accuracy in bench.rows():
            found.setdefault(name, []).append(accuracy)
            print(f"seed {seed}, {name}: {accuracy:.4f}", flush=True)
    print(f"\n{machine()}\n{time.perf_counter() - start:.0f} s\n")
    print("| SST-2, accuracy on the test file | mean | deviation | of each seed |\n|---|---:|---:|---|")
    for name, values in found.items():
        spread = f"{stdev(values):.3f}" if len(values) > 1 else "–"
        print(f"| {name} | {mean(values):.3f} | {spread} | {', '.join(f'{v:.3f}' for v in values)} |")


if __name__ == "__main__":
    tyro.cli(main)
