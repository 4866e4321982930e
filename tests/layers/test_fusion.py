"""The hand-made gradients equal the plain forms that they replace."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.layers.fusion import pin, transposed
from jaxgpt.layers.linear import contract, product
from jaxgpt.layers.mlp import gelu


def assert_same(f, g, *args, rtol: float = 1e-5, atol: float = 1e-5) -> None:
    """Values and the gradients of a random projection agree, compiled."""
    argnums = tuple(range(len(args)))
    weights = jax.random.normal(jax.random.key(9), jax.eval_shape(g, *args).shape)

    def both(h):
        return jax.jit(jax.value_and_grad(lambda *a: jnp.sum(weights * h(*a)), argnums))(*args)

    np.testing.assert_allclose(jax.jit(f)(*args), jax.jit(g)(*args), rtol, atol)
    for ours, plain in zip(jax.tree.leaves(both(f)), jax.tree.leaves(both(g)), strict=True):
        assert ours.dtype == plain.dtype
        np.testing.assert_allclose(ours, plain, rtol, atol)


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def test_gelu_is_the_tanh_form() -> None:
    x = jnp.concatenate([jnp.linspace(-30, 30, 401), normal(0, 100)])
    assert_same(gelu, lambda x: jax.nn.gelu(x, approximate=True), x)


@pytest.mark.parametrize(
    ("x_shape", "w_shape", "axes"), [((2, 5, 8), (8, 3, 4), 1), ((2, 5, 3, 4), (3, 4, 8), 2)]
)
def test_contract_is_tensordot(x_shape: tuple[int, ...], w_shape: tuple[int, ...], axes: int) -> None:
    x, w = normal(0, *x_shape), normal(1, *w_shape)
    assert_same(
        lambda x, w: contract(x, w, axes, jnp.dtype("float32")),
        lambda x, w: jnp.tensordot(x, w, axes),
        x,
        w,
    )


def test_bfloat16_product_rounds_its_factors_alone() -> None:
    """Result and gradients stay float32: only what is multiplied is rounded, once."""
    x, w, dy = normal(0, 64, 32), normal(1, 32, 16), normal(2, 64, 16)
    y, back = jax.vjp(lambda x, w: product(x, w, jnp.dtype("bfloat16")), x, w)
    x16, w16, dy16 = (a.astype(jnp.bfloat16).astype(jnp.float32) for a in (x, w, dy))
    for ours, plain in zip((y, *back(dy)), (x16 @ w16, dy16 @ w16.T, x16.T @ dy16), strict=True):
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-5)


def test_pin_and_transposed_change_no_value() -> None:
    tree = {"a": normal(0, 3, 4), "b": jnp.arange(3)}
    jax.tree.map(np.testing.assert_array_equal, jax.jit(pin)(tree), tree)
    np.testing.assert_array_equal(jax.jit(transposed)(tree["a"]), tree["a"].T)
