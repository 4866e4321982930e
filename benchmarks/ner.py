"""Chinese NER on the resumes of Zhang & Yang (2018): from scratch, and what pretraining gains.

    python benchmarks/ner.py --data ../shared/data --workdir /tmp/ner

Trains a character tokenizer and a masked-LM backbone (configs/mlm_zh.py) on a novel and the training
sentences, then configs/ner_resume.py from scratch and from that backbone, and prints both reports on the test
file. Finished parts are kept: run it again after an interruption.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Args:
    """Data folder and working folder."""

    data: Path
    workdir: Path
    steps: int = 0
    """Number of pretraining steps; 0 means that of the config."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the NER runs, both from scratch and tuned."""


def main(args: Args) -> None:
    from jaxgpt.config import load, override
    from jaxgpt.data.prepare import prepare
    from jaxgpt.data.readers.tagging import read_conll
    from jaxgpt.data.train_tokenizer import train_tokenizer
    from jaxgpt.evals.labels import label_report
    from jaxgpt.sample.load import load_trained
    from jaxgpt.train.loop import train

    source, work = args.data.resolve(), args.workdir
    (work / "data" / "zh_text").mkdir(parents=True, exist_ok=True)
    os.chdir(work)
    files = {"resume": "resume-ner-zh", "zh_text/novel.txt": "hongloumeng.txt"}
    for name, target in files.items():
        if not Path("data", name).exists():
            Path("data", name).symlink_to(source / target)
    sentences = read_conll(["data/resume/train.char.bmes"])
    text = "".join("".join(s.words) + "\n" for s in sentences)
    Path("data/zh_text/resumes.txt").write_text(text, "utf-8")
    texts = ["data/zh_text/novel.txt", "data/zh_text/resumes.txt"]
    if not Path("tokenizers/zh_char").exists():
        train_tokenizer(texts, Path("tokenizers/zh_char"), vocab_size=3200, model_type="char")
    prepare(texts, Path("data/zh"), tokenizer="tokenizers/zh_char", split="tail", validation=0.02)

    base = load(ROOT / "configs" / "mlm_zh.py")
    base = override(base, ["--train.steps", str(args.steps)]) if args.steps else base
    ner = load(ROOT / "configs" / "ner_resume.py")
    times = {base.name: _timed(lambda: train(base))}
    scores: dict[str, list[float]] = {}
    for kind, start in (("scratch", ""), ("tuned", str(base.folder))):
        for seed in args.seeds:
            run = replace(
                ner, name=f"ner_{kind}_{seed}", init_from=start, train=replace(ner.train, seed=seed)
            )
            times[run.name] = _timed(lambda run=run: train(run))
            for split in ("validation", "test"):
                report = label_report(load_trained(run.folder), split)
                scores.setdefault(f"{kind} {split}", []).append(report.figures["strict_micro_f1-score"])
                if seed == args.seeds[0] and split == "test":
                    print(f"{run.name}, test\n{report.text}")
    for name, values in scores.items():
        print(f"{name}: strict F1 " + ", ".join(f"{v:.4f}" for v in values))
    print({name: f"{seconds:.0f} s" for name, seconds in times.items()})


def _timed(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    main(tyro.cli(Args))
