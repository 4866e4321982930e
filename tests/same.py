"""A hand-made gradient against the plain form that it replaces."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


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
