"""Augmentation of what is given: tokens left out or exchanged, never those of an answer.

Shapes: B rows, T tokens per row.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.batch import Batch
from jaxgpt.config import TokenDropout, TokenSwaps
from jaxgpt.objectives.measures.base import Change
from jaxgpt.text.vocabulary import Vocabulary


def free(batch: Batch, vocabulary: Vocabulary) -> jax.Array:
    """Which tokens may be changed [B, T]: those that are given, neither learned nor of a control token.

    A token is learned where it is the target of the place before it. Of plain text all are, so none may be.
    """
    learned_BT = jnp.pad(batch.weights_BT[:, :-1] > 0, ((0, 0), (1, 0)))
    next_BT = jnp.pad(batch.targets_BT[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    learned_BT &= next_BT == batch.tokens_BT  # a label's id is no token
    written_BT = jnp.asarray(vocabulary.bytes_V)[batch.tokens_BT] > 0  # control tokens stand for no bytes
    return (batch.segments_BT > 0) & ~learned_BT & written_BT


def token_dropout(config: TokenDropout, vocabulary: Vocabulary) -> Change:
    """Gives tokens another, random id; ids of control tokens are not drawn."""
    plain = jnp.asarray(np.flatnonzero(vocabulary.bytes_V), jnp.int32)

    def change(batch: Batch, key: jax.Array) -> Batch:
        keys = jax.random.split(key)
        hit_BT = free(batch, vocabulary) & (jax.random.uniform(keys[0], batch.tokens_BT.shape) < config.rate)
        other_BT = plain[jax.random.randint(keys[1], batch.tokens_BT.shape, 0, len(plain))]
        return replace(batch, tokens_BT=jnp.where(hit_BT, other_BT, batch.tokens_BT))

    return change


def token_swaps(config: TokenSwaps, vocabulary: Vocabulary) -> Change:
    """Exchanges neighbours of one document, both of which may be changed; no token is in two exchanges."""

    def change(batch: Batch, key: jax.Array) -> Batch:
        may_BT = free(batch, vocabulary)
        together_BT = batch.segments_BT == jnp.roll(batch.segments_BT, -1, 1)
        pair_BT = may_BT & jnp.roll(may_BT, -1, 1) & together_BT
        pair_BT &= jax.random.uniform(key, pair_BT.shape) < config.rate
        # Every other place begins a pair; which ones changes from step to step.
        first = jax.random.randint(jax.random.fold_in(key, 1), (), 0, 2)
        place_T = jnp.arange(pair_BT.shape[1])
        pair_BT &= (place_T % 2 == first) & (place_T < len(place_T) - 1)
        after_BT, before_BT = jnp.roll(batch.tokens_BT, -1, 1), jnp.roll(batch.tokens_BT, 1, 1)
        tokens_BT = jnp.where(pair_BT, after_BT, batch.tokens_BT)
        return replace(batch, tokens_BT=jnp.where(jnp.roll(pair_BT, 1, 1), before_BT, tokens_BT))

    return change
