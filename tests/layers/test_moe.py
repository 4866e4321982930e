"""Experts: nothing dropped, nothing padded, the same on every mesh; the balance by hand.

Shapes: B batch, T length, D width, E experts, K experts a token.
"""

from __future__ import annotations

import functools
import operator
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import FLOAT32, HERE, ONE, assert_close, mesh

from jaxgpt.config import GPT, MoE
from jaxgpt.layers.mlp import ACTIVATIONS
from jaxgpt.layers.moe import Experts

B, T, D, E, K = 8, 6, 16, 4, 2
PLAIN = GPT(vocab_size=8, layers=2, width=D, heads=2, mlp_width=8, moe=MoE(experts=E, per_token=K))
MIXTRAL = replace(PLAIN, mlp="swiglu")
QWEN = replace(MIXTRAL, moe=MoE(experts=E, per_token=K, width=12, normalise=False, shared_width=24))
forms = pytest.mark.parametrize("model", [PLAIN, MIXTRAL, QWEN], ids=["plain", "mixtral", "qwen"])


@cache
def build(model: GPT) -> tuple[nnx.GraphDef, dict]:
    graphdef, state = nnx.split(Experts(jax.random.key(0), model, FLOAT32, HERE))
    random = np.random.default_rng(0)
    params = nnx.to_pure_dict(state)
    return graphdef, jax.tree.map(lambda p: jnp.float32(0.5 * random.standard_normal(p.shape)), params)


def features(seed: int = 1) -> jax.Array:
    return jnp.float32(np.random.default_rng(seed).standard_normal((B, T, D)))


def dense_sum(model: GPT, params: dict, x_BTD: jax.Array) -> np.ndarray:
    """The definition: every expert on every token, weighted by 0 where it was not chosen."""
    x = np.asarray(x_BTD, np.float64)

    def get(*path: str) -> np.ndarray:
        return np.asarray(functools.reduce(operator.getitem, path, params), np.float64)

    logits = x @ get("router", "weight")
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    chosen = np.argsort(-probs, axis=-1)[..., :K]
    weights = np.zeros_like(probs)
    np.put_along_axis(weights, chosen, np.take_along_axis(probs, chosen, -1), -1)
    if model.moe.normalise:
        weights /= weights.sum(-1, keepdims=True)
    act = lambda a: np.asarray(ACTIVATIONS[model.mlp][0](jnp.asarray(a)), np.float64)  # noqa: E731
    y = np.zeros_like(x)
    for e in range(E):
        up = x @ get("up", "weight")[e]
        h = act(x @ get("gate", "weight")[e]) * up if "gate" in params else act(up)
        y += weights[..., e : e + 1] * (h @ get("down", "weight")[e])
    if "shared" in params:
        h = act(x @ get("shared", "gate", "weight")) * (x @ get("shared", "up", "weight"))
        gate = 1 / (1 + np.exp(-x @ get("shared_gate", "weight")))
        y += gate * (h @ get("shared", "down", "weight"))
    return y


@forms
def test_dropless_experts_are_the_dense_sum(model: GPT) -> None:
    model = replace(model, bias=False)
    graphdef, params = build(model)
    y_BTD, _ = jax.jit(lambda params, x: nnx.merge(graphdef, params)(x))(params, features())
    np.testing.assert_allclose(y_BTD, dense_sum(model, params, features()), rtol=1e-4, atol=1e-4)


def test_no_token_is_dropped_when_all_go_to_one_expert() -> None:
    graphdef, params = build(replace(MIXTRAL, bias=False))
    params = params | {"router": {"weight": jnp.zeros((D, E)).at[0, 2].set(50.0).at[0, 1].set(40.0)}}
    x_BTD = features().at[..., 0].set(1.0)
    y_BTD, _ = jax.jit(lambda params, x: nnx.merge(graphdef, params)(x))(params, x_BTD)
    expected = dense_sum(replace(MIXTRAL, bias=False), params, x_BTD)
    np.testing.assert_allclose(y_BTD, expected, rtol=1e-4, atol=1e-4)
    assert (np.abs(np.asarray(y_BTD)).max(-1) > 1e-3).all()


@pytest.mark.parametrize(
    "sizes",
    [ONE | {"expert": 4, "tensor": 2}, ONE | {"expert": 2, "fsdp": 2, "data": 2}],
    ids=["expert=4,tensor=2", "expert=2,fsdp=2,data=2"],
)
@forms
def test_experts_on_eight_devices_equal_one(model: GPT, sizes: dict[str, int]) -> None:
    """Values and the gradients of everything, the balancing loss included."""
    graphdef, params = build(model)
    cotangent_BTD = features(2)

    def loss(params: dict, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
        y_BTD, (balance, *_) = nnx.merge(graphdef, params)(x_BTD)
        return jnp.sum(y_BTD * cotangent_BTD) + balance, y_BTD

    gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)
    one = jax.jit(gradients)(params, features())
    with jax.set_mesh(mesh(sizes)):
        eight = jax.jit(gradients)(params, features())
    assert_close(one, jax.device_get(eight), 1e-5)


def test_the_balance_is_one_choice_each_when_even_and_counts_no_padding() -> None:
    graphdef, params = build(PLAIN)
    layer = nnx.merge(graphdef, params)
    x_BTD = features()
    probs = np.asarray(jax.nn.softmax(layer.router(x_BTD), axis=-1), np.float64)
    real = np.zeros((B, T), bool)
    real[:, :4] = True
    sent = np.zeros((B, T, E))
    np.put_along_axis(sent, np.argsort(-probs, -1)[..., :K], 1.0, -1)
    by_hand = E * (sent[real].mean(0) * probs[real].mean(0)).sum()
    _, (balance, *_) = layer(x_BTD, jnp.asarray(real))
    assert balance == pytest.approx(0.01 * by_hand, rel=1e-5)
    even = params | {"router": {"weight": jnp.zeros((D, E))}}
    assert nnx.merge(graphdef, even)(x_BTD)[1].balance == pytest.approx(0.01 * K)
