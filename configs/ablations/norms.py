"""Which norm, and where does it belong?

LayerNorm on a branch's input (GPT-2), RMSNorm there (Llama), LayerNorm on the sum after the branch (the first
Transformer, BERT), RMSNorm on a branch's input and output (Gemma 2), and GPT-2's norm with normalised queries
and keys. The matrices are the same in all variants.

    jaxgpt sweep configs/ablations/norms.py

Expected: validation losses of 2.12, 2.13, 3.34, 2.38, 2.15. Norms after the sum do not start to learn at this
learning rate, which is the baseline's; with --optim.peak-lr 5e-4 they reach 2.54.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from jaxgpt.config import Run, load

VARIANTS = {
    "layernorm_pre": {},
    "rmsnorm_pre": {"norm": "rmsnorm"},
    "layernorm_post": {"norm_at": "post"},
    "rmsnorm_both": {"norm": "rmsnorm", "norm_at": "both"},
    "qk_norm": {"qk_norm": True},
}


def config() -> Run:
    return load(Path(__file__).with_name("base.py"))


def sweep() -> Iterator[tuple[str, Run]]:
    base = config()
    for name, fields in VARIANTS.items():
        yield name, replace(base, model=replace(base.model, **fields))
