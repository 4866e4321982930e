"""Adversarial training on embeddings: FGM."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxgpt.batch import Batch
from jaxgpt.config import FGM
from jaxgpt.layers.perturb import perturbing
from jaxgpt.objectives.measures.base import Wrap
from jaxgpt.objectives.sums import Objective, Sums
from jaxgpt.text.vocabulary import Vocabulary


def fgm(config: FGM, vocabulary: Vocabulary) -> Wrap:
    """(plain + weight adversarial) / (1 + weight), the embeddings of each row moved by epsilon g / |g| along
    the gradient g of its loss by them. The move is a constant to the gradient; `nll` is the plain one.
    """

    def wrap(objective: Objective) -> Objective:
        def adversarial(model: Any, batch: Batch, key: jax.Array | None) -> Sums:
            if key is None:
                return objective(model, batch, key)
            plain = objective(model, batch, key)
            move_BTD = _move(objective, model, batch, key, config.epsilon)
            with perturbing(lambda x_BTD: x_BTD + move_BTD.astype(x_BTD.dtype)):
                moved = objective(model, batch, key)
            loss = (plain.loss + config.weight * moved.loss) / (1 + config.weight)
            return plain._replace(loss=loss)

        return adversarial

    return wrap


def _move(objective: Objective, model: Any, batch: Batch, key: jax.Array, length: float) -> jax.Array:
    """The move of the embeddings [B, T, D] that raises each row's loss most, to first order."""
    graph, state = nnx.split(model)
    still = nnx.merge(
        graph, jax.lax.stop_gradient(state)
    )  # second derivatives are neither needed nor paid for

    def loss(move_BTD: jax.Array) -> jax.Array:
        with perturbing(lambda x_BTD: x_BTD + move_BTD.astype(x_BTD.dtype)):
            return objective(still, batch, key).loss

    slope_BTD = jax.lax.stop_gradient(jax.grad(loss)(jnp.zeros(_shape(objective, still, batch, key))))
    size_B = jnp.sqrt(jnp.sum(jnp.square(slope_BTD), (1, 2), keepdims=True))
    return length * slope_BTD / jnp.maximum(size_B, 1e-12)


def _shape(objective: Objective, model: Any, batch: Batch, key: jax.Array) -> tuple[int, ...]:
    """The shape of the embeddings, found without computing anything."""
    found: list[tuple[int, ...]] = []

    def note(x_BTD: jax.Array) -> jax.Array:
        found.append(x_BTD.shape)
        return x_BTD

    def run() -> jax.Array:
        with perturbing(note):
            return objective(model, batch, key).loss

    jax.eval_shape(run)
    return found[0]
