"""Shows whether a change made training or decoding slower: GPT-2 124M on a CPU, two checkouts alternating.

    python benchmarks/two_trees.py OLD_CHECKOUT NEW_CHECKOUT [--rounds 5]

Each checkout runs in its own process with this Python. They alternate, so that changes of the machine's speed
affect both. Training: steps of 2 x 512 tokens, float32, forward, backward and AdamW. Decoding: greedy,
prompts of 48 tokens and 48 new tokens, prefill included.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from statistics import median

import tyro

WORKER = """
import functools, sys, time
import jax, numpy as np
from jaxgpt.batch import Batch
from jaxgpt.config import GPT, Compute, Run, Text, Train
from jaxgpt.objectives import make_objective
from jaxgpt.runtime import keep_memory
from jaxgpt.sample.generate import Generator
from jaxgpt.sharding import batch_sharding, make_mesh, replicated
from jaxgpt.train.state import init_state, make_program
from jaxgpt.train.step import train_step
try:
    from jaxgpt.text.tokenizer import ByteTokenizer
    from jaxgpt.text.vocabulary import Vocabulary
except ImportError:  # before issue 9
    from jaxgpt.data.tokenizer import ByteTokenizer
    from jaxgpt.data.vocabulary import Vocabulary
keep_memory()
model, compute = GPT(), Compute(dtype="float32", attention="xla")
run = Run(name="b", model=model, data=Text(path="none", length=512), compute=compute,
          train=Train(steps=100, batch_size=2))
mesh = make_mesh({"data": 1}, jax.devices()[:1])
program = make_program(run, mesh)
state = init_state(run, program)
generator = Generator(model, compute, jax.tree.map(np.array, state.params), ByteTokenizer())
objective = make_objective(run.objective, Vocabulary.plain(model.vocab_size))
step = jax.jit(
    functools.partial(train_step, program, objective, 1, 0),
    donate_argnums=0, out_shardings=(program.shardings, replicated(mesh)))
ids = np.random.default_rng(0).integers(0, 50_000, (2, 513), dtype=np.int32)
ones = np.ones((2, 512), np.int32)
places = np.broadcast_to(np.arange(512, dtype=np.int32), (2, 512))
batch = Batch(ids[:, :-1], ids[:, 1:], ones.astype(np.float32), ones, places)
with jax.set_mesh(mesh):
    compiled = step.lower(state, Batch.abstract(2, 512, batch_sharding(mesh))).compile()

def train():
    global state
    start = time.perf_counter()
    for _ in range(2):
        state, metrics = compiled(state, batch)
    jax.block_until_ready((state, metrics))
    return 2 * 1024 / (time.perf_counter() - start)

def decode(rows):
    prompts = [list(map(int, row % 256)) for row in np.random.default_rng(1).integers(0, 256, (rows, 48))]
    start = time.perf_counter()
    generator.generate(prompts, max_new_tokens=48, stop=[])
    return rows * 48 / (time.perf_counter() - start)

kinds = {"train": train, "decode 1": lambda: decode(1), "decode 8": lambda: decode(8)}
for kind in kinds.values():
    kind()
print("ready", flush=True)
for line in sys.stdin:
    print(kinds[line.strip()](), flush=True)
"""


def start(tree: Path) -> subprocess.Popen[str]:
    """Start the worker of one checkout and wait until it has compiled."""
    environment = os.environ | {"PYTHONPATH": str(tree.resolve()), "JAX_PLATFORMS": "cpu"}
    pipe = subprocess.PIPE
    worker = subprocess.Popen(
        [sys.executable, "-c", WORKER], stdin=pipe, stdout=pipe, text=True, env=environment
    )
    assert worker.stdout is not None
    if worker.stdout.readline().strip() != "ready":
        raise SystemExit(f"the worker of {tree} did not start; its error is printed above")
    return worker


def main(old: tyro.conf.Positional[Path], new: tyro.conf.Positional[Path], *, rounds: int = 5) -> None:
    """Print tokens/s of both checkouts: medians, the spread, and the median of the ratios per round."""
    workers = [start(old), start(new)]

    def ask(worker: subprocess.Popen[str], kind: str) -> float:
        assert worker.stdin is not None and worker.stdout is not None
        print(kind, file=worker.stdin, flush=True)
        return float(worker.stdout.readline())

    for kind in ("train", "decode 1", "decode 8"):
        pairs = []
        for turn in range(rounds):
            order = (0, 1) if turn % 2 == 0 else (1, 0)
            found = {i: ask(workers[i], kind) for i in order}
            pairs.append((found[0], found[1]))
        ratios = [b / a for a, b in pairs]
        before, after = (sorted(side) for side in zip(*pairs, strict=True))
        print(
            f"{kind}: {median(before):.1f} ({before[0]:.1f} to {before[-1]:.1f}) -> {median(after):.1f} "
            f"({after[0]:.1f} to {after[-1]:.1f}) tokens/s, new / old {median(ratios):.3f} "
            f"({min(ratios):.3f} to {max(ratios):.3f})",
            flush=True,
        )
    for worker in workers:
        worker.terminate()


if __name__ == "__main__":
    tyro.cli(main)
