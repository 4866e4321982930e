"""Averaged parameters: the model is the average, and what is trained is the optimizer's."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jaxgpt.config import EMA
from jaxgpt.objectives.measures.base import Averaged, Update


def ema(config: EMA, model: nnx.State) -> Update:
    """The model's parameters become d model + (1 - d) live, with d = min(decay, (1 + n) / (10 + n))."""

    def wrap(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
        def init(params: Any) -> Averaged:
            return Averaged(optimizer.init(params), jax.tree.map(jnp.copy, params), jnp.zeros((), jnp.int32))

        def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
            updates, inner = optimizer.update(updates, state.inner, state.live)
            live = optax.apply_updates(state.live, updates)
            count = state.count.astype(jnp.float32)
            share = 1 - jnp.minimum(config.decay, (1 + count) / (10 + count))
            moved = jax.tree.map(lambda new, mean: (share * (new - mean)).astype(mean.dtype), live, params)
            return moved, Averaged(inner, live, state.count + 1)

        return optax.GradientTransformation(init, update)

    return wrap
