"""Compares greedy decoding of GPT-2 124M (random weights, float32) with Hugging Face `generate`.

    python benchmarks/decode.py --torch-python TORCH_ENV/bin/python [--batches 1 8] [--out FILE]

Both sides: prompts of 48 tokens, 48 new tokens per row with a key-value cache, prefill included.
"""

from __future__ import annotations

import time

import jax
import numpy as np
import tyro

from benchmarks.common import TorchWorker, alternate, machine, report, row
from jaxgpt.config import GPT, Compute
from jaxgpt.models import init_params
from jaxgpt.runtime import keep_memory
from jaxgpt.sample.generate import Generator
from jaxgpt.sample.settings import Sampling
from jaxgpt.target import Target
from jaxgpt.text.tokenizer import ByteTokenizer

TORCH = """
import time, torch, transformers
from transformers import GPT2Config, GPT2LMHeadModel
B, T, N = {batch}, {prompt}, {new}
torch.manual_seed(0)
model = GPT2LMHeadModel(GPT2Config()).eval()
x = torch.randint(0, 50257, (B, T))
def ready(): return dict(torch=torch.__version__, transformers=transformers.__version__)
def round():
    start = time.perf_counter()
    with torch.no_grad():
        made = model.generate(
            x, attention_mask=torch.ones_like(x), max_new_tokens=N, min_new_tokens=N,
            do_sample=False, use_cache=True, pad_token_id=50256)
    assert made.shape == (B, T + N)
    return B * N / (time.perf_counter() - start)
"""


def main(
    torch_python: str,
    batches: tuple[int, ...] = (1, 8),
    rounds: int = 5,
    prompt: int = 48,
    new: int = 48,
    out: str | None = None,
) -> None:
    """Run the benchmark.

    Args:
      torch_python: interpreter with torch and transformers.
      batches: batch sizes, one benchmark each.
      rounds: number of counted rounds per side.
      prompt: tokens per prompt.
      new: new tokens per row.
      out: file to which the result is appended as a JSON line.
    """
    about = machine()
    keep_memory()
    model, compute = GPT(vocab_size=50304, context=1024), Compute(dtype="float32")
    params = jax.jit(init_params, static_argnums=(0, 1, 2))(model, compute, Target.of(), jax.random.key(0))
    generator = Generator(model, compute, params, ByteTokenizer())
    rows = []
    for batch in batches:
        prompts = np.random.default_rng(0).integers(0, 256, (batch, prompt)).tolist()

        def ours(prompts: list = prompts) -> float:
            start = time.perf_counter()
            done = generator.generate(prompts, Sampling(temperature=0), max_new_tokens=new, stop=())
            seconds = time.perf_counter() - start
            return sum(len(c.ids) for c in done) / seconds

        torch = TorchWorker(torch_python, TORCH.format(batch=batch, prompt=prompt, new=new))
        figures = alternate(ours, torch.round, rounds)
        torch.close()
        rows.append(row(f"GPT-2 124M greedy decoding, batch {batch}", "tokens/s", *figures))
    report(rows, about | torch.versions, out)


if __name__ == "__main__":
    tyro.cli(main)
