"""How should a model know the position of a token?

A learned table (GPT-2), rotary embeddings (RoFormer), a slope on the scores (ALiBi), T5's learned buckets of
distances, or only the causal mask (NoPE). The learned table adds 128 x 128 parameters, the buckets add 32 per
head and layer.

    jaxgpt sweep configs/ablations/positions.py

Expected: validation losses of 2.12, 1.89 (RoPE), 1.96 (ALiBi), 2.16 (buckets), 2.32 (none);
benchmarks/results has the table.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from jaxgpt.config import Run, load


def config() -> Run:
    return load(Path(__file__).with_name("base.py"))


def sweep() -> Iterator[tuple[str, Run]]:
    base = config()
    for position in ("learned", "rope", "alibi", "relative", "none"):
        yield position, replace(base, model=replace(base.model, position=position))
