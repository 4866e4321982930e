"""How many greedy tokens of a request differ between an engine that serves it alone and one that serves many.

    python -m benchmarks.company RUN [--requests 32 --new 128] [--dtype bfloat16]

On a CPU it is none, since the same programs run on the same numbers row by row (tests/sample/test_engine.py).
On accelerators this says how far a kernel keeps to that.
"""

from __future__ import annotations

from typing import Annotated, Literal

import jax
import tyro

import jaxgpt
from jaxgpt.config import Batching, Sampling
from jaxgpt.sample.engine import Engine
from jaxgpt.sample.request import Piece, Request


def serve(engine: Engine, requests: list[Request]) -> list[list[Piece]]:
    """All requests at once, to their ends."""
    made: list[list[Piece]] = [[] for _ in requests]
    for request, pieces in zip(requests, made, strict=True):
        engine.submit(request, pieces.append)
    while engine.step():
        pass
    return made


def main(
    run: Annotated[str, tyro.conf.Positional],
    *,
    requests: int = 32,
    new: int = 128,
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    slots: int = 8,
) -> None:
    """Print the share of tokens from the first that differs on, and the largest difference before it."""
    generator = jaxgpt.load(run, dtype=dtype).generator
    texts = [f"{i} times {i * 7} and then" * (1 + i % 5) for i in range(requests)]
    greedy = Sampling(temperature=0)
    asked = [
        Request(prompt=prompt, max_new_tokens=new, sampling=greedy, stop=())
        for prompt in generator.texts(texts)["prompts"]
    ]
    together = serve(Engine(generator, Batching(slots=slots)), asked)
    differing, largest, total = 0, 0.0, 0
    for request, pieces in zip(asked, together, strict=True):
        (alone,) = serve(Engine(generator, Batching(slots=slots)), [request])
        same = next(
            (i for i, (a, b) in enumerate(zip(alone, pieces, strict=True)) if a.id != b.id), len(pieces)
        )
        differing, total = differing + len(pieces) - same, total + len(pieces)
        largest = max(
            [largest, *(abs(a.logprob - b.logprob) for a, b in zip(alone[:same], pieces, strict=False))]
        )
    print(f"{jax.devices()[0].device_kind}, {dtype}: {total} tokens of {requests} requests in {slots} slots")
    share = f"{100 * differing / total:.2f} %"
    print(f"differ: {share}; largest difference of a log-probability before: {largest:.1e}")


if __name__ == "__main__":
    tyro.cli(main)
