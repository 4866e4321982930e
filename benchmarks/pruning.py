"""Layers, heads and hidden units less: size, speed and loss, and what distillation brings back.

    python -m benchmarks.pruning ../shared/data/tinyshakespeare.txt --workdir /tmp/pruning

Trains the model of configs/shakespeare_char.py, prunes it in four ways by what matters on the training text,
and then trains each for the same number of steps on the next token, and by distillation from the original.
Losses are nats per byte over the whole validation split; speed is greedy decoding, one row.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from benchmarks.common import machine
from configs.shakespeare_char import config
from jaxgpt.config import CausalLM, Distillation, Optim, Run, load_run
from jaxgpt.convert.prune import RECORD, prune
from jaxgpt.data.prepare import prepare
from jaxgpt.evals.loss import validation_loss
from jaxgpt.files import write_json
from jaxgpt.train.loop import train

CUTS = {
    "2 of 4 layers": {"layers": 2},
    "2 of 4 heads": {"heads": 2},
    "192 of 512 units": {"width": 192},
    "3 layers, 3 heads, 256 units": {"layers": 3, "heads": 3, "width": 256},
}


def main(
    text: Annotated[Path, tyro.conf.Positional], *, workdir: Path, steps: int = 2000, again: int = 500
) -> None:
    data = workdir / "data"
    if not data.exists():
        prepare((str(text),), out=data, tokenizer="byte", validation=0.1, split="tail")
    plain = config()
    base = replace(plain, runs=str(workdir / "runs"), data=replace(plain.data, path=str(data)))
    base = replace(base, train=replace(base.train, steps=steps, eval_every=500))
    train(base, progress=False)
    rows: dict[str, Any] = {"whole": {"loss": validation_loss(base.folder)["loss"]}}
    for number, (name, asked) in enumerate(CUTS.items()):
        out = workdir / f"pruned-{number}"
        if not out.exists():
            prune(str(base.folder), str(out), text=(str(text),), rows=64, length=64, **asked)
        record = json.loads((out / RECORD).read_text())
        rows["whole"] |= {key: record["before"][key] for key in ("parameters", "tokens_per_second")}
        row = {key: record["after"][key] for key in ("parameters", "tokens_per_second")}
        row["pruned"] = validation_loss(out, data=base.data)["loss"]
        objectives = {"next token": CausalLM(), "distilled": Distillation(teacher=str(base.folder))}
        for how, objective in objectives.items():
            tuned = _tuned(base, out, f"{number}-{how.replace(' ', '-')}", objective, again)
            train(tuned, progress=False)
            row[how] = validation_loss(tuned.folder, which="newest")["loss"]
        rows[name] = row
        print(name, row, flush=True)
    found = {"machine": machine(), "steps": steps, "again": again, "rows": rows}
    write_json(workdir / "pruning.json", found)
    print(json.dumps(found, indent=1))


def _tuned(base: Run, source: Path, name: str, objective: Any, steps: int) -> Run:
    """The run that trains a pruned model again."""
    return replace(
        base,
        name=name,
        model=load_run(source).model,
        init_from=str(source),
        objective=objective,
        optim=Optim(peak_lr=1e-3, final_lr=1e-4, b2=0.995, warmup_steps=50),
        train=replace(base.train, steps=steps, eval_every=steps),
    )


if __name__ == "__main__":
    tyro.cli(main)
