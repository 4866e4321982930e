"""Objectives with whole models: chunks, sums and their weights."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pytest
from tiny import FLOAT32, MODELS, VOCABULARY, T, V, assert_close, model_of, packed, sharp_params

from jaxgpt.config import CausalLM
from jaxgpt.objectives import causal_lm


@pytest.mark.parametrize("name", MODELS)
def test_chunks_of_the_loss_change_neither_loss_nor_gradients(name):
    """With a whole model, including a tied output projection and a soft-cap."""
    model, batch, params = MODELS[name], packed([(9, 7)] * 4), sharp_params(MODELS[name])
    objective = causal_lm(CausalLM(z_loss=0.01), VOCABULARY)

    def whole(tokens):
        build = model_of(model, replace(FLOAT32, loss_chunk=tokens))
        of = lambda params: objective(build(params), batch, None)[0]  # noqa: E731
        return jax.jit(jax.value_and_grad(of))(params)

    assert_close(whole(4 * T), whole(4 * 4), 1e-6)


def test_sums_count_only_targets_with_weight():
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
