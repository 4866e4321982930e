"""Which activation is best, and does a gate pay off with an equal number of parameters?

GELU (GPT-2), ReLU, squared ReLU (Primer), and the gated SwiGLU (Llama) and GeGLU (Gemma). A gate is a third
matrix, so the gated MLPs have two thirds of the MLP's hidden size (Shazeer 2020): 341 in place of 512, which
makes 0.1 % fewer parameters.

    jaxgpt sweep configs/ablations/mlps.py

Expected: validation losses of 2.12, 2.08, 2.09, 2.09 and 2.10: within 2 % of each other.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from jaxgpt.config import Run, load


def config() -> Run:
    return load(Path(__file__).with_name("base.py"))


def sweep() -> Iterator[tuple[str, Run]]:
    base = config()
    for mlp in ("gelu", "relu", "relu2", "swiglu", "geglu"):
        hidden = 2 * base.model.hidden // 3 if mlp in ("swiglu", "geglu") else base.model.hidden
        yield mlp, replace(base, model=replace(base.model, mlp=mlp, mlp_width=hidden))
