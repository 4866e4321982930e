"""Prediction of masked tokens from both sides."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxgpt.batch import Batch
from jaxgpt.config import MaskedLM
from jaxgpt.errors import require
from jaxgpt.objectives.masking import mask_tokens
from jaxgpt.objectives.sums import Objective, Sums, score
from jaxgpt.text.vocabulary import Vocabulary


def masked_lm(config: MaskedLM, vocabulary: Vocabulary) -> Objective:
    """Cross-entropy of masked tokens (Devlin et al. 2019, section 3.1), chosen anew for every key.

    Without a key, as in evaluation, the choice depends only on the microbatch. So a model's validation loss
    is reproducible, and the losses of two models are comparable if their microbatches are equal.

    Raises:
      UserError: the tokenizer has no mask token.
    """
    require(
        vocabulary.mask is not None,
        "objective MaskedLM() needs a tokenizer with the control token '<|mask|>'; this one has none: "
        "train it again with `jaxgpt tokenizer train`.",
    )

    def objective(model: Any, batch: Batch, key: jax.Array | None) -> Sums:
        if key is None:
            mask_key = jax.random.fold_in(jax.random.key(0), jnp.sum(batch.tokens_BT))
        else:
            mask_key, key = jax.random.split(key)
        masked = mask_tokens(config, vocabulary, batch, mask_key)
        return score(model, model.hidden(masked, key), masked)

    return objective
