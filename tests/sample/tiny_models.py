"""Two tiny architectures for the sampling tests, and their full forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tiny import FLOAT32, GPT2, HERE, MODERN, plain

from jaxgpt.config import GPT, Sampling
from jaxgpt.models import abstract_model, init_params
from jaxgpt.sample.generate import Generator
from jaxgpt.sample.program import Program, Rows
from jaxgpt.text.tokenizer import ByteTokenizer

VOCAB = ByteTokenizer().vocab_size + 2  # two padding rows, which must stay unused
SIZE = {"vocab_size": VOCAB, "context": 96}
MODELS = {
    "gpt2": replace(GPT2, **SIZE),
    "modern": replace(MODERN, **SIZE, heads=4, kv_heads=2, logit_softcap=30.0, windows=(8, 0)),
}
RECITED = "é日🎉"  # no byte occurs twice, so that each determines the next


def sharp_params(model: GPT) -> dict:
    """Random parameters large enough that logits are well apart and attention is not flat."""
    params = init_params(model, FLOAT32, HERE, jax.random.key(1))
    return jax.tree.map(lambda p: p * (6.0 if p.ndim > 1 and p.std() > 0 else 1.0), params)


@partial(jax.jit, static_argnums=0)
def _forward(model: GPT, params: dict, tokens_BT: jax.Array) -> jax.Array:
    decoder = nnx.merge(abstract_model(model, FLOAT32, HERE)[0], params)
    return decoder.logits(decoder.hidden(plain(tokens_BT)).x_BTD)


def full_logits(model: GPT, params: dict, ids: list[int]) -> np.ndarray:
    """Logits [T, V] of one row by the training forward pass, without cache or padding."""
    return np.asarray(_forward(model, params, jnp.asarray([ids])))[0]


def program_of(
    generator: Generator,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    most: int,
    seeds: Sequence[int],
    stop: Sequence[int] | None,
) -> tuple[Program, Rows]:
    """The program of a call and its arguments."""
    call = generator.asked(prompts, sampling, {"max_new_tokens": most, "seeds": seeds, "stop": stop})
    return generator.program(call, [sampling] * len(prompts))
