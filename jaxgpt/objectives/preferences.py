"""Objectives over pairs of completions: DPO, IPO, SimPO, ORPO, and Bradley-Terry of a reward model.

Both documents of a pair lie in one row, one after the other (data/readers/pairs.py). The loss is a sum over
pairs and the weight their number.

Shapes: B rows, T tokens per row, P places for pairs in a row (T / 2, since a document has a token at least).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxgpt.batch import Batch, Features
from jaxgpt.config import DPO, IPO, ORPO, BradleyTerry, SimPO
from jaxgpt.data.readers.pairs import CHOSEN, REJECTED
from jaxgpt.objectives.sums import Metrics, Objective, Sums
from jaxgpt.text.vocabulary import Vocabulary


class Side(NamedTuple):
    """One side of every pair, [B, P] each.

    Attributes:
      logprob: log-probability of its completion.
      ratio: that less the reference's, or 0 without one.
      tokens: of its completion; 0 where there is no such document.
    """

    logprob: jax.Array
    ratio: jax.Array
    tokens: jax.Array


def document_sums(batch: Batch, value_BT: jax.Array, side: int) -> jax.Array:
    """The sum over the document of each pair that is this side [B, P], 0 where there is none.

    A masked reduction rather than a scatter, so that it is the same on every run of an accelerator.
    """
    pair_BT = (batch.segments_BT - 1) // 2
    value_BT = jnp.where(batch.extra["side"] == side, value_BT, 0)
    own_BPT = pair_BT[:, None, :] == jnp.arange(-(-value_BT.shape[1] // 2))[:, None]
    return jnp.sum(jnp.where(own_BPT, value_BT[:, None, :], 0), axis=-1)


def read_sides(
    model: Any, batch: Batch, key: jax.Array | None, sides: tuple[int, ...], reference: bool
) -> tuple[list[Side], Features]:
    """What the model says of the documents of these sides, and its features.

    Args:
      model: in traced code.
      batch: with the column `side`, and with a reference the column `reference`: its log-probability of each
        target.
      key: turns dropout on.
      sides: values of the column.
      reference: whether there is one.
    """
    features = model.hidden(batch, key)
    logprob_BT = model.target_logprobs(features.x_BTD, batch.targets_BT) * batch.weights_BT
    ratio_BT = (
        logprob_BT - batch.extra["reference"] * batch.weights_BT if reference else jnp.zeros_like(logprob_BT)
    )
    values = (logprob_BT, ratio_BT, batch.weights_BT)
    return [Side(*(document_sums(batch, value, side) for value in values)) for side in sides], features


class Judged(NamedTuple):
    """The loss of each pair and the rewards of its sides, [B, P] each."""

    loss: jax.Array
    chosen: jax.Array
    rejected: jax.Array


def pairwise(judge: Callable[[Side, Side], Judged], nll_weight: float, *, reference: bool) -> Objective:
    """The objective over pairs with this loss, a function of both sides whose values at empty places (no
    tokens, sums of 0) must be finite.

    Metrics beside `nll` (the loss without load balancing) and `correct` (the chosen side has the higher
    reward; of equal ones half): per pair `reward_chosen`, `reward_rejected`, `length_chosen`,
    `length_rejected` (trained tokens) and `chosen_nll` (nats per token of the chosen side, a mean per pair).
    """

    def objective(model: Any, batch: Batch, key: jax.Array | None) -> Sums:
        (chosen, rejected), features = read_sides(model, batch, key, (CHOSEN, REJECTED), reference)
        real_BP = chosen.tokens > 0

        def total(value_BP: jax.Array) -> jax.Array:
            return jnp.sum(jnp.where(real_BP, value_BP, 0))

        judged, nll_BP = judge(chosen, rejected), -chosen.logprob / jnp.maximum(chosen.tokens, 1)
        loss, weight = total(judged.loss + nll_weight * nll_BP), total(jnp.ones_like(nll_BP))
        metrics = {
            "reward_chosen": total(judged.chosen),
            "reward_rejected": total(judged.rejected),
            "length_chosen": total(chosen.tokens),
            "length_rejected": total(rejected.tokens),
            "chosen_nll": total(nll_BP),
        }
        correct = total((1 + jnp.sign(judged.chosen - judged.rejected)) / 2)
        return settle(loss, weight, correct, metrics, features)

    return objective


def settle(
    loss: jax.Array, weight: jax.Array, correct: jax.Array, metrics: Metrics, features: Features
) -> Sums:
    """The sums of an objective over preferences, with the model's load balancing and figures."""
    stats = {name: value * weight for name, value in (features.stats or {}).items()}
    metrics = {"nll": loss, "correct": correct, "bytes": jnp.zeros(())} | metrics | stats
    metrics = jax.lax.stop_gradient(metrics)
    return Sums(loss + features.balance * weight, weight, metrics, features.memory)


def _mean(side: Side) -> jax.Array:
    """Mean log-probability of the tokens; of empty places -1, where every loss is finite."""
    return jnp.where(side.tokens > 0, side.logprob / jnp.maximum(side.tokens, 1), -1.0)


def dpo(config: DPO, vocabulary: Vocabulary) -> Objective:
    """-log sigmoid(beta (r_chosen - r_rejected)), r the log-ratio to the reference (Rafailov et al. 2023)."""

    def judge(chosen: Side, rejected: Side) -> Judged:
        rewards = config.beta * chosen.ratio, config.beta * rejected.ratio
        margin, smoothing = rewards[0] - rewards[1], config.label_smoothing
        loss = -(1 - smoothing) * jax.nn.log_sigmoid(margin) - smoothing * jax.nn.log_sigmoid(-margin)
        return Judged(loss, *rewards)

    return pairwise(judge, config.nll_weight, reference=True)


def ipo(config: IPO, vocabulary: Vocabulary) -> Objective:
    """(r_chosen - r_rejected - 1 / (2 beta))^2, r the mean log-ratio of the tokens (Azar et al. 2023)."""

    def judge(chosen: Side, rejected: Side) -> Judged:
        ratios = [side.ratio / jnp.maximum(side.tokens, 1) for side in (chosen, rejected)]
        loss = (ratios[0] - ratios[1] - 1 / (2 * config.beta)) ** 2
        return Judged(loss, config.beta * ratios[0], config.beta * ratios[1])

    return pairwise(judge, config.nll_weight, reference=True)


def simpo(config: SimPO, vocabulary: Vocabulary) -> Objective:
    """-log sigmoid(beta (m_chosen - m_rejected) - margin), m the mean log-probability (Meng et al. 2024)."""

    def judge(chosen: Side, rejected: Side) -> Judged:
        rewards = config.beta * _mean(chosen), config.beta * _mean(rejected)
        return Judged(-jax.nn.log_sigmoid(rewards[0] - rewards[1] - config.margin), *rewards)

    return pairwise(judge, config.nll_weight, reference=False)


def orpo(config: ORPO, vocabulary: Vocabulary) -> Objective:
    """-beta log sigmoid(logit m_chosen - logit m_rejected), m the mean log-probability (Hong et al. 2024)."""

    def judge(chosen: Side, rejected: Side) -> Judged:
        odds = [m - jnp.log1p(-jnp.exp(jnp.minimum(m, -1e-6))) for m in map(_mean, (chosen, rejected))]
        loss = -config.beta * jax.nn.log_sigmoid(odds[0] - odds[1])
        return Judged(loss, config.beta * _mean(chosen), config.beta * _mean(rejected))

    return pairwise(judge, config.nll_weight, reference=False)


def bradley_terry(config: BradleyTerry, vocabulary: Vocabulary) -> Objective:
    """-log sigmoid(r_chosen - r_rejected), r a reward model's reward of the whole document."""

    def objective(model: Any, batch: Batch, key: jax.Array | None) -> Sums:
        features = model.hidden(batch, key)
        reward_BT = model.rewards(features.x_BTD, batch.segments_BT)
        chosen, rejected = (document_sums(batch, reward_BT, side) for side in (CHOSEN, REJECTED))
        lengths = [document_sums(batch, batch.weights_BT, side) for side in (CHOSEN, REJECTED)]
        real_BP = lengths[0] > 0

        def total(value_BP: jax.Array) -> jax.Array:
            return jnp.sum(jnp.where(real_BP, value_BP, 0))

        loss = total(config.center * (chosen + rejected) ** 2 - jax.nn.log_sigmoid(chosen - rejected))
        metrics = {
            "reward_chosen": total(chosen),
            "reward_rejected": total(rejected),
            "length_chosen": total(lengths[0]),
            "length_rejected": total(lengths[1]),
        }
        correct = total((1 + jnp.sign(chosen - rejected)) / 2)
        return settle(loss, total(jnp.ones_like(chosen)), correct, metrics, features)

    return objective
