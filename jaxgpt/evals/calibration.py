"""Whether probabilities mean what they say: calibration errors, and one temperature that mends them.

Shapes: N predictions, C classes, K bins, B rows, T tokens per row, G temperatures.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxgpt.batch import Batch
from jaxgpt.config import Compute, Model
from jaxgpt.data.loader import validation_parts
from jaxgpt.data.readers import encode_split
from jaxgpt.errors import require
from jaxgpt.evals.loss import fetch_behind
from jaxgpt.evals.predict import BATCH, labelling, probabilities
from jaxgpt.evals.scoring import progress
from jaxgpt.evals.temperature import sharpened
from jaxgpt.models import abstract_model, assemble
from jaxgpt.sample.load import Trained
from jaxgpt.sharding import row_shards
from jaxgpt.target import Target

BINS = 15
"""Bins of a calibration error, as in Guo et al. 2017."""


class Bin(NamedTuple):
    """Predictions of similar confidence: how many, their mean confidence, and the share that is right."""

    count: int
    confidence: float
    accuracy: float


class Calibration(NamedTuple):
    """How far confidences are from shares of right answers.

    Attributes:
      ece: expected calibration error over bins of equal width (Guo et al. 2017, section 2).
      ece_mass: the same over bins of equally many predictions.
      brier: mean squared distance of the probabilities from what is right (Brier 1950), 0 to 2; None where
        only the likeliest class's probability is known.
      nll: mean negative log-probability of what is right, in nats; a probability that float32 cannot hold
        counts as the least that it can.
      accuracy, confidence: means.
      bins: of equal width, those without predictions left out.
    """

    ece: float
    ece_mass: float
    brier: float | None
    nll: float
    accuracy: float
    confidence: float
    bins: list[Bin]


def calibration(p_NC: np.ndarray, gold_N: np.ndarray, bins: int = BINS) -> Calibration:
    """The calibration of probabilities of classes.

    Args:
      p_NC: probabilities, each row summing to 1.
      gold_N: the right class of each; -1 where none of them is.
      bins: of the calibration errors.
    """
    count = len(gold_N)
    confidence_N, right_N = p_NC.max(1), p_NC.argmax(1) == gold_N
    width = _bins(confidence_N, right_N, np.minimum((confidence_N * bins).astype(int), bins - 1))
    order = np.argsort(confidence_N, kind="stable")
    place_N = np.empty(count, int)
    place_N[order] = np.arange(count) * bins // count
    mass = _bins(confidence_N, right_N, place_N)
    gold_NC = (np.arange(p_NC.shape[1]) == gold_N[:, None]).astype(float)
    right = np.where(gold_N >= 0, np.take_along_axis(p_NC, np.maximum(gold_N, 0)[:, None], 1)[:, 0], 0)
    nll = float(-np.log(np.maximum(right, np.finfo(np.float32).tiny)).mean())
    brier = float(((p_NC - gold_NC) ** 2).sum(1).mean())
    means = float(right_N.mean()), float(confidence_N.mean())
    return Calibration(error_of(width), error_of(mass), brier, nll, *means, width)


def _bins(confidence_N: np.ndarray, right_N: np.ndarray, place_N: np.ndarray) -> list[Bin]:
    made = []
    for place in np.unique(place_N):
        inside = place_N == place
        made.append(Bin(int(inside.sum()), float(confidence_N[inside].mean()), float(right_N[inside].mean())))
    return made


def error_of(bins: list[Bin]) -> float:
    """The expected calibration error of bins."""
    total = sum(b.count for b in bins)
    return sum(b.count * abs(b.confidence - b.accuracy) for b in bins) / total


# -------------------------------------------------------------------------------------- temperature


MOST = 64.0
"""The highest temperature that is fitted; the lowest is 1 by it."""


def fit_temperature(p_NC: np.ndarray, gold_N: np.ndarray) -> float:
    """The temperature with the least negative log-likelihood (Guo et al. 2017, section 4.2).

    It is concave in 1 / temperature, so that its slope, the mean logit under the model less that of
    what is right, is followed to 0 by bisection, between 1/64 and 64 (where it ends if every prediction is
    right, or if they are no better than chance).
    """
    known = gold_N >= 0
    p_NC, gold_N = p_NC[known], gold_N[known]
    require(
        len(gold_N) > 0,
        "no prediction has a right class to choose, so none fits; check the labels.",
    )
    logits_NC = np.log(np.maximum(p_NC, 1e-30))
    gold = np.take_along_axis(logits_NC, gold_N[:, None], 1).mean()
    if (p_NC.argmax(1) == gold_N).all():  # the slope is lost to rounding long before the end
        return 1 / MOST
    low, high = math.log(1 / MOST), math.log(MOST)
    for _ in range(60):
        middle = (low + high) / 2
        p = sharpened(p_NC, math.exp(-middle))
        if (p * logits_NC).sum(1).mean() < gold:
            low = middle
        else:
            high = middle
    return math.exp(-(low + high) / 2)


# ------------------------------------------------------------------------------- of trained models


def label_probabilities(
    trained: Trained, split: str, batch_size: int = BATCH
) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities [N, C] of the labels of a split, as the model gives them, and the right ones [N].

    Every tag of a tagger's sentences is one prediction, every text of a classifier's.
    """
    task, data = labelling(trained)
    _, items = encode_split(data, trained.tokenizer, trained.run.length, split, task)
    flat = [item for group in items for item in group]
    p_NC = np.concatenate(probabilities(trained, flat, batch_size, split))
    gold = [t for item in flat for t, w in zip(item.targets, item.weights, strict=True) if w > 0]
    return p_NC.astype(np.float64), np.asarray(gold)


def choice_probabilities(scores: list[tuple[float, ...]], gold: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities [N, C] among the choices of each question, by their log-likelihoods, and the right ones.

    Questions of fewer choices than the most have probability 0 for the others.
    """
    most = max(map(len, scores))
    logits = np.full((len(scores), most), -np.inf)
    for row, found in zip(logits, scores, strict=True):
        row[: len(found)] = found
    return sharpened(np.exp(logits - logits.max(1, keepdims=True)), 1.0), np.asarray(gold)


TEMPERATURES = np.exp(np.linspace(math.log(0.25), math.log(4), 61))
"""Tried at once for token probabilities."""


def token_calibration(
    trained: Trained, batch_size: int = 32, batches: int = 0
) -> tuple[Calibration, Calibration, float]:
    """The calibration of a language model's next-token probabilities on its validation data, before and after
    the best temperature, and that.

    The calibration error is of the likeliest token; bins of equal mass are of 200 fine ones.
    """
    run, mesh = trained.run, trained.mesh
    batch_size += -batch_size % row_shards(mesh)
    rows = validation_parts(run.data, trained.tokenizer, model_length=run.length, batch_size=batch_size)
    static = run.model, replace(run.compute, remat="none"), Target.of(mesh)
    grid = jnp.asarray(TEMPERATURES, jnp.float32)

    def running(temperatures: jax.Array) -> Any:
        parts = (itertools.islice(part, batches or None) for part in rows.values())
        some = progress(itertools.chain.from_iterable(parts), "calibration")
        return fetch_behind(_token_sums(*static, trained.params, batch, temperatures) for batch in some)

    with jax.set_mesh(mesh):
        nll_G = np.sum([np.asarray(nll) for nll, _, _ in running(grid)], axis=0)
        best = float(TEMPERATURES[int(np.argmin(nll_G))])
        both = jnp.asarray([1.0, best], jnp.float32)
        sums = [np.sum(parts, axis=0) for parts in zip(*running(both), strict=True)]
    nll, bins, weight = sums
    made = [_from_fine(bins[i], float(nll[i] / weight)) for i in range(2)]
    return made[0], made[1], best


FINE = 200
"""Bins that token confidences are counted in on the device."""


@partial(jax.jit, static_argnums=(0, 1, 2))
def _token_sums(
    model: Model, compute: Compute, target: Target, params: dict, batch: Batch, temperature_G: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """At each temperature the summed negative log-likelihood [G] and, of fine bins by confidence, the sums of
    weight, confidence and right predictions [G, FINE, 3]; and the summed weight.
    """
    module: Any = assemble(abstract_model(model, compute, target)[0], params)
    x_BTD = module.hidden(batch).x_BTD

    def row(part: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x_TD, targets_T, weights_T = part
        logits_TV = module.logits(x_TD)
        right_T = logits_TV.argmax(-1) == targets_T
        hit_T = jnp.take_along_axis(logits_TV, targets_T[:, None], -1)[:, 0]

        def at(temperature: jax.Array) -> tuple[jax.Array, jax.Array]:
            norm_T = jax.nn.logsumexp(logits_TV / temperature, axis=-1)
            confidence_T = jnp.exp(logits_TV.max(-1) / temperature - norm_T)
            nll = jnp.sum((norm_T - hit_T / temperature) * weights_T)
            place_T = jnp.minimum((confidence_T * FINE).astype(jnp.int32), FINE - 1)
            values_T3 = jnp.stack([weights_T, confidence_T * weights_T, right_T * weights_T], -1)
            return nll, jnp.zeros((FINE, 3)).at[place_T].add(values_T3)

        return jax.lax.map(at, temperature_G)

    nll_BG, bins_BG = jax.lax.map(row, (x_BTD, batch.targets_BT, batch.weights_BT))
    whole = nll_BG.sum(0), bins_BG.sum(0), batch.weights_BT.sum()
    return jax.lax.with_sharding_constraint(whole, P())


def _from_fine(fine: np.ndarray, nll: float) -> Calibration:
    """A calibration of counts and sums in fine bins."""
    count, confidence, right = (fine[:, i].astype(np.float64) for i in range(3))
    place = np.arange(FINE) * BINS // FINE
    order = np.minimum((np.cumsum(count) - count / 2) / max(count.sum(), 1) * BINS, BINS - 1).astype(int)

    def merged(places: np.ndarray) -> list[Bin]:
        sums = [np.bincount(places, values, BINS) for values in (count, confidence, right)]
        return [Bin(round(n), c / n, r / n) for n, c, r in zip(*sums, strict=True) if n > 0]

    total = count.sum()
    means = float(right.sum() / total), float(confidence.sum() / total)
    return Calibration(error_of(merged(place)), error_of(merged(order)), None, nll, *means, merged(place))
