"""The adaptive softmax: normalised, equal to the definition by hand, and the same in chunks.

Shapes: N positions, D hidden size, V ids.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import FLOAT32, HERE

from jaxgpt.config import TransformerXL
from jaxgpt.layers.adaptive import AdaptiveSoftmax, Tables

V, D, N = 30, 8, 6
EDGES = (0, 10, 18, V)
FORMS = {
    f"div={div} tied={tied}": TransformerXL(
        vocab_size=V, width=D, heads=2, cutoffs=EDGES[1:-1], div=div, tied=tied
    )
    for div in (1, 2)
    for tied in (True, False)
}
forms = pytest.mark.parametrize("name", FORMS)


@cache
def parts(name: str) -> tuple[Tables, AdaptiveSoftmax, jax.Array]:
    """Embedding and softmax with large random weights and biases; features."""
    model, keys = FORMS[name], jax.random.split(jax.random.key(0), 3)
    modules = Tables(keys[0], model, FLOAT32, HERE), AdaptiveSoftmax(keys[1], model, FLOAT32, HERE)
    for module in modules:
        state = nnx.state(module)
        random = np.random.default_rng(1)
        state = jax.tree.map(lambda a, r=random: jnp.float32(0.5 * r.standard_normal(a.shape)), state)
        nnx.update(module, state)
    return *modules, jax.random.normal(keys[2], (N, D))


def plain(name: str, embed: Tables, softmax: AdaptiveSoftmax, x_ND: np.ndarray) -> np.ndarray:
    """Probabilities [N, V] by the definition: the cluster's times the id's within the cluster."""
    tables, model = softmax.tables or embed, FORMS[name]

    def logits(i: int) -> np.ndarray:
        start, end = EDGES[i : i + 2]
        if model.div == 1:
            return x_ND @ np.asarray(tables.tables[0].weight[...])[start:end].T
        own = softmax.first if i == 0 and model.tied else tables.projections[i]
        return x_ND @ np.asarray(own.weight[...]).T @ np.asarray(tables.tables[i].weight[...]).T

    bias = np.asarray(softmax.bias[...])
    first = (
        x_ND if model.div == 1 else x_ND @ np.asarray((softmax.first or tables.projections[0]).weight[...]).T
    )
    gates = first @ np.asarray(softmax.gates.weight[...]).T + np.asarray(softmax.gates_bias[...])
    head = np.exp(np.concatenate([logits(0) + bias[: EDGES[1]], gates], axis=1))
    head /= head.sum(1, keepdims=True)
    out = [head[:, : EDGES[1]]]
    for i in (1, 2):
        tail = np.exp(logits(i) + bias[EDGES[i] : EDGES[i + 1]])
        out.append(head[:, [EDGES[1] + i - 1]] * tail / tail.sum(1, keepdims=True))
    return np.concatenate(out, axis=1)


@forms
def test_probabilities_are_those_by_hand_and_sum_to_one(name: str) -> None:
    embed, softmax, x_ND = parts(name)
    probs_NV = np.exp(np.asarray(softmax.over(embed)(x_ND)))
    assert probs_NV.shape == (N, V)
    np.testing.assert_allclose(probs_NV.sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(probs_NV, plain(name, embed, softmax, np.asarray(x_ND)), rtol=2e-5)


@forms
def test_scoring_only_the_targets_gives_the_same_values_and_gradients(name: str) -> None:
    embed, softmax, x_ND = parts(name)
    targets_N = jnp.asarray([0, 9, 10, 17, 18, V - 1])  # both ends of each cluster

    def of(x_ND: jax.Array) -> tuple[jax.Array, tuple]:
        hit_N, top_N = softmax.over(embed).of(targets_N, x_ND)
        return hit_N.sum(), (hit_N, top_N)

    def whole(x_ND: jax.Array) -> tuple[jax.Array, tuple]:
        logprobs_NV = softmax.over(embed)(x_ND)
        hit_N = logprobs_NV[jnp.arange(N), targets_N]
        return hit_N.sum(), (hit_N, logprobs_NV.max(-1))

    results = [jax.value_and_grad(f, has_aux=True)(x_ND) for f in (of, whole)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *results)


@forms
def test_an_id_is_embedded_by_its_clusters_table(name: str) -> None:
    embed, _, _ = parts(name)
    vectors_VD = np.asarray(embed(jnp.arange(V), jnp.dtype("float32")))
    if FORMS[name].div == 1:
        np.testing.assert_array_equal(vectors_VD, embed.tables[0].weight[...])
        return
    assert [t.weight.shape for t in embed.tables] == [(10, 8), (8, 4), (12, 2)]
    for i, (start, end) in enumerate(pairwise(EDGES)):
        expected = np.asarray(embed.tables[i].weight[...]) @ np.asarray(embed.projections[i].weight[...])
        np.testing.assert_allclose(vectors_VD[start:end], expected, rtol=1e-5, atol=1e-6)
