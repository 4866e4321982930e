"""Masked language modelling: which tokens are masked, and what replaces them.

Shapes: B rows, T tokens per row, V ids, M ids that can be chosen.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.batch import Batch
from jaxgpt.config import MaskedLM
from jaxgpt.text.vocabulary import Vocabulary


def mask_tokens(config: MaskedLM, vocabulary: Vocabulary, batch: Batch, key: jax.Array) -> Batch:
    """Mask tokens of the batch, to be predicted at their own positions (Devlin et al. 2019, section 3.1).

    Each token, or with `whole_words` each word, is chosen with probability `rate`. A chosen token becomes
    the mask token with probability `mask`, a random token with probability `random`, and otherwise stays
    unchanged. Control tokens and padding are never chosen, and never inserted as random tokens.

    Returns:
      The batch with new `tokens_BT`, the old ones as `targets_BT`, and weight 1 on the chosen tokens only.
    """
    assert vocabulary.mask is not None, "the objective requires it"
    text_V = vocabulary.bytes_V > 0
    ids_M = jnp.asarray(np.flatnonzero(text_V))
    choose_key, how_key, random_key = jax.random.split(key, 3)
    tokens_BT = batch.tokens_BT
    eligible_BT = jnp.asarray(text_V)[tokens_BT] & (batch.segments_BT > 0)
    chance_BT = jax.random.uniform(choose_key, tokens_BT.shape)
    if config.whole_words:
        # A word's tokens share the random number drawn for the word's index in the row.
        begins_BT = jnp.asarray(vocabulary.starts_V)[tokens_BT] | ~eligible_BT
        begins_BT |= jnp.diff(batch.segments_BT, axis=1, prepend=0) != 0
        word_BT = jnp.cumsum(begins_BT, axis=1) - begins_BT[:, :1]
        chance_BT = jnp.take_along_axis(chance_BT, word_BT, axis=1)
    chosen_BT = eligible_BT & (chance_BT < config.rate)
    how_BT = jax.random.uniform(how_key, tokens_BT.shape)
    random_BT = ids_M[jax.random.randint(random_key, tokens_BT.shape, 0, len(ids_M))]
    new_BT = jnp.where(how_BT < config.mask + config.random, random_BT, tokens_BT)
    new_BT = jnp.where(how_BT < config.mask, vocabulary.mask, new_BT)
    return replace(
        batch,
        tokens_BT=jnp.where(chosen_BT, new_BT, tokens_BT),
        targets_BT=tokens_BT,
        weights_BT=chosen_BT.astype(jnp.float32),
    )
