"""Adding a branch to the residual stream: an adapter changes only the branch; its absence, nothing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from same import normal
from tiny import HERE

from jaxgpt.layers.residual import dropout, residual


def test_an_adapter_changes_the_branch_and_its_absence_leaves_the_program() -> None:
    x, y = normal(0, 2, 3, 4), normal(1, 2, 3, 4)
    np.testing.assert_array_equal(residual(x, y, HERE, lambda y: 2 * y), x + 2 * y)
    plain = jax.make_jaxpr(lambda x, y: residual(x, y, HERE))(x, y)
    assert str(plain) == str(jax.make_jaxpr(lambda x, y: HERE.pin(x + y))(x, y))


def test_dropout_keeps_the_mean_and_needs_a_key() -> None:
    x = jnp.ones((200, 200))
    assert dropout(x, 0.25, None) is x
    kept = dropout(x, 0.25, jax.random.key(0))
    assert set(np.unique(kept)) == {np.float32(0), np.float32(4 / 3)}
    np.testing.assert_allclose(kept.mean(), 1, atol=0.02)
