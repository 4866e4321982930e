"""The MLP against its formulas in numpy."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from same import assert_same, normal
from tiny import HERE

from jaxgpt.config import GPT, Compute
from jaxgpt.layers.mlp import MLP, gelu

FLOAT32 = Compute(dtype="float32", attention="xla")


def plain_gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def plain_silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


@pytest.mark.parametrize(
    "model",
    [
        GPT(vocab_size=8, width=12, heads=2, bias=True),
        GPT(vocab_size=8, width=12, heads=2, mlp="swiglu", mlp_width=20, bias=False),
        GPT(vocab_size=8, width=12, heads=2, mlp="swiglu", bias=True),
    ],
    ids=["gelu", "swiglu", "swiglu with biases"],
)
def test_the_mlp_is_its_formula(model: GPT) -> None:
    random = np.random.default_rng(0)
    graphdef, state = nnx.split(MLP(jax.random.key(0), model, FLOAT32, HERE))
    mlp = nnx.merge(graphdef, jax.tree.map(lambda p: jnp.float32(random.standard_normal(p.shape)), state))
    x = random.standard_normal((2, 3, 12))

    def through(part: nnx.Module, x: np.ndarray) -> np.ndarray:
        y = x @ np.asarray(part.weight[...], np.float64)
        return y if part.bias is None else y + np.asarray(part.bias[...])

    inner = through(mlp.up, x)
    assert inner.shape[-1] == model.hidden
    inner = plain_gelu(inner) if model.mlp == "gelu" else plain_silu(through(mlp.gate, x)) * inner
    y = jax.jit(lambda x: mlp(x))(jnp.float32(x))
    np.testing.assert_allclose(y, through(mlp.down, inner), rtol=1e-4, atol=1e-4)


def test_gelu_is_near_the_exact_one() -> None:
    """x times the normal distribution function, which the tanh form approximates."""
    x = np.linspace(-6, 6, 101)
    exact = [v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x]
    np.testing.assert_allclose(gelu(jnp.float32(x)), exact, atol=5e-4)


def test_output_projections_start_smaller_in_deeper_models() -> None:
    """GPT-2, section 2.3: by a factor of the square root of twice the number of layers."""
    sizes = []
    for layers in (1, 16):
        model = GPT(vocab_size=8, width=64, heads=2, layers=layers)
        mlp = MLP(jax.random.key(0), model, FLOAT32, HERE)
        np.testing.assert_allclose(mlp.up.weight[...].std(), 0.02, rtol=0.05)
        sizes.append(float(mlp.down.weight[...].std()))
    np.testing.assert_allclose(sizes, [0.02 / math.sqrt(2), 0.02 / math.sqrt(32)], rtol=0.05)


def test_gelu_is_the_tanh_form() -> None:
    x = jnp.concatenate([jnp.linspace(-30, 30, 401), normal(0, 100)])
    assert_same(gelu, lambda x: jax.nn.gelu(x, approximate=True), x)
