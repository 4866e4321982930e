"""Norms against numpy in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import HERE

from jaxgpt.layers.norm import Norm

WIDTH = 12


def make(kind: str, eps: float = 1e-5, *, bias: bool) -> Norm:
    """A norm with a random scale, and a random bias if it has one."""
    norm, random = Norm(WIDTH, kind, eps, HERE, bias=bias), np.random.default_rng(0)
    graphdef, state = nnx.split(norm)
    state = jax.tree.map(lambda leaf: jnp.float32(random.standard_normal(leaf.shape)), state)
    return nnx.merge(graphdef, state)


def plain(norm: Norm, x: np.ndarray) -> np.ndarray:
    """The definitions of the papers, over the last axis."""
    x = x.astype(np.float64)
    if norm.kind == "layernorm":
        y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + norm.eps)
    else:
        y = x / np.sqrt((x**2).mean(-1, keepdims=True) + norm.eps)
    y = y * np.asarray(norm.scale[...])
    return y if norm.bias is None else y + np.asarray(norm.bias[...])


@pytest.mark.parametrize("eps", [1e-5, 0.5])
@pytest.mark.parametrize(("kind", "bias"), [("layernorm", True), ("layernorm", False), ("rmsnorm", False)])
def test_a_norm_equals_the_definition_of_its_paper(kind: str, bias: bool, eps: float) -> None:
    norm, x = make(kind, eps, bias=bias), 3 + 2 * np.random.default_rng(1).standard_normal((2, 5, WIDTH))
    y = jax.jit(lambda x: norm(x))(jnp.float32(x))
    np.testing.assert_allclose(y, plain(norm, x), rtol=1e-4, atol=1e-4)


def test_a_new_norm_scales_by_one_and_rmsnorm_has_no_bias() -> None:
    x = jnp.float32(np.random.default_rng(1).standard_normal((7, WIDTH)))
    layernorm, rmsnorm = (
        Norm(WIDTH, "layernorm", 1e-6, HERE, bias=True),
        Norm(WIDTH, "rmsnorm", 1e-6, HERE, bias=True),
    )
    assert rmsnorm.bias is None
    y = np.asarray(layernorm(x))
    np.testing.assert_allclose([y.mean(-1), y.var(-1)], np.stack([np.zeros(7), np.ones(7)]), atol=1e-4)
    np.testing.assert_allclose(jnp.square(rmsnorm(x)).mean(-1), np.ones(7), rtol=1e-4)


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_half_precision_is_normalised_in_float32(kind: str) -> None:
    """Near 300, bfloat16 values are 2 apart: a mean computed in bfloat16 would be far off."""
    norm = make(kind, bias=kind == "layernorm")
    x = jnp.asarray(300 + 2 * np.random.default_rng(2).integers(-3, 4, (4, WIDTH)), jnp.bfloat16)
    y = norm(x)
    assert y.dtype == jnp.bfloat16
    expected = plain(norm, np.asarray(x, np.float64))
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=2**-7, atol=1e-2)
