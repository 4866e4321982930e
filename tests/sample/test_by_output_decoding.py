"""Decoding with weights by output: the same text, or nearly the same log-probabilities in int8."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pytest
from tiny import FLOAT32
from tiny_models import MODELS, sharp_params

from jaxgpt.config import MoE, Sampling
from jaxgpt.errors import UserError
from jaxgpt.layers.by_output import ByOutput
from jaxgpt.sample.generate import Generator
from jaxgpt.sample.program import require_by_output
from jaxgpt.target import Target
from jaxgpt.text.tokenizer import ByteTokenizer

MODEL = replace(MODELS["modern"], moe=MoE(experts=4, per_token=2, width=16))
PROMPTS = [[5, 250, 7], list(range(40, 57))]


def test_the_text_is_the_same_and_int8_is_near() -> None:
    """One row and two, of a model with experts, whose weights stay as they are."""
    params, greedy = sharp_params(MODEL), Sampling(temperature=0)
    made = {}
    for weights in ("own", "by_output", "int8"):
        generator = Generator(MODEL, FLOAT32, params, ByteTokenizer(), weights=weights)
        made[weights] = generator.generate(PROMPTS, greedy, max_new_tokens=6, stop=())
        alone = generator.generate(PROMPTS[:1], greedy, max_new_tokens=6, stop=())[0]
        assert alone.ids == made[weights][0].ids
        np.testing.assert_allclose(alone.logprobs, made[weights][0].logprobs, atol=3e-5)
    held = jax.tree.leaves(generator.params, is_leaf=lambda leaf: isinstance(leaf, ByOutput))
    assert {leaf.values_OI.dtype.name for leaf in held if isinstance(leaf, ByOutput)} == {"int8", "float32"}
    for own, same, near in zip(*made.values(), strict=True):
        assert own.ids == same.ids
        np.testing.assert_allclose(own.logprobs, same.logprobs, atol=3e-5)
        assert abs(own.logprobs[0] - near.logprobs[0]) < 0.5


def test_it_is_refused_where_nothing_reads_it() -> None:
    with pytest.raises(UserError, match="one CPU device"):
        require_by_output(MODEL, Target("gpu", "NVIDIA H100"))
