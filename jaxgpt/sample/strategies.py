"""How the next token is chosen: what may come, temperature, truncation, penalties, seeds.

Shapes: B batch, V vocabulary, S slots per row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.errors import require
from jaxgpt.layers.truncation import upper_set
from jaxgpt.sample.settings import GREEDY_BELOW, Sampling

NO_ID = 2**31 - 1
"""Beyond any vocabulary: what is written there is dropped."""


class Features(NamedTuple):
    """What any row of a batch needs: static, so that a compiled program holds only this.

    The values themselves are traced (`Controls`): a new temperature compiles nothing, and a greedy
    batch pays for no noise and no search of a threshold.
    """

    random: bool
    top_k: bool
    top_p: bool
    penalty: bool
    drawn: bool = False
    """Log-probabilities are those of the distribution that tokens are drawn from, for training on them."""
    typical: bool = False
    ngram: int = 0
    """The longest n-gram that some row must not repeat; 0 where none must not."""
    counted: bool = False
    """Tokens that a row made before are penalized, by presence or by frequency."""
    biased: bool = False


class Controls(NamedTuple):
    """The settings of every row, as arrays."""

    temperature_B: jax.Array
    top_k_B: jax.Array
    top_p_B: jax.Array
    min_p_B: jax.Array
    penalty_B: jax.Array
    seed_B: jax.Array
    typical_B: jax.Array | None = None
    """With `Features.typical` alone."""
    ngram_B: jax.Array | None = None
    """With `Features.ngram` alone."""
    presence_B: jax.Array | None = None
    frequency_B: jax.Array | None = None
    """Both with `Features.counted` alone."""
    bias_ids_BN: jax.Array | None = None
    bias_BN: jax.Array | None = None
    """Ids, `NO_ID` where there is none, and what is added to their logits; with `Features.biased` alone."""


def features_of(rows: Sequence[Sampling], *, drawn: bool = False) -> Features:
    """The features that these rows need between them; `drawn` as in `Features`."""
    chance = [row for row in rows if not row.greedy]
    return Features(
        random=bool(chance),
        top_k=any(row.top_k > 0 for row in chance),
        top_p=any(row.top_p < 1 for row in chance),
        penalty=any(row.repetition_penalty != 1 for row in rows),
        drawn=drawn,
        typical=any(row.typical_p < 1 for row in chance),
        ngram=max(row.no_repeat_ngram for row in rows),
        counted=any(row.presence_penalty or row.frequency_penalty for row in rows),
        biased=any(row.logit_bias for row in rows),
    )


def controls_of(rows: Sequence[Sampling], seeds: Sequence[int]) -> Controls:
    """The settings of these rows as host arrays.

    Raises:
      UserError: a seed outside 0 ... 2^32 - 1.
    """
    for seed in seeds:
        require(0 <= seed < 2**32, f"seed is {seed}; it must be between 0 and {2**32 - 1}.")

    def column(name: str, dtype: type) -> Any:
        return host([getattr(row, name) for row in rows], dtype)

    features = features_of(rows)
    most = max(len(row.logit_bias) for row in rows)
    width = max(8, 1 << max(most - 1, 0).bit_length())
    bias_ids_BN, bias_BN = biases(rows, width) if features.biased else (None, None)
    return Controls(
        temperature_B=column("temperature", np.float32),
        top_k_B=host([min(row.top_k, 2**30) for row in rows], np.int32),
        top_p_B=column("top_p", np.float32),
        min_p_B=column("min_p", np.float32),
        penalty_B=column("repetition_penalty", np.float32),
        seed_B=host(seeds, np.uint32),
        typical_B=column("typical_p", np.float32) if features.typical else None,
        ngram_B=column("no_repeat_ngram", np.int32) if features.ngram else None,
        presence_B=column("presence_penalty", np.float32) if features.counted else None,
        frequency_B=column("frequency_penalty", np.float32) if features.counted else None,
        bias_ids_BN=bias_ids_BN,
        bias_BN=bias_BN,
    )


def biases(rows: Sequence[Sampling], width: int) -> tuple[Any, Any]:
    """Ids and biases of these rows as host arrays [B, width]."""
    ids_BN = np.full((len(rows), width), NO_ID, np.int32)
    bias_BN = np.zeros((len(rows), width), np.float32)
    for i, row in enumerate(rows):
        for n, pair in enumerate(row.logit_bias):
            ids_BN[i, n], bias_BN[i, n] = pair
    return ids_BN, bias_BN


def host(values: Any, dtype: type) -> Any:
    """An array on the host, where a caller that places it later needs no copy on a device."""
    return np.asarray(values, dtype)


class Chosen(NamedTuple):
    """The next token of every row.

    Attributes:
      ids_B: int32.
      logprobs_B: the log-probability that the model itself gives it: of the distribution before penalty,
        temperature and truncation, over all V. With `Features.drawn` that of the distribution drawn from.
      kept_B: with `Features.drawn` and truncation, how many tokens it leaves; else None.
      stuck_B: where something is not allowed, whether nothing is; the id then means nothing.
    """

    ids_B: jax.Array
    logprobs_B: jax.Array
    kept_B: jax.Array | None = None
    stuck_B: jax.Array | None = None


def choose(
    logits_BV: jax.Array,
    seen_BV: jax.Array | None,
    position_B: jax.Array,
    controls: Controls,
    features: Features,
    vocab: int | None = None,
    allowed_BV: jax.Array | None = None,
    counts_BV: jax.Array | None = None,
) -> Chosen:
    """The next token of every row, and its log-probability.

    Args:
      logits_BV: float32, of the model.
      seen_BV: True for tokens of the row so far; needed by the penalty alone.
      position_B: place the new token will have in its row. The noise is a function of the row's
        seed and this place and of nothing else.
      controls: settings of every row.
      features: which of them are on in any row (static).
      vocab: ids from here on are never chosen (rows that pad the embedding); static.
      allowed_BV: False where a token must not come; None allows all.
      counts_BV: how often each token was made (`count`); needed with `Features.counted` alone.
    """
    scores_BV = logits_BV
    if vocab is not None and vocab < logits_BV.shape[-1]:
        scores_BV = jnp.where(jnp.arange(logits_BV.shape[-1]) < vocab, scores_BV, -jnp.inf)
    if features.penalty:
        assert seen_BV is not None
        scores_BV = penalize(scores_BV, seen_BV, controls.penalty_B)
    if features.counted:
        assert counts_BV is not None
        scores_BV = discourage(scores_BV, counts_BV, controls)
    if features.biased:
        scores_BV = scores_BV + bias_of(controls, scores_BV.shape[-1])
    stuck_B = None
    if allowed_BV is not None:
        scores_BV = jnp.where(allowed_BV, scores_BV, -jnp.inf)
        stuck_B = jnp.max(scores_BV, axis=-1) == -jnp.inf
    ids_B, of_BV, kept_B = argmax(scores_BV), logits_BV, None
    if features.random:
        kept_BV = truncate(scores_BV, controls, features)
        noise_BV = noise(controls.seed_B, position_B, kept_BV.shape[-1])
        drawn_B = argmax(kept_BV + noise_BV)
        ids_B = jnp.where(controls.temperature_B < GREEDY_BELOW, ids_B, drawn_B)
        of_BV = kept_BV if features.drawn else logits_BV
        if features.drawn and (features.top_k or features.top_p):
            kept_B = jnp.sum(kept_BV > -jnp.inf, axis=-1, dtype=jnp.int32)
    taken_B = jnp.take_along_axis(of_BV, ids_B[:, None], axis=-1)[:, 0]
    return Chosen(ids_B, taken_B - jax.nn.logsumexp(of_BV, axis=-1), kept_B, stuck_B)


def argmax(x_BV: jax.Array) -> jax.Array:
    """The first index of the largest entry of each row, int32, from two plain reductions.

    `jnp.argmax` is a reduction of pairs, which XLA for CPUs runs in one thread together with all of
    the loop around it: half the speed of decoding GPT-2 124M (benchmarks/results).
    """
    V = x_BV.shape[-1]
    is_top_BV = x_BV >= jnp.max(x_BV, axis=-1, keepdims=True)
    return jnp.min(jnp.where(is_top_BV, jnp.arange(V, dtype=jnp.int32), V - 1), axis=-1)


def penalize(logits_BV: jax.Array, seen_BV: jax.Array, penalty_B: jax.Array) -> jax.Array:
    """Make seen tokens less likely by the factor `penalty_B` (CTRL, section 4.1).

    The paper divides the logit, which would reward a negative one; that is multiplied instead, as
    has become the convention.
    """
    penalty_B1 = penalty_B[:, None]
    lower_BV = jnp.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1)
    return jnp.where(seen_BV, lower_BV, logits_BV)


def discourage(logits_BV: jax.Array, counts_BV: jax.Array, controls: Controls) -> jax.Array:
    """Make what was made less likely: by the presence penalty once, by that of frequency each time."""
    assert controls.presence_B is not None and controls.frequency_B is not None
    once_BV = jnp.where(counts_BV > 0, controls.presence_B[:, None], 0.0)
    return logits_BV - counts_BV * controls.frequency_B[:, None] - once_BV


def count(tokens_BS: jax.Array, begin_B: jax.Array, end_B: jax.Array, vocab: int) -> jax.Array:
    """How often each token stands in places `begin_B` to `end_B` (excluded) of its row, float32 [B, V]."""
    place_S = jnp.arange(tokens_BS.shape[1])
    inside_BS = (place_S >= begin_B[:, None]) & (place_S < end_B[:, None])
    return _sums(jnp.where(inside_BS, tokens_BS, NO_ID), jnp.ones(tokens_BS.shape), vocab)


def bias_of(controls: Controls, vocab: int) -> jax.Array:
    """What is added to logits [B, V]."""
    assert controls.bias_ids_BN is not None and controls.bias_BN is not None
    return _sums(controls.bias_ids_BN, controls.bias_BN, vocab)


def _sums(ids_BN: jax.Array, values_BN: jax.Array, vocab: int) -> jax.Array:
    """The sum of values by id [B, V]; ids beyond are dropped."""

    def one(ids_N: jax.Array, values_N: jax.Array) -> jax.Array:
        return jnp.zeros(vocab).at[ids_N].add(values_N, mode="drop")

    return jax.vmap(one)(ids_BN, values_BN)


def truncate(logits_BV: jax.Array, controls: Controls, features: Features) -> jax.Array:
    """Logits over temperature, minus the largest; -inf where top-k, top-p, min-p or typical-p drop one."""
    warm_B1 = jnp.maximum(controls.temperature_B, GREEDY_BELOW)[:, None]
    scaled_BV = (logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)) / warm_B1
    if features.top_k:
        V = logits_BV.shape[-1]
        goal_B = jnp.where(controls.top_k_B == 0, V, jnp.minimum(controls.top_k_B, V))
        keep_BV = upper_set(scaled_BV, jnp.ones_like(scaled_BV), goal_B.astype(jnp.float32))
        scaled_BV = jnp.where(keep_BV, scaled_BV, -jnp.inf)
    if features.top_p:
        keep_BV = upper_set(scaled_BV, jax.nn.softmax(scaled_BV, axis=-1), controls.top_p_B)
        off_B1 = controls.top_p_B[:, None] >= 1
        scaled_BV = jnp.where(keep_BV | off_B1, scaled_BV, -jnp.inf)
    floor_B1 = jnp.log(controls.min_p_B)[:, None]
    scaled_BV = jnp.where(scaled_BV >= floor_B1, scaled_BV, -jnp.inf)
    if features.typical:
        assert controls.typical_B is not None
        logp_BV = jax.nn.log_softmax(scaled_BV, axis=-1)
        p_BV = jnp.exp(logp_BV)
        entropy_B1 = -jnp.sum(jnp.where(p_BV > 0, p_BV * logp_BV, 0), axis=-1, keepdims=True)
        keep_BV = upper_set(-jnp.abs(logp_BV + entropy_B1), p_BV, controls.typical_B)
        off_B1 = controls.typical_B[:, None] >= 1
        scaled_BV = jnp.where(keep_BV | off_B1, scaled_BV, -jnp.inf)
    return scaled_BV


def repeats(
    tokens_BS: jax.Array, length_B: jax.Array, ngram_B: jax.Array, longest: int, vocab: int
) -> jax.Array:
    """Where a token would be the last of n that the row holds already, [B, V].

    Args:
      tokens_BS: of the rows.
      length_B: how many there are.
      ngram_B: n of each row; 0 forbids nothing.
      longest: the largest n (static).
      vocab: V (static).
    """
    S = tokens_BS.shape[1]
    again_BS = (jnp.arange(S) < length_B[:, None]) & (ngram_B[:, None] > 0)  # of the n-gram that ends here
    for i in range(1, longest):
        last_B1 = jnp.take_along_axis(tokens_BS, jnp.maximum(length_B - i, 0)[:, None], axis=1)
        before_BS = jnp.pad(tokens_BS, ((0, 0), (i, 0)), constant_values=-1)[:, :S]
        again_BS &= (before_BS == last_B1) | (i >= ngram_B[:, None])
    at_BS = jnp.where(again_BS, tokens_BS, vocab)
    return jax.vmap(lambda at_S: jnp.zeros(vocab, bool).at[at_S].set(True, mode="drop"))(at_BS)


def noise(seed_B: jax.Array, position_B: jax.Array, size: int) -> jax.Array:
    """Gumbel noise [B, size]: each row's from its own seed and position (Gumbel-max trick)."""

    def one(seed: jax.Array, position: jax.Array) -> jax.Array:
        return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), position), (size,))

    return jax.vmap(one)(seed_B, position_B)
