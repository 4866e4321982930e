"""The sums that every objective returns, and their computation from a model's predictions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxgpt.batch import Batch, Features


class Mean(NamedTuple):
    """A metric that is a mean over another weight than the objective's: two sums, of arrays or of floats."""

    total: Any
    weight: Any

    def mean(self) -> Any:
        """NaN where there is no weight."""
        if isinstance(self.weight, float):
            return self.total / self.weight if self.weight else math.nan
        return jnp.where(self.weight > 0, self.total / self.weight, jnp.nan)


class Largest(NamedTuple):
    """A metric of which a step has the largest over devices and microbatches, not the sum; at least 0."""

    value: Any

    def mean(self) -> Any:
        """The value."""
        return self.value


Metrics = dict[str, Any]
"""Sums by name, `Mean`s or `Largest`s."""


class Sums(NamedTuple):
    """The result of an objective on a batch.

    Attributes:
      loss: sum in nats, which is minimised.
      weight: total weight of the targets.
      metrics: sums `nll` (nats without z-loss and load balancing), `correct` (correct top-1 predictions, or
        what else is right; missing where nothing is), `bytes` (UTF-8 bytes of the targets where that makes
        sense; else 0), `Features.stats` times the weight, and figures of the objective's own, see `Metrics`.
      memory: of a recurrent model, for the next batch.
    """

    loss: jax.Array
    weight: jax.Array
    metrics: Metrics
    memory: Any = None


COUNTED = ("loss", "nll", "correct", "weight", "bytes")
"""The sums of every objective."""

Objective = Callable[[Any, Batch, jax.Array | None], Sums]
"""A function of (model, batch, key); the key turns dropout on, and is None in evaluation."""


@dataclass(frozen=True)
class TwoPass:
    """An objective whose loss depends on sums over the whole step, which are constants to its gradient.

    Called, it takes the batch for the whole step.

    Attributes:
      statistics: (model, batch) to the sums.
      given: from the totals over all devices and microbatches to the objective.
    """

    statistics: Callable[[Any, Batch], Metrics]
    given: Callable[[Metrics], Objective]

    def __call__(self, model: Any, batch: Batch, key: jax.Array | None) -> Sums:
        sums = jax.lax.stop_gradient(self.statistics(model, batch))
        return self.given(sums)(model, batch, key)


def before(objective: Objective, change: Callable[[Batch], Batch]) -> Objective:
    """The objective of changed batches."""
    if isinstance(objective, TwoPass):
        statistics, given = objective.statistics, objective.given
        return TwoPass(
            lambda model, batch: statistics(model, change(batch)), lambda sums: before(given(sums), change)
        )
    return lambda model, batch, key: objective(model, change(batch), key)


def add(total: Any, more: Any) -> Any:
    """Two trees of sums as one."""

    def one(a: Any, b: Any) -> Any:
        return Largest(jnp.maximum(a.value, b.value)) if isinstance(a, Largest) else jnp.add(a, b)

    return jax.tree.map(one, total, more, is_leaf=lambda x: isinstance(x, Largest))


def means(metrics: Metrics, weight: Any) -> Metrics:
    """The means of an objective's metrics: `accuracy`, where something is right, those of its own, and of
    preferences `margin`.

    Args:
      metrics: totals of `Sums.metrics`, of arrays or of floats.
      weight: total weight, above 0.
    """
    own = {name: value for name, value in metrics.items() if name not in COUNTED}
    found = {"accuracy": metrics["correct"] / weight} if "correct" in metrics else {}
    for name, value in own.items():
        found[name] = value.mean() if isinstance(value, Mean | Largest) else value / weight
    if "reward_chosen" in found and "reward_rejected" in found:
        found["margin"] = found["reward_chosen"] - found["reward_rejected"]
    return found


def score(model: Any, features: Features, batch: Batch, z_loss: float = 0.0) -> Sums:
    """Cross-entropy of the batch's targets under the model's predictions, plus the load-balancing loss."""
    loss, nll, correct = model.losses(features.x_BTD, batch.targets_BT, batch.weights_BT, z_loss)
    weight = jnp.sum(batch.weights_BT)
    stats = {name: value * weight for name, value in (features.stats or {}).items()}
    metrics = {"nll": nll, "correct": correct, "bytes": jnp.zeros(()), **stats}
    return Sums(loss + features.balance * weight, weight, metrics, features.memory)
