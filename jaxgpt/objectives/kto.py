"""Completions that are good or bad each by itself: KTO.

Shapes: B rows, P places for pairs of documents in a row.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxgpt.batch import Batch
from jaxgpt.config import KTO
from jaxgpt.data.readers.pairs import CHOSEN, OTHER, REJECTED
from jaxgpt.objectives.preferences import Side, read_sides, settle
from jaxgpt.objectives.sums import Mean, Metrics, Objective, Sums, TwoPass
from jaxgpt.text.vocabulary import Vocabulary


def kto(config: KTO, vocabulary: Vocabulary) -> TwoPass:
    """1 - sigmoid(beta (r - z)) of good and 1 - sigmoid(beta (z - r)) of bad completions.

    r is the log-ratio to the reference, and z, at least 0, the mean log-ratio of the step's other
    completions: an estimate of the divergence from the reference (Ethayarajh et al. 2024, section 4.1).
    Metrics beside those of every objective: per good or bad completion `reward_chosen` and `length_chosen`,
    `reward_rejected` and `length_rejected`, and z as `kl`. `correct` counts those on the right side of z.
    """

    def statistics(model: Any, batch: Batch) -> Metrics:
        (other,), _ = read_sides(model, batch, None, (OTHER,), True)
        return {"ratio": jnp.sum(other.ratio), "count": jnp.sum(other.tokens > 0).astype(jnp.float32)}

    def given(sums: Metrics) -> Objective:
        z = jnp.maximum(sums["ratio"] / jnp.maximum(sums["count"], 1), 0)

        def objective(model: Any, batch: Batch, key: jax.Array | None) -> Sums:
            sides, features = read_sides(model, batch, key, (CHOSEN, REJECTED), True)
            weights, names = (config.good_weight, config.bad_weight), ("chosen", "rejected")
            loss = correct = weight = jnp.zeros(())
            metrics: Metrics = {}
            for side, sign, scale, name in zip(sides, (1, -1), weights, names, strict=True):
                real_BP = side.tokens > 0
                count, beyond_BP = jnp.sum(real_BP).astype(jnp.float32), sign * (side.ratio - z)
                loss += scale * _total(1 - jax.nn.sigmoid(config.beta * beyond_BP), side)
                correct += _total((1 + jnp.sign(beyond_BP)) / 2, side)
                weight += count
                metrics[f"reward_{name}"] = Mean(_total(config.beta * side.ratio, side), count)
                metrics[f"length_{name}"] = Mean(jnp.sum(side.tokens), count)
            metrics["kl"] = z * weight
            return settle(loss, weight, correct, metrics, features)

        return objective

    return TwoPass(statistics, given)


def _total(value_BP: jax.Array, side: Side) -> jax.Array:
    return jnp.sum(jnp.where(side.tokens > 0, value_BP, 0))
