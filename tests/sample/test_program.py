"""Generation's program in both forms: layers apart, and scanned with the cache as carry."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pytest
from tiny import HERE
from tiny_models import FLOAT32, MODELS, SIZE, sharp_params

from jaxgpt.config import Model, MoE, TransformerXL
from jaxgpt.layers.cache import StackedCache
from jaxgpt.sample import program
from jaxgpt.sample.generate import Generator
from jaxgpt.sample.program import Program, prepare
from jaxgpt.sample.settings import Sampling
from jaxgpt.target import Target
from jaxgpt.text.tokenizer import ByteTokenizer

GPU = Target("gpu", "NVIDIA H100 80GB HBM3", interpret=True)
XL = TransformerXL(**SIZE, layers=2, width=32, heads=4, mlp_width=64, memory=6, eval_memory=9)
FORMS: dict[str, Model] = MODELS | {
    "relative": replace(MODELS["gpt2"], position="relative"),
    "experts": replace(MODELS["modern"], moe=MoE(experts=4, per_token=2, width=16)),
    "prefix": replace(MODELS["modern"], windows=(), prefix=True),
    "transformer-xl": XL,
    "transformer-xl, biases of its own": replace(XL, shared_biases=False, norm_at="pre"),
}
PROMPTS = [[5, 250, 7], list(range(40, 57))]
DRAWN = Sampling(temperature=1.3, top_k=200, repetition_penalty=1.1)


@pytest.mark.parametrize("name", FORMS)
def test_scanned_layers_make_what_layers_apart_make(name: str) -> None:
    model = FORMS[name]
    params = sharp_params(model)
    apart = Generator(model, FLOAT32, params, ByteTokenizer())
    prog, rows = apart._call(PROMPTS, DRAWN, 12, [3, 4], ())
    scanned = replace(prog, target=GPU)
    a = program.generate(prog, apart.params, rows)
    b = program.generate(scanned, prepare(model, prog.compute, GPU, params), rows)
    np.testing.assert_array_equal(a.tokens_BS, b.tokens_BS)
    np.testing.assert_allclose(a.logprobs_BS, b.logprobs_BS, atol=3e-5)
    assert (a.length_B == rows.length_B + 12).all()
