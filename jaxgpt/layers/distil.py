"""The loss of a student that learns from a teacher's whole distribution, in chunks like cross-entropy's.

Shapes: B rows, T tokens per row, D hidden size, E that of the teacher, V vocabulary.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxgpt.layers.unembedding import Unembedding, over_rows


class Mix(NamedTuple):
    """How the losses are mixed (static).

    Attributes:
      temperature: divides the logits of both (Hinton et al. 2015, section 2).
      hard_weight: share of the targets' own loss; the rest is the divergence's.
    """

    temperature: float
    hard_weight: float


class Distilled(NamedTuple):
    """Sums over targets: `loss` in nats; the targets' `nll`, the `divergence` from the teacher and `correct`
    top-1 predictions, which carry no gradient.
    """

    loss: jax.Array
    nll: jax.Array
    divergence: jax.Array
    correct: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def distil(
    head: Unembedding,
    x_BTD: Float[Array, "B T D"],
    targets_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"],
    teacher: Unembedding,
    y_BTE: Float[Array, "B T E"],
    mix: Mix,
    chunk: int,
) -> Distilled:
    """Weighted sums of hard_weight nll + (1 - hard_weight) temperature^2 KL(teacher || student).

    The square keeps the gradient's size at any temperature (Hinton et al. 2015, section 2). As in
    `cross_entropy` the gradients are made in the forward pass, so that no logits are computed twice.

    Args:
      head, x_BTD: the student's output projection and features.
      targets_BT: token ids.
      weights_BT: weight of each target; gets no gradient.
      teacher, y_BTE: the teacher's, which get none.
      mix: temperature and weights.
      chunk: maximum number of tokens per device whose logits are held at a time.
    """
    rows = (x_BTD, targets_BT, weights_BT, y_BTE)
    one = functools.partial(_scores, mix)
    return _sums(
        over_rows(lambda *given: one(*given)[0], chunk, head, *rows, beside=(teacher,)), weights_BT, mix
    )


def _scores(
    mix: Mix,
    head: Unembedding,
    teacher: Unembedding,
    x_BTD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    y_BTE: jax.Array,
) -> tuple[tuple[jax.Array, ...], tuple[Unembedding, jax.Array]]:
    """(nll, divergence, correct) of each target, and the loss's gradients by the head and by x."""
    logits_BTV, wanted_BTV = head(x_BTD), teacher(y_BTE)
    log_p_BTV = jax.nn.log_softmax(logits_BTV)
    log_soft_BTV = jax.nn.log_softmax(logits_BTV / mix.temperature)
    log_wanted_BTV = jax.nn.log_softmax(wanted_BTV / mix.temperature)
    soft_BTV, wanted_BTV = jnp.exp(log_soft_BTV), jnp.exp(log_wanted_BTV)
    divergence_BT = mix.temperature**2 * jnp.sum(wanted_BTV * (log_wanted_BTV - log_soft_BTV), -1)
    nll_BT = -jnp.take_along_axis(log_p_BTV, targets_BT[..., None], axis=-1)[..., 0]
    correct_BT = logits_BTV.argmax(-1) == targets_BT

    is_target_BTV = jnp.arange(logits_BTV.shape[-1]) == targets_BT[..., None]
    hard_BTV = jnp.exp(log_p_BTV) - is_target_BTV
    slope_BTV = mix.hard_weight * hard_BTV
    slope_BTV += (1 - mix.hard_weight) * mix.temperature * (soft_BTV - wanted_BTV)
    grads = head.back(x_BTD, logits_BTV, weights_BT[..., None] * slope_BTV)
    return (nll_BT, divergence_BT, correct_BT), grads


def _sums(scores: tuple[jax.Array, ...], weights_BT: jax.Array, mix: Mix) -> Distilled:
    nll, divergence, correct = (jnp.sum(weights_BT * score_BT) for score_BT in scores)
    loss = mix.hard_weight * nll + (1 - mix.hard_weight) * divergence
    return Distilled(loss, nll, divergence, correct)


def _distil(head, x_BTD, targets_BT, weights_BT, teacher, y_BTE, mix, chunk):  # noqa: ANN001, ANN202
    def one(*given: Any) -> Any:
        scores, (dhead, dx_BTD) = _scores(mix, *given)
        return dhead, (scores, dx_BTD)

    rows = (x_BTD, targets_BT, weights_BT, y_BTE)
    dhead, (scores, dx_BTD) = over_rows(one, chunk, head, *rows, beside=(teacher,), back=True)
    dhead = jax.tree.map(lambda grad, weight: grad.astype(weight.dtype), dhead, head)
    return _sums(scores, weights_BT, mix), (dhead, dx_BTD)


def _distil_back(mix, chunk, grads, cotangents):  # noqa: ANN001, ANN202
    return *jax.tree.map(lambda g: (g * cotangents.loss).astype(g.dtype), grads), None, None, None, None


distil.defvjp(_distil, _distil_back)
