"""What each way of decoding costs beside greedy decoding, of a small GPT with random weights.

    python benchmarks/decodings.py [--layers 8 --width 512 --prompts 4 --new 64]

Every way makes one completion of `new` tokens for each prompt of 48 tokens, prefill included; seconds are the
median of `rounds`, after one that compiles.
"""

from __future__ import annotations

import statistics
import time

import jax
import numpy as np
import tyro

from jaxgpt.config import GPT, MBR, Beam, BestOf, Compute, Contrastive, Decoding, Sampling
from jaxgpt.models import init_params
from jaxgpt.runtime import keep_memory
from jaxgpt.sample.generate import Generator
from jaxgpt.target import Target
from jaxgpt.text.tokenizer import ByteTokenizer

WAYS: dict[str, Decoding] = {
    "greedy": Sampling(temperature=0),
    "sampling": Sampling(),
    "typical sampling, no 3 tokens twice": Sampling(typical_p=0.9, no_repeat_ngram=3),
    "4 beams": Beam(beams=4),
    "4 beams, no 3 tokens twice": Beam(beams=4, no_repeat_ngram=3),
    "4 beams in 2 groups": Beam(beams=4, groups=2),
    "contrastive, k=4": Contrastive(k=4),
    "best of 4": BestOf(n=4),
    "minimum Bayes risk of 4": MBR(n=4),
}


def main(
    layers: int = 8, width: int = 512, vocab: int = 32_000, prompts: int = 4, new: int = 64, rounds: int = 5
) -> None:
    """Print a table of seconds per call, and as a multiple of greedy decoding's."""
    keep_memory()
    model = GPT(vocab_size=vocab, context=512, layers=layers, width=width, heads=8)
    compute = Compute(dtype="float32")
    params = jax.jit(init_params, static_argnums=(0, 1, 2))(model, compute, Target.of(), jax.random.key(0))
    generator = Generator(model, compute, params, ByteTokenizer())
    asked = np.random.default_rng(0).integers(0, 256, (prompts, 48)).tolist()
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(rounds + 1):
        for name, how in WAYS.items():
            start = time.perf_counter()
            made = generator.generate(asked, how, max_new_tokens=new, stop=())
            times[name].append(time.perf_counter() - start)
            assert all(len(completion.ids) == new for completion in made)
    medians = {name: statistics.median(seconds[1:]) for name, seconds in times.items()}
    print(f"{layers} layers, width {width}, vocabulary {vocab:,}, {prompts} prompts, {new} new tokens\n")
    print("| decoding | seconds | times greedy |\n|---|---|---|")
    for name, seconds in medians.items():
        print(f"| {name} | {seconds:.2f} | {seconds / medians['greedy']:.2f} |")


if __name__ == "__main__":
    tyro.cli(main)
