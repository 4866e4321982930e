"""R-Drop: two passes with different dropout shall predict alike."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxgpt.batch import Batch
from jaxgpt.config import RDrop
from jaxgpt.objectives.measures.base import Wrap
from jaxgpt.objectives.measures.watched import Watched
from jaxgpt.objectives.sums import Objective, Sums
from jaxgpt.text.vocabulary import Vocabulary


def rdrop(config: RDrop, vocabulary: Vocabulary) -> Wrap:
    """The mean of two losses, plus weight / 2 times the sum of both KL divergences at the targets (Liang et
    al. 2021, equations 2 to 4, over two). The logged `nll` is that of the first pass.
    """

    def wrap(objective: Objective) -> Objective:
        def twice(model: Any, batch: Batch, key: jax.Array | None) -> Sums:
            if key is None:
                return objective(model, batch, key)
            first, second = Watched(model), Watched(model)
            sums = objective(first, batch, jax.random.fold_in(key, 2002))
            again = objective(second, batch, jax.random.fold_in(key, 2003))
            pair = first.features.x_BTD, second.features.x_BTD
            apart = divergence(model, *pair, batch.weights_BT)
            return sums._replace(loss=(sums.loss + again.loss) / 2 + config.weight * apart / 2)

        return twice

    return wrap


def divergence(model: Any, a_BTD: jax.Array, b_BTD: jax.Array, weights_BT: jax.Array) -> jax.Array:
    """The weighted sum over targets of both KL divergences between predictions from two features.

    A few positions at a time, recomputed in the backward pass, so that their logits alone are held.
    """

    @jax.checkpoint
    def one(part: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        a_BD, b_BD, weight_B = part
        p_BV, q_BV = (jax.nn.log_softmax(model.logits(x), -1) for x in (a_BD, b_BD))
        return jnp.sum(weight_B * jnp.sum((jnp.exp(p_BV) - jnp.exp(q_BV)) * (p_BV - q_BV), -1))

    columns = a_BTD.swapaxes(0, 1), b_BTD.swapaxes(0, 1), weights_BT.T
    chunk = max(1, model.compute.loss_chunk // a_BTD.shape[0])
    return jnp.sum(jax.lax.map(one, columns, batch_size=min(chunk, a_BTD.shape[1])))
