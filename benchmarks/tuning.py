"""Every tuning method on E2E NLG, from one small GPT that is pretrained here.

    python benchmarks/tuning.py --data ../shared/data --work /tmp/tuning [--out FILE] [--only NAME ...]
    python benchmarks/tuning.py --data ... --work ... --speed    # steps/s and memory, on an idle machine

Tuned on 90 % of devset.csv, split by meaning representation. The learning rate (of two, by a short run)
and the checkpoint are chosen on the other 10 %. testset_w_refs.csv is scored once, with greedy decoding. A
run that is done is not run again, so the same command goes on where it stopped. It needs sacrebleu and
rouge-score, which come with the extra `eval` (lm-eval).
"""

from __future__ import annotations

import csv
import dataclasses
import json
import random
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import jax
import tyro

from benchmarks.common import machine
from jaxgpt.batch import Batch
from jaxgpt.config import (
    GPT,
    IA3,
    BottleneckAdapters,
    Chat,
    Compute,
    DoRA,
    Full,
    LastLayers,
    LoRA,
    Optim,
    PrefixTuning,
    PromptTuning,
    Run,
    Text,
    Train,
    load_run,
)
from jaxgpt.data.prepare import prepare
from jaxgpt.objectives import make_objective
from jaxgpt.runtime import set_up
from jaxgpt.sample.generate import Generator
from jaxgpt.sample.settings import Sampling
from jaxgpt.sharding import batch_sharding, make_mesh
from jaxgpt.text.load import load_tokenizer
from jaxgpt.text.train import train_sentencepiece
from jaxgpt.text.vocabulary import Vocabulary
from jaxgpt.train.loop import train
from jaxgpt.train.state import freeze, init_state, make_program
from jaxgpt.train.step import jit_train_step

LENGTH, VOCAB = 128, 4096
MODEL = GPT(
    vocab_size=VOCAB, context=192, layers=6, width=192, heads=6, position="rope", norm="rmsnorm",
    mlp="swiglu", mlp_width=512, bias=False,
)  # fmt: skip
COMPUTE = Compute(dtype="float32")
METHODS: dict[str, tuple[Any, tuple[float, ...]]] = {
    "full": (Full(), (1e-3, 3e-3)),
    "LoRA, r = 8": (LoRA(rank=8), (3e-3, 1e-2)),
    "LoRA, r = 8, nf4": (LoRA(rank=8, base="nf4"), (3e-3, 1e-2)),
    "DoRA, r = 8": (DoRA(rank=8), (3e-3, 1e-2)),
    "adapters, 32": (BottleneckAdapters(size=32), (3e-3, 1e-2)),
    "prefix, 20": (PrefixTuning(tokens=20), (1e-2, 1e-1)),
    "prompt, 20": (PromptTuning(tokens=20), (1e-1, 3e-1)),
    "IA3": (IA3(), (1e-2, 3e-2)),
    "last layer": (LastLayers(layers=1), (1e-3, 3e-3)),
}
"""The method and the learning rates that are tried."""


@dataclasses.dataclass(frozen=True)
class Steps:
    """How long it all takes."""

    pretrain: int = 300
    search: int = 20
    tune: int = 120


def read(path: Path) -> dict[str, list[str]]:
    """References by meaning representation, in the order of the file."""
    found = defaultdict(list)
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            found[row["mr"]].append(row["ref"])
    return dict(found)


def write(path: Path, pairs: dict[str, list[str]]) -> None:
    records = [{"prompt": f"{mr}\n", "completion": ref} for mr, refs in pairs.items() for ref in refs]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def texts(data: Path) -> list[str]:
    """What is pretrained on: all English text beside E2E."""
    found = [json.loads(line)["text"] for line in (data / "c4_300.jsonl").read_text().splitlines()]
    for record in json.loads((data / "instruct" / "alpaca_en_demo.json").read_text()):
        found.append(
            "\n".join(part for part in (record["instruction"], record["input"], record["output"]) if part)
        )
    for record in json.loads((data / "instruct" / "dpo_en_demo.json").read_text()):
        found.append(f"{record['conversations'][-1]['value']}\n{record['chosen']['value']}")
    return [*found, *(data / "tinyshakespeare.txt").read_text().split("\n\n")]


def begin(data: Path, work: Path, steps: Steps) -> dict[str, list[str]]:
    """Files, tokenizer and the pretrained model; returns the test set."""
    pairs = read(data / "e2e-nlg" / "devset.csv")
    names = sorted(pairs)
    random.Random(0).shuffle(names)
    held = set(names[: len(names) // 10])
    write(work / "train.jsonl", {mr: refs for mr, refs in pairs.items() if mr not in held})
    write(work / "dev.jsonl", {mr: refs for mr, refs in pairs.items() if mr in held})
    english = texts(data)
    if not (work / "tokenizer").exists():
        own = [ref for mr, refs in pairs.items() if mr not in held for ref in (mr, *refs)]
        train_sentencepiece([*english, *own], VOCAB).save(work / "tokenizer")
    if not (work / "text").exists():
        (work / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in english))
        prepare([str(work / "text.jsonl")], work / "text", tokenizer=str(work / "tokenizer"), validation=0.02)
    run = Run(
        name="base",
        model=MODEL,
        data=Text(path=str(work / "text"), length=LENGTH),
        optim=Optim(peak_lr=2e-3, final_lr=2e-4, warmup_steps=min(30, steps.pretrain)),
        train=Train(steps=steps.pretrain, batch_size=32, eval_every=100, save_every=500, log_every=20),
        compute=COMPUTE,
        runs=str(work / "runs"),
    )
    train(run)
    return read(data / "e2e-nlg" / "testset_w_refs.csv")


def tuned(name: str, rate: float, count: int, steps: int, work: Path) -> Run:
    tune, _ = METHODS[name]
    slug = "".join(c if c.isalnum() else "-" for c in name)
    return Run(
        name=f"{slug}-{rate:g}-{count}",
        init_from=str(work / "runs" / "base"),
        tune=tune,
        data=Chat(
            train=(str(work / "train.jsonl"),),
            validation=(str(work / "dev.jsonl"),),
            template="none",
            length=LENGTH,
        ),
        optim=Optim(
            peak_lr=rate, final_lr=0.0, schedule="linear", warmup_steps=min(5, steps), weight_decay=0.0
        ),
        train=Train(
            steps=steps, batch_size=16, eval_every=max(1, steps // 6), save_every=steps, log_every=20
        ),
        compute=COMPUTE,
        runs=str(work / "runs"),
    )


def best_loss(run: Run) -> float:
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    return min(r["val_loss"] for r in map(json.loads, lines) if "val_loss" in r)


def score(run: Run, test: dict[str, list[str]], rows: int) -> dict[str, float]:
    """BLEU, chrF and ROUGE-L of the best checkpoint's greedy texts; kept in the run's folder."""
    kept = run.folder / "e2e.json"
    if kept.exists():
        return json.loads(kept.read_text())
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    generator, asked = Generator.load(run.folder), list(test)[:rows]
    made = []
    for start in range(0, len(asked), 210):
        prompts = generator.texts([f"{mr}\n" for mr in asked[start : start + 210]])["prompts"]
        made += generator.generate(prompts, Sampling(temperature=0), max_new_tokens=80, apart=True)
    texts = [one.text.strip() for one in made]
    most = max(len(test[mr]) for mr in asked)
    refs: Any = [[test[mr][i] if i < len(test[mr]) else None for mr in asked] for i in range(most)]
    rouge = RougeScorer(["rougeL"])
    best = [rouge.score_multi(test[mr], text)["rougeL"] for mr, text in zip(asked, texts, strict=True)]
    found = {
        "BLEU": sacrebleu.corpus_bleu(texts, refs).score,
        "chrF": sacrebleu.corpus_chrf(texts, refs).score,
        "ROUGE-L": 100 * sum(one.fmeasure for one in best) / len(best),
    }
    kept.write_text(json.dumps(found))
    (run.folder / "e2e.txt").write_text("\n".join(f"{mr}\t{t}" for mr, t in zip(asked, texts, strict=True)))
    return found


def measure(name: str, work: Path, repeats: int = 20) -> dict[str, float]:
    """Steps/s, memory of the compiled step, and trained parameters."""
    run = tuned(name, 1e-3, 0, 100, work)
    mesh = make_mesh({"data": 1})
    program = make_program(run, mesh)
    run_of_base = load_run(work / "runs" / "base")
    from jaxgpt.checkpoint import load_params

    params, _ = load_params(work / "runs" / "base", run_of_base, mesh)
    state, base = init_state(run, program, params), freeze(program, params) or None
    vocabulary = Vocabulary.of(load_tokenizer(work / "tokenizer"))
    shape = Batch.abstract(16, LENGTH)
    batch = jax.tree.map(lambda x: jax.numpy.ones(x.shape, x.dtype), shape)
    batch = jax.device_put(batch, batch_sharding(mesh))
    with jax.set_mesh(mesh):
        step = jit_train_step(run, program, make_objective(run.objective, vocabulary))
        compiled = step.lower(state, batch, base).compile()
        memory = compiled.memory_analysis()
        times = []
        for _ in range(repeats):
            begun = time.perf_counter()
            state, metrics = compiled(state, batch, base)
            jax.block_until_ready(metrics)
            times.append(time.perf_counter() - begun)
    return {
        "trained": sum(x.size for x in jax.tree.leaves(program.split(state.params)[0])),
        "steps/s": 1 / sorted(times)[len(times) // 2],
        "memory": memory.argument_size_in_bytes + memory.temp_size_in_bytes,
    }


def size_of(run: Run) -> int:
    """Bytes of the parameters of one checkpoint."""
    steps = [p for p in (run.folder / "checkpoints").iterdir() if p.name.isdecimal()]
    return min(sum(f.stat().st_size for f in (p / "params").rglob("*") if f.is_file()) for p in steps)


def main(
    data: Path,
    work: Path,
    out: Path | None = None,
    only: tuple[str, ...] = (),
    quick: bool = False,
    speed: bool = False,
) -> None:
    """Run what is not done, and print the table."""
    set_up()
    steps, rows = (Steps(6, 2, 4), 4) if quick else (Steps(), 10**6)
    work.mkdir(parents=True, exist_ok=True)
    names = only or tuple(METHODS)
    if not speed:
        test = begin(data, work, steps)
    head = "| method | trained | % | rate | dev loss | BLEU | chrF | ROUGE-L | steps/s | memory | saved |"
    lines = [head, "|---|" + "---:|" * 10]
    total = measure("full", work, 1)["trained"]
    for name in names:
        if not speed:
            tries = {rate: tuned(name, rate, steps.search, steps.search, work) for rate in METHODS[name][1]}
            for run in tries.values():
                train(run)
            rate = min(tries, key=lambda r: best_loss(tries[r]))
            run = tuned(name, rate, steps.tune, steps.tune, work)
            train(run)
            found = score(run, test, rows)
            scores = " | ".join(f"{found[name]:.1f}" for name in ("BLEU", "chrF", "ROUGE-L"))
            texts = f"{rate:g} | {best_loss(run):.3f} | {scores}"
            saved = f"{size_of(run) / 2**20:.2f} MiB"
        else:
            texts, saved = "| | | |", ""
        cost = measure(name, work, 2 if quick else 20)
        share = 100 * cost["trained"] / total
        lines.append(
            f"| {name} | {cost['trained']:,.0f} | {share:.2f} | {texts} | {cost['steps/s']:.2f} | "
            f"{cost['memory'] / 2**20:.0f} MiB | {saved} |"
        )
        print(lines[-1], flush=True)
    table = "\n".join(lines)
    print(f"\n{machine()}\n\n{table}")
    if out is not None:
        out.write_text(f"{table}\n")


if __name__ == "__main__":
    tyro.cli(main)
