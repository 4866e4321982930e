"""What every objective makes of a batch: sums, and how they come from a model's predictions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxgpt.batch import Batch, Features

Metrics = dict[str, jax.Array]


class Sums(NamedTuple):
    """What an objective makes of a batch.

    Attributes:
      loss: in nats, what is minimised.
      weight: of the targets.
      metrics: sums `nll` (nats without z-loss and balancing), `correct` (targets that were the most
        likely), `bytes` (of UTF-8 that the targets stand for, where that means something; else 0),
        and `Features.stats` times the weight.
      memory: of a recurrent model, for the next batch.
    """

    loss: jax.Array
    weight: jax.Array
    metrics: Metrics
    memory: Any = None


Objective = Callable[[Any, Batch, jax.Array | None], Sums]
"""Of (model, batch, key); the key turns dropout on, and is None in evaluation."""


def score(model: Any, features: Features, batch: Batch, z_loss: float = 0.0) -> Sums:
    """Cross-entropy of the batch's targets under the model's predictions, and the balancing loss."""
    loss, nll, correct = model.losses(features.x_BTD, batch.targets_BT, batch.weights_BT, z_loss)
    weight = jnp.sum(batch.weights_BT)
    stats = {name: value * weight for name, value in (features.stats or {}).items()}
    metrics = {"nll": nll, "correct": correct, "bytes": jnp.zeros(()), **stats}
    return Sums(loss + features.balance * weight, weight, metrics, features.memory)
