"""Next-token prediction: pretraining, and with the batch's weights also instruction tuning."""

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

    With weights of 1 on all text this is pretraining; with weights only on the answers it is instruction
    tuning.
    """
    bytes_V = jnp.asarray(vocabulary.bytes_V, jnp.float32)

    def objective(model: Any, batch: Batch, key: jax.Array | None) -> Sums:
        sums = score(model, model.hidden(batch, key), batch, config.z_loss)
        # By ids, not by tokens: libtpu 0.0.50 cannot compile the look-up in a scan over microbatches on v5p.
        weight_V = jnp.zeros(bytes_V.shape).at[batch.targets_BT].add(batch.weights_BT, mode="drop")
        nbytes = jnp.dot(weight_V, bytes_V, precision=jax.lax.Precision.HIGHEST)
        return sums._replace(metrics=sums.metrics | {"bytes": nbytes})

    return objective
