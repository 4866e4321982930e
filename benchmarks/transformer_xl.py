"""Compares Transformer-XL with the plain decoder: losses at equal size and tokens, and evaluation speed.

    python benchmarks/transformer_xl.py losses --text ../shared/data/tinyshakespeare.txt --workdir /tmp/xl
    python benchmarks/transformer_xl.py speed

`losses` trains configs/transformer_xl_shakespeare.py and configs/shakespeare_char.py and evaluates both on
the whole validation text: the decoder with disjoint windows and with windows that slide by one token (each
token then sees the 63 before it), Transformer-XL with memories of several lengths.

`speed` repeats section 4.5 of the paper (Dai et al. 2019): seconds per token of a model that reads segments
of 128 with a memory, against a plain decoder of the same shape that rereads its whole window for every token,
at the paper's attention lengths of 800 and 3,800; random weights, one row, float32.
"""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

ROOT = Path(__file__).parents[1]
SEGMENT = 128


@dataclass(frozen=True)
class Losses:
    """Train both models and compare their losses."""

    text: Path
    workdir: Path
    memories: tuple[int, ...] = (0, 64, 128, 256, 512)
    """Memory lengths in evaluation."""


@dataclass(frozen=True)
class Speed:
    """Measure the speed of evaluation."""

    lengths: tuple[int, ...] = (800, 3800)
    rounds: int = 5
    layers: int = 16
    width: int = 410
    heads: int = 10
    mlp_width: int = 2100


def losses(args: Losses) -> None:
    from jaxgpt.config import load
    from jaxgpt.data.prepare import prepare
    from jaxgpt.evals import perplexity
    from jaxgpt.evals.scoring import Scorer
    from jaxgpt.models import parameter_counts
    from jaxgpt.sample.load import load_trained
    from jaxgpt.train.loop import train

    text = str(args.text.resolve())
    args.workdir.mkdir(parents=True, exist_ok=True)
    os.chdir(args.workdir)
    prepare([text], Path("data/shakespeare"), tokenizer="byte", validation=0.1, split="tail")
    for name in ("shakespeare_char", "transformer_xl_shakespeare"):
        run = load(ROOT / "configs" / f"{name}.py")
        start = time.perf_counter()
        train(run)
        seconds = time.perf_counter() - start
        print(f"{name}: {parameter_counts(run.model)['total']:,} parameters, {seconds:.0f} s")
    plain, recurrent = (load_trained(f"runs/{n}") for n in ("shakespeare_char", "transformer_xl_shakespeare"))
    documents = list(perplexity.read_split("data/shakespeare", "validation", plain.tokenizer))
    for stride in (0, 1):
        start = time.perf_counter()
        total = perplexity.sliding(Scorer.of(plain), documents, stride, 64)
        seconds = time.perf_counter() - start
        how = f"stride {stride}" if stride else "disjoint windows"
        print(f"decoder, {how}: {total.figures()['bits_per_byte']:.4f} bits per byte, {seconds:.1f} s")
    for memory in args.memories:
        model = replace(recurrent.run.model, eval_memory=memory)
        trained = recurrent._replace(run=replace(recurrent.run, model=model))
        start = time.perf_counter()
        total = perplexity.recurrent(Scorer.of(trained), documents, recurrent.run.length, 1)
        seconds = time.perf_counter() - start
        print(f"memory {memory}: {total.figures()['bits_per_byte']:.4f} bits per byte, {seconds:.1f} s")


def speed(args: Speed) -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from jaxgpt.batch import Batch
    from jaxgpt.config import GPT, Compute, TransformerXL
    from jaxgpt.models import abstract_model, init_memory, init_params
    from jaxgpt.target import Target

    compute = Compute(dtype="float32", attention="xla")
    shape = {"layers": args.layers, "width": args.width, "heads": args.heads, "mlp_width": args.mlp_width}
    sizes = {"vocab_size": 10_000, "dropout": 0.0, **shape}

    def batch(length: int) -> Batch:
        ones, places = jnp.ones((1, length), jnp.int32), jnp.arange(length)[None]
        return Batch(ones, ones, ones.astype(jnp.float32), ones, places)

    def timed(model, length: int, memory=None) -> float:
        graphdef, _ = abstract_model(model, compute, Target.of())
        params = jax.jit(lambda key: init_params(model, compute, Target.of(), key))(jax.random.key(0))

        @jax.jit
        def last(params, batch):
            module = nnx.merge(graphdef, params)
            features = module.hidden(batch)
            here = features.x_BTD if memory is not None else features.x_BTD[:, -1:]
            return module.logits(here), features.memory

        part, times = replace(batch(length), memory=memory), []
        jax.block_until_ready(last(params, part))
        for _ in range(args.rounds):
            start = time.perf_counter()
            jax.block_until_ready(last(params, part))
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    for length in args.lengths:
        xl = TransformerXL(segment=SEGMENT, memory=length, **sizes)
        memory = jax.tree.map(jnp.asarray, init_memory(xl, compute, Target.of(), 1))
        memory = jax.tree.map(lambda a: jnp.ones_like(a) if a.dtype == np.int32 else a, memory)
        ours = timed(xl, SEGMENT, memory) / SEGMENT
        plain = timed(GPT(context=length, position="none", mlp="relu", **sizes), length)
        print(
            f"attention length {length}: {1e3 * ours:.2f} ms per token with the memory, "
            f"{1e3 * plain:.1f} ms per token with a sliding window, ratio {plain / ours:.0f}"
        )


if __name__ == "__main__":
    args = tyro.cli(Losses | Speed)
    losses(args) if isinstance(args, Losses) else speed(args)
