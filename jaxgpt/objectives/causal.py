"""Next-token prediction: pretraining, and by the batch's weights instruction tuning."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxgpt.batch import Batch
from jaxgpt.config import CausalLM
from jaxgpt.objectives.sums import Objective, Sums, score
from jaxgpt.text.vocabulary import Vocabulary


def causal_lm(config: CausalLM, vocabulary: Vocabulary) -> Objective:
    """Next-token cross-entropy, weighted by the batch's weights.

    With weights of 1 on all text it is pretraining; with weights on the answers alone it is the
    instruction objective.
    """
    bytes_V = jnp.asarray(vocabulary.bytes_V, jnp.float32)

    def objective(model: Any, batch: Batch, key: jax.Array | None) -> Sums:
        sums = score(model, model.hidden(batch, key), batch, config.z_loss)
        nbytes = jnp.sum(batch.weights_BT * jnp.take(bytes_V, batch.targets_BT, mode="clip"))
        return sums._replace(metrics=sums.metrics | {"bytes": nbytes})

    return objective
