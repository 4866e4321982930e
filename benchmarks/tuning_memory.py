"""Memory of a compiled training step under each tuning method, on this machine's CPU or absent hardware.

    python benchmarks/tuning_memory.py [--only NAME ...]
    python benchmarks/tuning_memory.py --where v5e:2x4       # in an environment with libtpu

Nothing is trained. Here: 8 layers of width 512, 4 x 512 tokens, float32, with and without remat. There: 4
layers of width 1024, 32 x 512 tokens, bfloat16, remat, parameters over eight chips.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import tyro

from jaxgpt.aot import compile_for
from jaxgpt.batch import Batch
from jaxgpt.config import (
    GPT,
    BottleneckAdapters,
    Compute,
    DoRA,
    Full,
    LoRA,
    Mesh,
    PromptTuning,
    Run,
    Text,
    Train,
)
from jaxgpt.objectives import make_objective
from jaxgpt.sharding import batch_sharding, make_mesh
from jaxgpt.text.vocabulary import Vocabulary
from jaxgpt.train.state import make_program
from jaxgpt.train.step import jit_train_step

METHODS: dict[str, Any] = {
    "full": Full(),
    "lora": LoRA(rank=8),
    "int8": LoRA(rank=8, base="int8"),
    "int4": LoRA(rank=8, base="int4"),
    "nf4": LoRA(rank=8, base="nf4"),
    "dora": DoRA(rank=8),
    "prompt": PromptTuning(tokens=16),
    "houlsby": BottleneckAdapters(),
}
HERE = GPT(vocab_size=8192, context=512, layers=8, width=512, heads=8)
THERE = GPT(
    vocab_size=8192, context=1024, layers=4, width=1024, heads=8, head_width=128, position="rope",
    norm="rmsnorm", mlp="swiglu", bias=False, windows=(256, 0),
)  # fmt: skip
MIB = 2**20


def here(run: Run) -> tuple[float, float]:
    """Bytes of arguments and of temporaries of the step compiled for one CPU device."""
    mesh = make_mesh({"data": 1})
    program = make_program(run, mesh)
    batch = Batch.abstract(run.train.batch_size, run.length, batch_sharding(mesh))
    objective = make_objective(run.objective, Vocabulary.plain(run.model.vocab_size))
    base = [program.base] if program.base else []
    compiled = jit_train_step(run, program, objective).lower(program.abstract, batch, *base).compile()
    memory: Any = compiled.memory_analysis()
    return memory.argument_size_in_bytes, memory.temp_size_in_bytes


def main(where: str = "", only: tuple[str, ...] = ()) -> None:
    """Print a line for each method."""
    for name in only or tuple(METHODS):
        run = Run(name="x", model=HERE, data=Text(path="x"), init_from="x", tune=METHODS[name])
        if where:
            run = replace(
                run, model=THERE, data=Text(path="x", length=512), train=Train(batch_size=32),
                compute=Compute(dtype="bfloat16", remat="full"), mesh=Mesh(data=1, fsdp=8),
            )  # fmt: skip
            (report,) = compile_for(run, where)
            parts = {part: round(size / MIB) for part, size in report.memory.items()}
            print(f"{name:8} {report.needed / MIB:.0f} MiB per chip: {parts}", flush=True)
            continue
        for remat in ("none", "full"):
            compute = Compute(dtype="float32", remat=remat)
            held, made = here(replace(run, train=Train(batch_size=4), compute=compute))
            total = (held + made) / MIB
            print(f"{name:8} remat {remat}: {total:.0f} MiB, arguments {held / MIB:.0f}", flush=True)


if __name__ == "__main__":
    tyro.cli(main)
