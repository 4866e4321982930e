"""What does it cost to limit attention, or to share its keys and values?

Variants: every token sees all earlier tokens; only 32 (Mistral's window); all and 32 in alternating layers
(GPT-3); two or one key-value heads for four attention heads (grouped-query and multi-query attention, with 8
and 12 % fewer parameters); scores capped at 50 (Gemma 2).

    jaxgpt sweep configs/ablations/attention.py

Expected: validation losses of 2.12, 2.13, 2.14, 2.14, 2.15 and 2.12: the loss barely rises.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from jaxgpt.config import Run, load

VARIANTS = {
    "full": {},
    "window": {"windows": (32,)},
    "alternating": {"windows": (0, 32)},
    "grouped": {"kv_heads": 2},
    "multi_query": {"kv_heads": 1},
    "softcap": {"attention_softcap": 50.0},
}


def config() -> Run:
    return load(Path(__file__).with_name("base.py"))


def sweep() -> Iterator[tuple[str, Run]]:
    base = config()
    for name, fields in VARIANTS.items():
        yield name, replace(base, model=replace(base.model, **fields))
