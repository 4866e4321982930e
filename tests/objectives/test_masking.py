"""Masked language modelling: rates, replacements, and tokens that must never be chosen.

Shapes: B rows, T tokens per row.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import FLOAT32

from jaxgpt.batch import Batch, Features
from jaxgpt.config import MaskedLM
from jaxgpt.errors import UserError
from jaxgpt.layers.unembedding import Unembedding
from jaxgpt.models.predictor import Predictor
from jaxgpt.objectives import masked_lm
from jaxgpt.objectives.masking import mask_tokens
from jaxgpt.text.vocabulary import Vocabulary

V, B, T, SPECIAL, MASK = 50, 64, 256, (0, 1), 49
# Ids 0, 1 and the mask token are not text; every third id begins a word.
WORDS = Vocabulary(np.where(np.isin(np.arange(V), (*SPECIAL, MASK)), 0, 1), np.arange(V) % 3 == 0, MASK)
PADDING = 16


def batch() -> Batch:
    tokens_BT = jnp.asarray(np.random.default_rng(0).integers(0, V - 1, (B, T)))
    segments_BT = jnp.ones((B, T), jnp.int32).at[:, -PADDING:].set(0)
    return Batch(tokens_BT, jnp.roll(tokens_BT, -1), jnp.ones((B, T)), segments_BT, segments_BT)


def masked(config: MaskedLM, seed: int = 0) -> tuple[np.ndarray, ...]:
    """(before, after, chosen, eligible), all [B, T]."""
    made = jax.jit(lambda key: mask_tokens(config, WORDS, batch(), key))(jax.random.key(seed))
    before = np.asarray(batch().tokens_BT)
    eligible = ~np.isin(before, SPECIAL) & (np.asarray(batch().segments_BT) > 0)
    np.testing.assert_array_equal(made.targets_BT, before)
    weights = np.asarray(made.weights_BT)
    assert set(np.unique(weights)) <= {0.0, 1.0}
    return before, np.asarray(made.tokens_BT), weights > 0, eligible


def within(count: int, total: int, rate: float) -> bool:
    return abs(count - total * rate) <= 3 * (total * rate * (1 - rate)) ** 0.5


def test_rates_of_choice_and_replacement_are_within_three_sigma() -> None:
    before, after, chosen, eligible = masked(MaskedLM())
    assert within(chosen.sum(), eligible.sum(), 0.15)
    count, texts = chosen.sum(), V - 3
    assert within((after[chosen] == MASK).sum(), count, 0.8)
    kept = (after == before)[chosen].sum()
    assert within(kept, count, 0.1 + 0.1 / texts)  # a random token may equal the original one
    assert within(count - (after[chosen] == MASK).sum() - kept, count, 0.1 * (1 - 1 / texts))


def test_other_tokens_stay_and_control_tokens_and_padding_are_never_chosen() -> None:
    before, after, chosen, eligible = masked(MaskedLM(rate=0.9))
    assert not chosen[~eligible].any()
    np.testing.assert_array_equal(after[~chosen], before[~chosen])
    replaced = after[chosen & (after != MASK)]
    assert not np.isin(replaced, SPECIAL).any()


def test_whole_words_are_chosen_with_all_their_tokens() -> None:
    before, _, chosen, eligible = masked(MaskedLM(whole_words=True))
    begins = WORDS.starts_V[before] | ~eligible
    inside = ~begins[:, 1:] & eligible[:, 1:] & eligible[:, :-1]
    np.testing.assert_array_equal(chosen[:, 1:][inside], chosen[:, :-1][inside])
    assert 0.12 < chosen[eligible].mean() < 0.18


def test_keys_choose_anew_and_the_same_key_the_same() -> None:
    first, again, other = (masked(MaskedLM(), seed)[2] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_only_chosen_tokens_carry_loss() -> None:
    """A model whose predictions depend only on the position: its loss is that of the chosen ones only."""

    class Model(Predictor):
        compute = FLOAT32
        unembedding = Unembedding(jnp.eye(V))

        def hidden(self, batch: Batch, key: jax.Array | None):
            return Features(jax.random.normal(jax.random.key(5), (B, T, V)))

    key = jax.random.key(3)
    sums = masked_lm(MaskedLM(), WORDS)(Model(), batch(), key)
    x_BTV = np.asarray(Model().hidden(batch(), None).x_BTD, np.float64)
    hit_BT = np.take_along_axis(x_BTV, np.asarray(batch().tokens_BT)[..., None], -1)[..., 0]
    nll_BT = np.log(np.exp(x_BTV).sum(-1)) - hit_BT
    made = mask_tokens(MaskedLM(), WORDS, batch(), jax.random.split(key)[0])
    chosen = np.asarray(made.weights_BT) > 0
    assert sums.loss == pytest.approx(nll_BT[chosen].sum(), rel=1e-4)
    assert sums.weight == chosen.sum()


def test_a_tokenizer_without_a_mask_token_is_rejected() -> None:
    with pytest.raises(UserError, match="needs a tokenizer with the control token"):
        masked_lm(MaskedLM(), replace(WORDS, mask=None))
