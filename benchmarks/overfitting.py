"""300 Alpaca examples for 20 epochs: validation loss with nothing, with each measure, with all.

    python -m benchmarks.overfitting ../shared/data --workdir /tmp/overfit

A small decoder learns from scratch, with dropout 0.1 in every run (R-Drop needs some). Of every run the
lowest validation loss, the one at the end, and seconds are shown; 200 other examples are for validation.
Strengths are the defaults of `jaxgpt.config`, but for EMA, whose decay suits so few steps; none was tuned.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from benchmarks.common import machine
from jaxgpt.config import (
    EMA,
    FGM,
    GPT,
    Chat,
    Compute,
    LabelSmoothing,
    LayerDecay,
    NEFTune,
    Optim,
    RDrop,
    Run,
    Train,
)
from jaxgpt.files import read_json, write_json
from jaxgpt.report.run import read_metrics
from jaxgpt.text.train import train_sentencepiece
from jaxgpt.train.loop import train

MODEL = GPT(
    vocab_size=2000, context=192, layers=2, width=128, heads=4, position="rope", norm="rmsnorm", mlp="swiglu",
    bias=False, dropout=0.1,
)  # fmt: skip


def main(data: Annotated[Path, tyro.conf.Positional], *, workdir: Path, epochs: int = 20) -> None:
    records = read_json(data / "instruct/alpaca_en_demo.json", list[dict[str, Any]], "bring it back")
    files = {"train": records[:300], "validation": records[300:500]}
    for name, part in files.items():
        write_json(workdir / f"{name}.json", part)
    if not (workdir / "tokenizer").exists():
        texts = [str(value) for record in files["train"] for value in record.values() if value]
        train_sentencepiece(texts, MODEL.vocab_size).save(workdir / "tokenizer")
    plain = Run(
        name="nothing",
        runs=str(workdir / "runs"),
        model=MODEL,
        compute=Compute(dtype="float32"),
        data=Chat(
            train=(str(workdir / "train.json"),), validation=(str(workdir / "validation.json"),),
            tokenizer=str(workdir / "tokenizer"),
        ),
        optim=Optim(peak_lr=3e-3, final_lr=3e-4, warmup_steps=10),
        train=Train(epochs=epochs, batch_size=16, eval_every=12, save_every=10_000, log_every=12, track=()),
    )  # fmt: skip
    ways: dict[str, tuple[Any, ...]] = {
        "nothing": (),
        "label smoothing": (LabelSmoothing(),),
        "EMA 0.97": (EMA(decay=0.97),),
        "NEFTune": (NEFTune(),),
        "R-Drop": (RDrop(),),
        "FGM": (FGM(),),
        "layer-wise decay": (LayerDecay(),),
    }
    ways["all"] = tuple(one for measures in ways.values() for one in measures)
    found = {}
    print("| with | lowest validation loss | at the end | seconds |\n|---|---:|---:|---:|")
    for name, measures in ways.items():
        run = replace(plain, name=name.replace(" ", "-"), measures=measures)
        start = time.perf_counter()
        train(run, progress=False)
        losses = [r["val_loss"] for r in read_metrics(run.folder / "metrics.jsonl") if "val_loss" in r]
        found[name] = [min(losses), losses[-1], time.perf_counter() - start]
        print(f"| {name} | {min(losses):.3f} | {losses[-1]:.3f} | {found[name][2]:.0f} |", flush=True)
    (workdir / "overfitting.json").write_text(json.dumps({"machine": machine(), "found": found}))


if __name__ == "__main__":
    tyro.cli(main)
