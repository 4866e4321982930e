"""Contrastive search against the paper's formula computed a token at a time, and on other targets."""

from __future__ import annotations

import copy
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import HERE, model_of, plain
from tiny_models import FLOAT32, MODELS, RECITED

from jaxgpt.config import GPT, BestOf, Contrastive, Sampling
from jaxgpt.errors import UserError
from jaxgpt.models import abstract_model
from jaxgpt.sample.generate import Generator
from jaxgpt.sharding import make_mesh, param_shardings
from jaxgpt.target import Target
from jaxgpt.text.tokenizer import ByteTokenizer

PROMPTS = [[5, 250, 7], list(range(40, 57))]
CALL: dict[str, Any] = {"max_new_tokens": 10, "stop": ()}
LENGTH = 28
Tiny = tuple[GPT, dict, Generator]


@jax.jit
def forward(params: dict, tokens_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    model = model_of(MODELS["modern"])(params)
    x_BTD = model.hidden(plain(tokens_BT)).x_BTD
    return x_BTD, jax.nn.softmax(model.logits(x_BTD))


def slowly(params: dict, prompt: list[int], how: Contrastive, new: int) -> list[int]:
    """Equation 5 of the paper, by full forward passes."""
    ids = list(prompt)
    for _ in range(new):
        padded = jnp.asarray([ids + [0] * (LENGTH - len(ids))] * how.k)
        probability_V = np.asarray(forward(params, padded)[1][0, len(ids) - 1])[: ByteTokenizer().vocab_size]
        likeliest = np.argsort(-probability_V)[: how.k]
        x_KTD = np.asarray(forward(params, padded.at[:, len(ids)].set(likeliest))[0])
        x_KTD = x_KTD / np.linalg.norm(x_KTD, axis=-1, keepdims=True)
        worst_K = [(x_TD[: len(ids)] @ x_TD[len(ids)]).max() for x_TD in x_KTD]
        scores = [
            (1 - how.alpha) * probability_V[v] - how.alpha * s
            for v, s in zip(likeliest, worst_K, strict=True)
        ]
        ids.append(int(likeliest[int(np.argmax(scores))]))
    return ids[len(prompt) :]


def test_tokens_are_those_of_the_formula_on_every_target(modern: Tiny) -> None:
    _, params, generator = modern
    how = Contrastive(k=5, alpha=0.4)
    expected = [slowly(params, prompt, how, 10) for prompt in PROMPTS]
    made = generator.generate(PROMPTS, how, **CALL)
    assert [c.ids for c in made] == expected
    greedy = generator.generate(PROMPTS, Sampling(temperature=0), **CALL)
    assert all(a.ids != b.ids for a, b in zip(made, greedy, strict=True))
    free = generator.generate(PROMPTS, Contrastive(k=5, alpha=0.0), **CALL)
    for a, b in zip(free, greedy, strict=True):
        assert a.ids == b.ids
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)
    scanned = copy.copy(generator)
    scanned.target = Target("gpu", "NVIDIA H100 80GB HBM3", interpret=True)
    scanned.update(params)
    assert [c.ids for c in scanned.generate(PROMPTS, how, **CALL)] == expected
    stop = made[0].ids[4]
    ended = generator.generate(PROMPTS, how, max_new_tokens=10, stop=[stop])
    for whole, one in zip(made, ended, strict=True):
        at = whole.ids.index(stop) + 1 if stop in whole.ids else 10
        assert (one.ids, one.finish_reason) == (whole.ids[:at], "stop" if stop in whole.ids else "length")


def test_stop_strings_cut_the_text_and_nothing_streams(reciter: Generator) -> None:
    call: dict[str, Any] = {"max_new_tokens": 20}
    how, sampled = Contrastive(alpha=0.1), Sampling(temperature=0)
    whole = reciter.generate([[ord("x")]], how, **call)[0]
    assert (whole.text, whole.finish_reason) == (RECITED, "stop")
    cut, same = (reciter.generate([[ord("x")]], d, stop_strings=["日"], **call)[0] for d in (how, sampled))
    assert (
        (cut.text, cut.ids, cut.finish_reason)
        == (same.text, same.ids, same.finish_reason)
        == ("é", cut.ids, "stop")
    )
    with pytest.raises(UserError, match="Contrastive shows no token before its text is found; use generate"):
        next(reciter.stream([[1]], how))


def test_a_mesh_makes_what_one_device_makes(modern: Tiny) -> None:
    """Contrastive search and samples that share a prompt's cache, with fewer prompts than devices."""
    model, params, generator = modern
    mesh = make_mesh({"data": 2, "tensor": 2}, jax.devices()[:4])
    placed = jax.device_put(params, param_shardings(abstract_model(model, FLOAT32, HERE)[1], mesh))
    spread = Generator(model, FLOAT32, placed, ByteTokenizer(), mesh=mesh)
    for how in (Contrastive(k=5, alpha=0.4), BestOf(n=3, sampling=Sampling(temperature=0.8))):
        one, several = (g.generate(PROMPTS[:1], how, **CALL)[0] for g in (generator, spread))
        assert (one.ids, one.text) == (several.ids, several.text)
        assert [c.ids for c in one.candidates] == [c.ids for c in several.candidates]
