"""Tiny models for the sampling tests: two architectures, and one that recites a fixed text."""

from __future__ import annotations

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import HERE
from tiny_models import FLOAT32, MODELS, RECITED, VOCAB, sharp_params

from jaxgpt.config import GPT
from jaxgpt.models import init_params
from jaxgpt.sample.generate import Generator
from jaxgpt.text.tokenizer import ByteTokenizer


def _tiny(name: str) -> tuple[GPT, dict, Generator]:
    params = sharp_params(MODELS[name])
    return MODELS[name], params, Generator(MODELS[name], FLOAT32, params, ByteTokenizer())


@pytest.fixture(scope="session", params=sorted(MODELS))
def tiny(request: pytest.FixtureRequest) -> tuple[GPT, dict, Generator]:
    """Each model, its parameters and its generator, on one device."""
    return _tiny(request.param)


@pytest.fixture(scope="session")
def modern() -> tuple[GPT, dict, Generator]:
    """The same for today's form alone, where one architecture shows enough."""
    return _tiny("modern")


@pytest.fixture(scope="session")
def reciter() -> Generator:
    """A model that answers any prompt that ends in `x` or `<|assistant|>` with `RECITED`."""
    tokenizer = ByteTokenizer()
    control, chain = tokenizer.control, [*RECITED.encode(), tokenizer.control["<|end|>"]]
    links = dict(pairwise(chain))
    links |= {ord("x"): chain[0], control["<|assistant|>"]: chain[0]}
    model = GPT(vocab_size=VOCAB + 7, context=48, layers=1, width=VOCAB + 7, heads=1, tied=False)
    params = jax.tree.map(jnp.zeros_like, init_params(model, FLOAT32, HERE, jax.random.key(0)))
    params["norm"]["scale"] += 1
    params["embed"]["weight"] = 10 * jnp.eye(model.vocab_size)
    head = np.zeros((model.vocab_size, model.width), np.float32)
    for token, following in links.items():
        head[following, token] = 1
    params["head"]["weight"] = jnp.asarray(head)
    return Generator(model, FLOAT32, params, tokenizer)
