"""Compares one training step of GPT-2 124M, batch 2 x 512, with Hugging Face GPT-2 in eager PyTorch.

    python benchmarks/train_step.py --torch-python TORCH_ENV/bin/python [--rounds 5] [--out FILE]

Both sides: forward, backward and AdamW on the same shapes, without dropout. The tokens are random; speed
does not depend on them. Our side also clips the gradient and guards the update, as a run does.
"""

from __future__ import annotations

import time

import jax
import numpy as np
import tyro

from benchmarks.common import TorchWorker, alternate, machine, report, row
from jaxgpt.batch import Batch
from jaxgpt.config import GPT, Compute, Run, Text, Train
from jaxgpt.objectives import make_objective
from jaxgpt.runtime import keep_memory
from jaxgpt.sharding import batch_sharding, make_mesh
from jaxgpt.text.vocabulary import Vocabulary
from jaxgpt.train.state import init_state, make_program
from jaxgpt.train.step import jit_train_step

TORCH = """
import time, torch, transformers
from transformers import GPT2Config, GPT2LMHeadModel
B, T, STEPS = {batch}, {length}, {steps}
torch.manual_seed(0)
model = GPT2LMHeadModel(GPT2Config(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)).train()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1)
x = torch.randint(0, 50257, (B, T))
def ready(): return dict(torch=torch.__version__, transformers=transformers.__version__)
def round():
    start = time.perf_counter()
    for _ in range(STEPS):
        optimizer.zero_grad(set_to_none=True)
        model(x, labels=x).loss.backward()
        optimizer.step()
    return STEPS * B * T / (time.perf_counter() - start)
"""


class OurStep:
    """Our training step of GPT-2 124M, compiled, with its state and a batch.

    Args:
      batch, length: B and T.
      dtype: compute type.
    """

    def __init__(self, batch: int, length: int, dtype: str) -> None:
        self.model = GPT(vocab_size=50304, context=1024)
        run = Run(
            name="benchmark",
            model=self.model,
            data=Text(path="none"),
            compute=Compute(dtype=dtype),
            train=Train(steps=1000, batch_size=batch),
        )
        self.mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1})
        program = make_program(run, self.mesh)
        self.state = init_state(run, program)
        objective = make_objective(run.objective, Vocabulary.plain(self.model.vocab_size))
        ids = np.random.default_rng(0).integers(0, 50257, (batch, length + 1)).astype(np.int32)
        ones, index = np.ones((batch, length), np.int32), np.arange(length, dtype=np.int32)
        data = Batch(ids[:, :-1], ids[:, 1:], ones.astype(np.float32), ones, np.tile(index, (batch, 1)))
        self.data = jax.device_put(data, batch_sharding(self.mesh))
        with jax.set_mesh(self.mesh):
            self.compiled = jit_train_step(run, program, objective).lower(self.state, self.data).compile()

    def run(self, steps: int) -> float:
        """Run some steps; returns their seconds."""
        start = time.perf_counter()
        with jax.set_mesh(self.mesh):
            for _ in range(steps):
                self.state, _ = self.compiled(self.state, self.data)
        jax.block_until_ready(self.state)
        return time.perf_counter() - start


def our_round(batch: int, length: int, steps: int, dtype: str):
    """A function that runs `steps` steps and returns tokens/s."""
    ours = OurStep(batch, length, dtype)
    return lambda: steps * batch * length / ours.run(steps)


def main(
    torch_python: str,
    rounds: int = 5,
    steps: int = 1,
    batch: int = 2,
    length: int = 512,
    dtype: str = "float32",
    out: str | None = None,
) -> None:
    """Run the benchmark.

    Args:
      torch_python: interpreter with torch and transformers.
      rounds: number of counted rounds per side.
      steps: training steps per round.
      batch: rows per batch.
      length: tokens per row.
      dtype: compute type of our side; PyTorch's is float32.
      out: file to which the result is appended as a JSON line.
    """
    about = machine()
    keep_memory()
    torch = TorchWorker(torch_python, TORCH.format(batch=batch, length=length, steps=steps))
    ours, theirs = alternate(our_round(batch, length, steps, dtype), torch.round, rounds)
    torch.close()
    name = f"GPT-2 124M training step, {batch} x {length}, {dtype}"
    report([row(name, "tokens/s", ours, theirs)], about | torch.versions, out)


if __name__ == "__main__":
    tyro.cli(main)
