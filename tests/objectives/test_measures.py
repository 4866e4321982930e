"""Measures by hand: what each does to a gradient, a loss or a batch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxgpt.config import EWC, L2SP, Full, LoRA
from jaxgpt.config.measures import Measure, check_measures
from jaxgpt.errors import UserError
from jaxgpt.objectives.measures import MEASURES, measured_optimizer
from jaxgpt.objectives.measures.penalty import with_importance

TWO = nnx.State({"a": nnx.Param(jnp.zeros(()), axes=()), "b": nnx.Param(jnp.zeros(()), axes=())})
"""A model of two parameters."""


def test_every_measure_has_a_hook() -> None:
    assert set(MEASURES) == set(Measure.__args__)  # type: ignore[attr-defined]
    for hooks in MEASURES.values():
        assert any((hooks.batch, hooks.objective, hooks.update))


def two(a: float, b: float) -> dict[str, Any]:
    return {"a": jnp.float32(a), "b": jnp.float32(b)}


def test_l2sp_and_ewc_of_two_parameters() -> None:
    """From (1, -2) at (3, 1) the penalty is w/2 sum_i F_i d_i^2 with d = (2, 3), and its slope w F_i d_i."""
    start, now, none = two(1, -2), two(3, 1), two(0, 0)
    plain = measured_optimizer([L2SP(weight=0.5)], optax.sgd(1.0), TWO)
    updates, _ = plain.update(none, plain.init(start), now)
    assert updates == {"a": -0.5 * 2, "b": -0.5 * 3}

    weighted = measured_optimizer([EWC(weight=10)], optax.sgd(1.0), TWO)
    state = weighted.init(start)
    assert weighted.update(none, state, now)[0] == none  # before anything has been measured
    state = with_importance(state, two(0.2, 0.01))
    updates, after = weighted.update(two(7, 0), state, now)
    np.testing.assert_allclose(
        [updates["a"], updates["b"]], [-(7 + 10 * 0.2 * 2), -(10 * 0.01 * 3)], rtol=1e-6
    )
    assert after[0].start == start  # they stay where they were


def test_l2sp_leaves_a_new_head_alone() -> None:
    model = nnx.State({"backbone": {"w": nnx.Param(jnp.zeros(()))}, "head": {"w": nnx.Param(jnp.zeros(()))}})
    params = {"backbone": {"w": jnp.float32(2)}, "head": {"w": jnp.float32(2)}}
    zeros = {"backbone": {"w": jnp.float32(0)}, "head": {"w": jnp.float32(0)}}
    pulled = measured_optimizer([L2SP(weight=1)], optax.sgd(1.0), model)
    updates, _ = pulled.update(zeros, pulled.init(zeros), params)
    assert updates == {"backbone": {"w": -2}, "head": {"w": 0}}


@pytest.mark.parametrize(
    ("measures", "init_from", "tune", "words"),
    [
        ((L2SP(), L2SP()), "runs/base", Full(), "L2SP twice"),
        ((EWC(),), "", Full(), "init_from is empty"),
        ((L2SP(),), "runs/base", LoRA(), "tune is LoRA"),
    ],
)
def test_measures_that_do_not_fit_are_refused(measures, init_from, tune, words) -> None:
    with pytest.raises(UserError, match=words):
        check_measures(SimpleNamespace(measures=measures, init_from=init_from, tune=tune))
