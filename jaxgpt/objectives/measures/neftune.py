"""NEFTune: noise on embeddings."""

from __future__ import annotations

from typing import Any

import jax

from jaxgpt.batch import Batch
from jaxgpt.config import NEFTune
from jaxgpt.layers.perturb import perturbing
from jaxgpt.objectives.measures.base import Wrap
from jaxgpt.objectives.sums import Objective, Sums
from jaxgpt.text.vocabulary import Vocabulary


def neftune(config: NEFTune, vocabulary: Vocabulary) -> Wrap:
    """Noise within alpha / sqrt(T D) on every number of the embeddings [B, T, D], in training alone."""

    def wrap(objective: Objective) -> Objective:
        def noisy(model: Any, batch: Batch, key: jax.Array | None) -> Sums:
            if key is None:
                return objective(model, batch, key)
            own = jax.random.fold_in(key, 2001)

            def change(x_BTD: jax.Array) -> jax.Array:
                most = config.alpha / (x_BTD.shape[-2] * x_BTD.shape[-1]) ** 0.5
                return x_BTD + jax.random.uniform(own, x_BTD.shape, x_BTD.dtype, -most, most)

            with perturbing(change):
                return objective(model, batch, key)

        return noisy

    return wrap
