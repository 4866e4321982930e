"""Penalties on the distance to the parameters that a run starts from: L2-SP and EWC."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jaxgpt.config import EWC, L2SP
from jaxgpt.objectives.measures.base import Update


class Anchor(NamedTuple):
    """The state of a penalty, kept and saved with the optimizer's: one or two more copies of what is trained.

    Attributes:
      start: the parameters at the start.
      importance: of each parameter, 0 until `train.fisher` has measured it; empty where all count alike.
    """

    start: Any
    importance: Any = ()


def l2sp(config: L2SP, model: nnx.State) -> Update:
    """The gradient of weight / 2 |p - p_0|^2 joins that of the loss, before it is clipped.

    The loss that is logged is without the penalty, as with weight decay.
    """
    headed = any(path[0] == "backbone" for path, _ in nnx.to_flat_state(model))

    def slopes(anchor: Anchor, params: Any) -> Any:
        def one(path: Any, p: jax.Array, start: jax.Array) -> jax.Array:
            kept = not headed or path[0].key == "backbone"
            return config.weight * (p - start) if kept else jnp.zeros_like(p)

        return jax.tree.map_with_path(one, params, anchor.start)

    return _penalty(slopes, lambda params: Anchor(jax.tree.map(jnp.copy, params)))


def ewc(config: EWC, model: nnx.State) -> Update:
    """The gradient of weight / 2 sum_i F_i (p_i - p_i0)^2 joins that of the loss; F is set at the start."""

    def slopes(anchor: Anchor, params: Any) -> Any:
        return jax.tree.map(
            lambda p, start, f: config.weight * f * (p - start), params, anchor.start, anchor.importance
        )

    return _penalty(
        slopes,
        lambda params: Anchor(jax.tree.map(jnp.copy, params), jax.tree.map(jnp.zeros_like, params)),
    )


def _penalty(slopes: Any, begin: Any) -> Update:
    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return jax.tree.map(jnp.add, updates, slopes(state, params)), state

    added = optax.GradientTransformation(begin, update)
    return lambda optimizer: optax.chain(added, optimizer)


def with_importance(opt: Any, importance: Any) -> Any:
    """An optimizer's state whose `Anchor` has this importance of the parameters."""
    return jax.tree.map(
        lambda leaf: leaf._replace(importance=importance) if _measured(leaf) else leaf, opt, is_leaf=_measured
    )


def _measured(leaf: Any) -> bool:
    return isinstance(leaf, Anchor) and leaf.importance != ()
