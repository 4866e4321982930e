"""The chunked loss against optax's, by value and by gradient; sums and their weights."""

from __future__ import annotations

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import FLOAT32, MODELS, VOCABULARY, T, V, assert_close, model_of, packed, sharp_params

from jaxgpt.config import CausalLM
from jaxgpt.objectives import causal_lm, cross_entropy

B, D = 3, 8


@pytest.fixture(scope="module")
def inputs() -> tuple[jax.Array, ...]:
    random = np.random.default_rng(0)
    x_BTD = jnp.float32(random.standard_normal((B, T, D)))
    w_VD = jnp.float32(random.standard_normal((V, D)))
    targets_BT = jnp.int32(random.integers(0, V, (B, T)))
    weights_BT = jnp.float32(random.random((B, T)) * (random.random((B, T)) < 0.6))
    return x_BTD, w_VD, targets_BT, weights_BT


def reference(x_BTD, w_VD, bias_V, targets_BT, weights_BT, cap, z_loss):
    logits_BTV = jnp.einsum("btd,vd->btv", x_BTD, w_VD) + bias_V
    if cap is not None:
        logits_BTV = cap * jnp.tanh(logits_BTV / cap)
    nll_BT = optax.losses.softmax_cross_entropy_with_integer_labels(logits_BTV, targets_BT)
    log_z_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    hits_BT = jnp.argmax(logits_BTV, -1) == targets_BT
    loss = jnp.sum(weights_BT * (nll_BT + z_loss * log_z_BT**2))
    return loss, (jnp.sum(weights_BT * nll_BT), jnp.sum(weights_BT * hits_BT))


@pytest.mark.parametrize(("cap", "z_loss"), [(None, 0.0), (5.0, 0.1)])
def test_the_chunked_loss_is_optax_cross_entropy(inputs, cap, z_loss):
    """The gradient of an output bias, as BERT and labels have, included."""
    x, w, targets, weights = inputs
    bias_V = jnp.linspace(-1, 1, V)

    def ours(chunk):
        def loss(x, w, bias_V):
            loss, *rest = cross_entropy(x, w, bias_V, targets, weights, cap, z_loss, chunk)
            return loss, tuple(rest)

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(x, w, bias_V)

    grad = jax.value_and_grad(reference, (0, 1, 2), has_aux=True)
    expected = jax.jit(grad, static_argnums=(5, 6))(x, w, bias_V, targets, weights, cap, z_loss)
    for chunk in (1, 5, T, 100):  # 5 does not divide 16, 100 is more than all
        assert_close(ours(chunk), expected, 1e-6)


def test_without_gradients_the_loss_is_the_same(inputs):
    forward = cross_entropy(*inputs[:2], None, *inputs[2:], 5.0, 0.1, 4)
    loss, rest = reference(*inputs[:2], 0.0, *inputs[2:], 5.0, 0.1)
    assert_close(forward, (loss, *rest), 1e-6)


def test_the_gradient_follows_a_factor_on_the_loss(inputs):
    x, w, targets, weights = inputs

    def gradient(factor):
        return jax.grad(lambda x: factor * cross_entropy(x, w, None, targets, weights, None, 0.0, 4)[0])(x)

    assert_close(gradient(3.0), 3 * gradient(1.0), 1e-6)


def test_without_weight_there_is_no_gradient(inputs):
    x, w, targets, weights = inputs
    value, grads = jax.value_and_grad(
        lambda x, w: cross_entropy(x, w, None, targets, 0 * weights, 5.0, 0.1, 4)[0], (0, 1)
    )(x, w)
    assert value == 0
    assert all((g == 0).all() for g in grads)


def test_logits_far_from_zero_do_not_overflow(inputs):
    x, w, targets, weights = inputs
    (loss, *_), grads = (
        cross_entropy(1e4 * x, w, None, targets, weights, None, 0.0, 4),
        jax.grad(lambda x: cross_entropy(1e4 * x, w, None, targets, weights, None, 0.0, 4)[0])(x),
    )
    assert math.isfinite(loss)
    assert np.isfinite(grads).all()


@pytest.mark.parametrize("name", MODELS)
def test_chunks_of_the_loss_change_neither_loss_nor_gradients(name):
    """Of a whole model, a tied output projection and a soft-cap included."""
    model, batch, params = MODELS[name], packed([(9, 7)] * 4), sharp_params(MODELS[name])
    objective = causal_lm(CausalLM(z_loss=0.01), VOCABULARY)

    def whole(tokens):
        build = model_of(model, replace(FLOAT32, loss_chunk=tokens))
        of = lambda params: objective(build(params), batch, None)[0]  # noqa: E731
        return jax.jit(jax.value_and_grad(of))(params)

    assert_close(whole(4 * T), whole(4 * 4), 1e-6)


def test_sums_count_what_has_weight():
    batch = packed([(9, 7), (5,)])
    batch = replace(batch, weights_BT=batch.weights_BT.at[0, :4].set(0))
    bytes_V = np.arange(V)
    model = MODELS["gpt2"]
    objective = causal_lm(CausalLM(), replace(VOCABULARY, bytes_V=bytes_V))
    loss, weight, sums, _ = objective(model_of(model)(sharp_params(model)), batch, None)
    trained = np.asarray(batch.weights_BT) > 0
    assert weight == trained.sum() == (8 - 4) + 6 + 4
    assert sums["bytes"] == np.asarray(batch.targets_BT)[trained].sum()
    assert loss == pytest.approx(sums["nll"])
    assert 0 <= sums["correct"] <= weight
