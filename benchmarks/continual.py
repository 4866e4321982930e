"""Two corpora in turn: what is forgotten of the first, with and without replay and penalties.

    python -m benchmarks.continual ../shared/data --workdir /tmp/continual [--steps 400]

A decoder on bytes learns Shakespeare, and from its parameters the C4 pages, in several ways. Bits per byte of
held-out text of both are compared. Weights of the penalties were tried at three values each on these very
validation texts, and all are shown. Finished runs are kept.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from benchmarks.common import machine
from jaxgpt.config import EWC, GPT, L2SP, Compute, Optim, Replay, Run, Text, Train
from jaxgpt.data.prepare import prepare
from jaxgpt.evals.loss import loss_of
from jaxgpt.sample.load import load_trained
from jaxgpt.train.loop import train

MODEL = GPT(
    vocab_size=264, context=128, layers=4, width=128, heads=4, position="rope", norm="rmsnorm", mlp="swiglu",
    bias=False,
)  # fmt: skip


def main(data: Annotated[Path, tyro.conf.Positional], *, workdir: Path, steps: int = 400) -> None:
    sources = {"old": data / "tinyshakespeare.txt", "new": data / "c4_300.jsonl"}
    for name, source in sources.items():
        prepare([str(source)], workdir / name, tokenizer="byte", split="tail", validation=0.05)
    texts = {name: Text(path=str(workdir / name)) for name in sources}
    old = Run(
        name="old",
        runs=str(workdir / "runs"),
        model=MODEL,
        compute=Compute(dtype="float32"),
        data=texts["old"],
        optim=Optim(peak_lr=3e-3, final_lr=3e-4, warmup_steps=20),
        train=Train(steps=steps, batch_size=16, eval_every=steps, save_every=steps, track=()),
    )
    train(old)
    base = replace(old, init_from=str(old.folder), data=texts["new"], optim=replace(old.optim, peak_lr=1e-3))
    ways: dict[str, dict[str, Any]] = {
        "nothing": {},
        **{f"L2-SP {w:g}": {"measures": (L2SP(weight=w),)} for w in (0.01, 0.1, 1.0)},
        **{f"EWC {w:g}": {"measures": (EWC(weight=w),)} for w in (100.0, 1000.0, 10_000.0)},
        **{f"replay {s:g}": {"replay": Replay(run=str(old.folder), share=s)} for s in (0.05, 0.2)},
        "replay 0.05 and EWC 1000": {
            "replay": Replay(run=str(old.folder), share=0.05), "measures": (EWC(weight=1000.0),)
        },
    }  # fmt: skip
    rows = {"the first corpus alone": old.folder}
    for name, parts in ways.items():
        run = replace(base, name=name.replace(" ", "-"), **parts)
        train(run)
        rows[name] = run.folder
    found = {}
    print("\n| after the second corpus, with | bits per byte of the first | of the second |\n|---|---:|---:|")
    for name, folder in rows.items():
        trained = load_trained(folder, which="newest")
        found[name] = [loss_of(trained, text)["bits_per_byte"] for text in texts.values()]
        print(f"| {name} | {found[name][0]:.3f} | {found[name][1]:.3f} |", flush=True)
    (workdir / "continual.json").write_text(
        json.dumps({"machine": machine(), "steps": steps, "found": found})
    )


if __name__ == "__main__":
    tyro.cli(main)
