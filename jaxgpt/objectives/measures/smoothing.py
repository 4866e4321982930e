"""Label smoothing."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxgpt.batch import Batch
from jaxgpt.config import LabelSmoothing
from jaxgpt.objectives.measures.base import Wrap
from jaxgpt.objectives.measures.watched import Watched
from jaxgpt.objectives.sums import Objective, Sums
from jaxgpt.text.vocabulary import Vocabulary


def label_smoothing(config: LabelSmoothing, vocabulary: Vocabulary) -> Wrap:
    """With e the rate: (1 - e) (log z - hit) + e (log z - mean logit) = nll + e (hit - mean logit).

    Logits are linear in the features, so both terms are products with one vector per target: neither needs
    all logits.
    """

    def wrap(objective: Objective) -> Objective:
        def smoothed(model: Any, batch: Batch, key: jax.Array | None) -> Sums:
            watched = Watched(model)
            sums = objective(watched, batch, key)
            if key is None:
                return sums
            head, x_BTD = model.unembedding, model.transform(watched.features.x_BTD).astype(jnp.float32)
            w_VD = head.weight.astype(jnp.float32)
            away_BTD = w_VD[batch.targets_BT] - w_VD.mean(0)
            gap_BT = jnp.sum(x_BTD * away_BTD, -1)
            if head.bias is not None:
                gap_BT += head.bias[batch.targets_BT] - head.bias.mean()
            return sums._replace(loss=sums.loss + config.rate * jnp.sum(batch.weights_BT * gap_BT))

        return smoothed

    return wrap
