"""What a config's training step needs on TPUs that are not here, by attention kernel: compiled, not run.

    uv pip install libtpu
    python benchmarks/tpu_compile.py llama3_8b splash v5p:4x4x4 v5p-128 [--field value ...]

XLA compiles the step for a topology and either says its memory or that it does not fit. The code asks
which platform it is on, so what it would answer on a TPU is put in its place here.
"""

from __future__ import annotations

import functools
import os
import sys
import time
from pathlib import Path


def main(name: str, kernel: str, topology: str, accelerator: str, *flags: str) -> None:
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": accelerator,
        "TPU_WORKER_HOSTNAMES": "localhost",
    }
    import jax
    from jax.experimental import topologies

    from jaxgpt import sharding
    from jaxgpt.batch import Batch
    from jaxgpt.config import load, override
    from jaxgpt.layers import attention, fusion
    from jaxgpt.models import gpt
    from jaxgpt.objectives import make_objective
    from jaxgpt.text.vocabulary import Vocabulary
    from jaxgpt.train.state import make_program
    from jaxgpt.train.step import train_step

    attention.pick_kernel = gpt.pick_kernel = lambda *_: kernel
    attention.on_cpu = fusion.on_cpu = lambda: False
    path = Path(__file__).parents[1] / "configs" / f"{name}.py"
    run = override(load(path), ["--compute.unroll", "1", *flags])
    devices = topologies.get_topology_desc(topology, platform="tpu").devices
    mesh = sharding.make_mesh(run.check_mesh(len(devices)), devices)
    program = make_program(run, mesh)
    objective = make_objective(run.objective, Vocabulary.plain(run.model.vocab_size))
    step = jax.jit(
        functools.partial(train_step, program, objective, run.train.accumulate, 0),
        donate_argnums=0,
        out_shardings=(program.shardings, sharding.replicated(mesh)),
    )
    batch = Batch.abstract(run.train.batch_size, run.length, sharding.batch_sharding(mesh))
    print(f"{name} with {kernel} on {len(devices)} x {devices[0].device_kind}, {dict(mesh.shape)}")
    start = time.perf_counter()
    with jax.set_mesh(mesh):
        try:
            memory = step.trace(program.abstract, batch).lower().compile().memory_analysis()
        except jax.errors.JaxRuntimeError as error:
            sys.exit(f"does not fit: {str(error).splitlines()[0]}")
    held, used = memory.argument_size_in_bytes / 2**30, memory.temp_size_in_bytes / 2**30
    print(f"a device: {held:.2f} GiB of state, {used:.2f} GiB of temporaries", end="; ")
    print(f"compiled in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main(*sys.argv[1:])
