"""Adversarial training on embeddings: FGM, PGD, FreeLB."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxgpt.batch import Batch
from jaxgpt.config import FGM, PGD, FreeLB
from jaxgpt.layers.perturb import perturbing
from jaxgpt.objectives.measures.base import Wrap
from jaxgpt.objectives.sums import Objective, Sums
from jaxgpt.text.vocabulary import Vocabulary


def fgm(config: FGM, vocabulary: Vocabulary) -> Wrap:
    """(plain + weight adversarial) / (1 + weight), the embeddings of each row moved by epsilon g / |g| along
    the gradient g of its loss by them. The move is a constant to the gradient; `nll` is the plain one.
    """

    def moves(climb: Climb) -> list[jax.Array]:
        return [climb(None, config.epsilon, config.epsilon)]

    return _adversarial(moves, config.weight)


def pgd(config: PGD, vocabulary: Vocabulary) -> Wrap:
    """As `fgm`, of the last of several smaller moves, each brought back to a length of epsilon at most."""

    def moves(climb: Climb) -> list[jax.Array]:
        move = None
        for _ in range(config.steps):
            move = climb(move, config.step_size, config.epsilon)
        assert move is not None
        return [move]

    return _adversarial(moves, config.weight)


def freelb(config: FreeLB, vocabulary: Vocabulary) -> Wrap:
    """The mean of the losses along the way of `pgd`'s moves, the plain one being the first of them (Zhu et
    al. 2020, algorithm 1, begun without noise).
    """

    def moves(climb: Climb) -> list[jax.Array]:
        made = [climb(None, config.step_size, config.epsilon)]
        for _ in range(config.steps - 2):
            made.append(climb(made[-1], config.step_size, config.epsilon))
        return made

    return _adversarial(moves, float(config.steps - 1))


Climb = Callable[[jax.Array | None, float, float], jax.Array]
"""Of (move so far or none, length of a step, most length) to the next move [B, T, D]."""


def _adversarial(moves: Callable[[Climb], list[jax.Array]], weight: float) -> Wrap:
    """(plain + weight times the mean of the losses at the moves) / (1 + weight)."""

    def wrap(objective: Objective) -> Objective:
        def adversarial(model: Any, batch: Batch, key: jax.Array | None) -> Sums:
            plain = objective(model, batch, key)
            if key is None:
                return plain
            losses = []
            for move_BTD in moves(_climber(objective, model, batch, key)):
                with perturbing(_adding(move_BTD)):
                    losses.append(objective(model, batch, key).loss)
            return plain._replace(loss=(plain.loss + weight * sum(losses) / len(losses)) / (1 + weight))

        return adversarial

    return wrap


def _adding(move_BTD: jax.Array) -> Callable[[jax.Array], jax.Array]:
    return lambda x_BTD: x_BTD + move_BTD.astype(x_BTD.dtype)


def _climber(objective: Objective, model: Any, batch: Batch, key: jax.Array) -> Climb:
    """Steps of the embeddings that raise each row's loss most, to first order."""
    graph, state = nnx.split(model)
    still = nnx.merge(
        graph, jax.lax.stop_gradient(state)
    )  # second derivatives are neither needed nor paid for

    def loss(move_BTD: jax.Array) -> jax.Array:
        with perturbing(_adding(move_BTD)):
            return objective(still, batch, key).loss

    def climb(move: jax.Array | None, step: float, most: float) -> jax.Array:
        before = jnp.zeros(_shape(objective, still, batch, key)) if move is None else move
        slope_BTD = jax.lax.stop_gradient(jax.grad(loss)(before))
        move_BTD = before + step * slope_BTD / jnp.maximum(_length(slope_BTD), 1e-12)
        return move_BTD * jnp.minimum(1, most / jnp.maximum(_length(move_BTD), 1e-12))

    return climb


def _length(x_BTD: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(jnp.square(x_BTD), (1, 2), keepdims=True))


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
