"""The sums that every objective returns, and their computation from a model's predictions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxgpt.batch import Batch, Features

Metrics = dict[str, jax.Array]


class Sums(NamedTuple):
    """The result of an objective on a batch.

    Attributes:
      loss: sum in nats, which is minimised.
      weight: total weight of the targets.
      metrics: sums `nll` (nats without z-loss and load balancing), `correct` (correct top-1 predictions, where
        there are right ones), `bytes` (UTF-8 bytes of the targets where that makes sense; else 0), and
        `Features.stats` times the weight.
      memory: of a recurrent model, for the next batch.
      largest: metrics of which a step has the largest over its microbatches, not the sum.
    """

    loss: jax.Array
    weight: jax.Array
    metrics: Metrics
    memory: Any = None
    largest: Metrics | None = None


Objective = Callable[[Any, Batch, jax.Array | None], Sums]
"""A function of (model, batch, key); the key turns dropout on, and is None in evaluation."""


def score(model: Any, features: Features, batch: Batch, z_loss: float = 0.0) -> Sums:
    """Cross-entropy of the batch's targets under the model's predictions, plus the load-balancing loss."""
    loss, nll, correct = model.losses(features.x_BTD, batch.targets_BT, batch.weights_BT, z_loss)
    weight = jnp.sum(batch.weights_BT)
    stats = {name: value * weight for name, value in (features.stats or {}).items()}
    metrics = {"nll": nll, "correct": correct, "bytes": jnp.zeros(()), **stats}
    return Sums(loss + features.balance * weight, weight, metrics, features.memory)
