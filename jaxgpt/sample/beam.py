"""Beam search, plain or in diverse groups, as one jitted program.

The beams of a prompt are neighbouring rows of a `Program`, which prefills each prompt once. Each group of
beams is a search of its own but for what it pays for tokens that groups before it have chosen.

Shapes: P prompts, G groups, R = P G searches, M beams of a search, N = R M rows; K texts, S slots,
V vocabulary, E stop ids.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.config import Beam, Sampling
from jaxgpt.errors import require
from jaxgpt.layers.cache import Cache, constrain_cache, reorder
from jaxgpt.sample.completion import Call, Completion, Maker, Waiting, best_of
from jaxgpt.sample.program import (
    Made,
    Program,
    Rows,
    as_batch,
    by_rows,
    everywhere,
    likeliest,
    per_prompt,
)
from jaxgpt.sharding import constrain

NONE = -jnp.inf
"""The value of what is no text."""


class Knobs(NamedTuple):
    """Settings of `config.decoding.Beam` that are no part of the compiled program."""

    length_penalty: Any
    diversity: Any


class Texts(NamedTuple):
    """K texts of each search, the best first."""

    tokens_RKS: jax.Array
    """With the prompt, and 0 behind the last token."""
    logprobs_RKS: jax.Array
    """Of the tokens that were made, by the model itself; else 0."""
    length_RK: jax.Array
    value_RK: jax.Array
    """What the search compares."""

    def take(self, index_RK: jax.Array) -> Texts:
        """Those of these numbers."""
        return jax.tree.map(lambda x: jax.vmap(lambda x, i: x[i])(x, index_RK), self)

    def best(self, count: int) -> Texts:
        """The `count` of the largest values."""
        return self.take(jax.lax.top_k(self.value_RK, count)[1])

    def with_token(self, id_RK: jax.Array, logprob_RK: jax.Array, value_RK: jax.Array) -> Texts:
        """Each with one more token."""

        def put(row_S: jax.Array, at: jax.Array, new: jax.Array) -> jax.Array:
            return row_S.at[at].set(new, mode="drop")

        each = jax.vmap(jax.vmap(put))
        return Texts(
            each(self.tokens_RKS, self.length_RK, id_RK),
            each(self.logprobs_RKS, self.length_RK, logprob_RK),
            self.length_RK + 1,
            value_RK,
        )


def joined(a: Texts, b: Texts) -> Texts:
    """The texts of both."""
    return jax.tree.map(lambda x, y: jnp.concatenate([x, y], axis=1), a, b)


def chosen(keep_R: jax.Array, a: Texts, b: Texts) -> Texts:
    """Those of `a` in the searches where `keep_R`, else those of `b`."""
    return jax.tree.map(lambda x, y: jnp.where(keep_R.reshape(-1, *[1] * (x.ndim - 1)), x, y), a, b)


class Beams(NamedTuple):
    """What the searches have so far. The last token of an open text is not in the cache yet."""

    open: Texts
    found: Texts
    """Finished texts; their values are scores."""
    done_R: jax.Array
    failed_R: jax.Array


class Offer(NamedTuple):
    """What the model says of the next token of each beam.

    Attributes:
      ids_NK, logprobs_NK: the likeliest tokens that do not end a text; of all tokens where there are groups.
      stop_NE, ends_NE: the ids that do, V where there is none, and their log-probabilities.
      bad_N: whether the logits were not finite.
    """

    ids_NK: jax.Array
    logprobs_NK: jax.Array
    stop_NE: jax.Array
    ends_NE: jax.Array
    bad_N: jax.Array


class Found(NamedTuple):
    """Texts of each prompt, the best first, as rows: as many as there are beams.

    Attributes:
      made: the rows.
      score_N: their scores; -inf where there is no further text.
    """

    made: Made
    score_N: jax.Array


@dataclass(frozen=True)
class Search:
    """What the compiled program depends on (hashable, static).

    Attributes:
      program: with `group` beams for each prompt.
      groups: into which these are divided.
      early_stopping: see `config.decoding.Beam`.
    """

    program: Program
    groups: int
    early_stopping: str

    @property
    def beams(self) -> int:
        """Of one search."""
        return self.program.group // self.groups

    def begin(self, params: dict, rows: Rows, knobs: Knobs) -> tuple[Beams, Cache]:
        """Run the prompts and choose each beam's first token."""
        cache, logits_PV, _ = self.program.read(params, rows)
        N, T = rows.tokens_BT.shape
        R, M = N // self.beams, self.beams
        tokens_NS = jnp.pad(rows.tokens_BT, ((0, 0), (0, self.program.slots - T)))
        tokens_NS = jnp.where(jnp.arange(self.program.slots) < rows.length_B[:, None], tokens_NS, 0)
        tokens_RMS, length_RM = tokens_NS.reshape(R, M, -1), rows.length_B.reshape(R, M)
        none_RM = jnp.full((R, M), NONE)
        empty = Texts(tokens_RMS, jnp.zeros(tokens_RMS.shape), length_RM, none_RM)
        one = empty._replace(value_RK=none_RM.at[:, 0].set(0.0))  # the beams are alike so far
        done_R = length_RM[:, 0] >= rows.end_B[::M]
        beams = Beams(one, empty, done_R, jnp.zeros(R, bool))
        return self.step(rows, knobs, beams, cache, jnp.repeat(logits_PV, self.program.group, 0))

    def step(
        self, rows: Rows, knobs: Knobs, beams: Beams, cache: Cache, logits_NV: jax.Array
    ) -> tuple[Beams, Cache]:
        """Choose the next token of all beams of the searches that are not done."""
        offer = self._offer(rows, beams, logits_NV)
        limits = (rows.length_B, rows.end_B)
        beams, parent_RM = per_prompt(self._choose)(knobs, limits, beams, offer)
        return beams, constrain_cache(reorder(cache, parent_RM))

    def _offer(self, rows: Rows, beams: Beams, logits_NV: jax.Array) -> Offer:
        """What may come next, computed where whole rows of logits are; the rest is small."""
        logits_NV = by_rows(logits_NV) if self.groups == 1 else constrain(logits_NV, "batch", "features")
        V, N, S = logits_NV.shape[-1], len(rows.length_B), beams.open.tokens_RKS.shape[-1]
        total_N1 = jax.nn.logsumexp(logits_NV, axis=-1, keepdims=True)
        bad_N = ~jnp.isfinite(total_N1[:, 0])
        may_NV = (jnp.arange(V) < self.program.vocab) & ~bad_N[:, None]
        flat = (beams.open.tokens_RKS.reshape(N, S), beams.open.length_RK.reshape(N))
        allowed_NV = self.program.allowed(*flat, rows.controls)
        may_NV = may_NV if allowed_NV is None else may_NV & allowed_NV
        logprobs_NV = jnp.where(may_NV, logits_NV - total_N1, NONE)
        stop_NE = jnp.where(rows.stop_BN < 0, V, rows.stop_BN)
        if not stop_NE.shape[1]:
            stop_NE = jnp.full((N, 1), V)
        ends_NE = jnp.take_along_axis(logprobs_NV, jnp.minimum(stop_NE, V - 1), axis=1)
        ends_NE = jnp.where(stop_NE < V, ends_NE, NONE)
        goes_NV = jnp.where(jnp.any(jnp.arange(V) == stop_NE[..., None], axis=1), NONE, logprobs_NV)
        logprobs_NK, ids_NK = goes_NV, jnp.broadcast_to(jnp.arange(V), (N, V))
        if self.groups == 1:
            logprobs_NK, ids_NK = likeliest(goes_NV, min(self.beams, V))
        return as_batch(Offer(ids_NK, logprobs_NK, stop_NE, ends_NE, bad_N))

    def _choose(
        self, knobs: Knobs, limits: tuple[jax.Array, jax.Array], beams: Beams, offer: Offer
    ) -> tuple[Beams, jax.Array]:
        """The beams with one more token, and which text each open one goes on from."""
        R, M = beams.open.value_RK.shape
        begin_R, end_R = (x[::M] for x in limits)
        live_RM = beams.open.value_RK > NONE
        failed_R = ~beams.done_R & jnp.any(offer.bad_N.reshape(R, M) & live_RM, axis=1)
        parent_RM, opened = self._extend(beams.open, *self._in_turn(knobs, beams.open, offer))
        _, stopped = self._extend(beams.open, offer.stop_NE, offer.ends_NE, 0.0)
        # Of the M best continuations, those that end are finished texts.
        both = joined(opened, stopped)
        value_RM, at_RM = jax.lax.top_k(both.value_RK, M)
        keep_R = beams.done_R | failed_R | (value_RM[:, 0] == NONE)
        length_R = opened.length_RK[:, 0]
        made_R, last_R = length_R - begin_R, length_R >= end_R
        score_RM = value_RM / per_length(made_R, knobs)[:, None]
        ends_RM = ((at_RM >= M) | last_R[:, None]) & (value_RM > NONE) & ~keep_R[:, None]
        new = both.take(at_RM)._replace(value_RK=jnp.where(ends_RM, score_RM, NONE))
        found = joined(beams.found, new).best(M)
        # Is there anything left to look for?
        ahead_R = made_R
        if self.early_stopping == "never":
            ahead_R = jnp.where(knobs.length_penalty > 0, end_R - begin_R, made_R)
        bound_R, worst_R = opened.value_RK[:, 0] / per_length(ahead_R, knobs), found.value_RK[:, -1]
        over_R = bound_R <= worst_R
        if self.early_stopping == "full":
            over_R = (worst_R > NONE) | (bound_R == NONE)
        parent_RM = jnp.where(keep_R[:, None], jnp.arange(M), parent_RM)
        opened = chosen(keep_R, beams.open, opened)
        return Beams(opened, found, keep_R | last_R | over_R, beams.failed_R | failed_R), parent_RM

    def _extend(
        self, texts: Texts, ids_NK: jax.Array, logprobs_NK: jax.Array, cost_NK: jax.Array | float
    ) -> tuple[jax.Array, Texts]:
        """The M best texts with one of K tokens more, and the numbers of those that they continue."""
        (R, M), K = texts.value_RK.shape, ids_NK.shape[-1]
        value_RMK = texts.value_RK[..., None] + (logprobs_NK - cost_NK).reshape(R, M, K)
        value_RM, at_RM = jax.lax.top_k(value_RMK.reshape(R, -1), M)
        id_RM, logprob_RM = (
            jnp.take_along_axis(x.reshape(R, -1), at_RM, axis=1) for x in (ids_NK, logprobs_NK)
        )
        return at_RM // K, texts.take(at_RM // K).with_token(id_RM, logprob_RM, value_RM)

    def _in_turn(
        self, knobs: Knobs, texts: Texts, offer: Offer
    ) -> tuple[jax.Array, jax.Array, jax.Array | float]:
        """The likeliest tokens of each beam, their log-probabilities, and what they cost: a group pays for
        what the groups before it have chosen.
        """
        G, M, V = self.groups, self.beams, offer.ids_NK.shape[-1]
        if G == 1:
            return offer.ids_NK, offer.logprobs_NK, 0.0
        goes_PGMV = offer.logprobs_NK.reshape(-1, G, M, V)
        value_PGM = texts.value_RK.reshape(-1, G, M)
        times_PV, found = jnp.zeros((len(goes_PGMV), V)), []
        for g in range(G):
            cost_PMV = jnp.broadcast_to(knobs.diversity * times_PV[:, None], (len(times_PV), M, V))
            gain_PMK, id_PMK = jax.lax.top_k(goes_PGMV[:, g] - cost_PMV, min(M, V))
            cost_PMK = jnp.take_along_axis(cost_PMV, id_PMK, axis=2)
            found.append((id_PMK, gain_PMK + cost_PMK, cost_PMK))
            value_PK = (value_PGM[:, g, :, None] + gain_PMK).reshape(len(id_PMK), -1)
            best_PM, at_PM = jax.lax.top_k(value_PK, M)
            id_PM = jnp.take_along_axis(id_PMK.reshape(value_PK.shape), at_PM, axis=1)
            id_PM = jnp.where(best_PM > NONE, id_PM, V)
            times_PV += jax.vmap(lambda id_M: jnp.zeros(V).at[id_M].add(1.0, mode="drop"))(id_PM)
        ids_NK, logprobs_NK, cost_NK = (
            jnp.stack(x, axis=1).reshape(-1, min(M, V)) for x in zip(*found, strict=True)
        )
        return ids_NK, logprobs_NK, cost_NK

    def run(self, params: dict, rows: Rows, knobs: Knobs, state: tuple[Beams, Cache]) -> Beams:
        """Search until every search is done."""
        model, N = self.program.merge(params), rows.length_B.shape[0]

        def step(state: tuple[Beams, Cache]) -> tuple[Beams, Cache]:
            beams, cache = state
            last_N = beams.open.length_RK.reshape(N) - 1
            token_N1 = jnp.take_along_axis(beams.open.tokens_RKS.reshape(N, -1), last_N[:, None], axis=1)
            x_NTD, cache = model.decode(token_N1, last_N, cache, **rows.adapters())
            return self.step(rows, knobs, beams, constrain_cache(cache), model.logits(x_NTD[:, 0]))

        return jax.lax.while_loop(lambda state: ~jnp.all(state[0].done_R), step, state)[0]

    def result(self, rows: Rows, knobs: Knobs, beams: Beams) -> Found:
        """The texts of each prompt by the score of the model itself; the open ones where none is finished."""
        found = chosen(beams.found.value_RK[:, 0] == NONE, beams.open, beams.found)
        there_RK = found.value_RK > NONE
        made_RK = jnp.maximum(found.length_RK - rows.length_B.reshape(found.length_RK.shape), 1)
        score_RK = jnp.sum(found.logprobs_RKS, axis=-1) / per_length(made_RK, knobs)
        by_prompt = jax.tree.map(
            lambda x: x.reshape(-1, self.program.group, *x.shape[2:]),
            found._replace(value_RK=jnp.where(there_RK, score_RK, NONE)),
        )
        texts = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), by_prompt.best(self.program.group))
        failed_P = jnp.any(beams.failed_R.reshape(-1, self.groups), axis=1)
        failed_N = jnp.repeat(failed_P, self.program.group)
        done_N = jnp.ones(failed_N.shape, bool)
        made = Made(texts.tokens_RKS, texts.logprobs_RKS, None, texts.length_RK, done_N, failed_N)
        return Found(made, texts.value_RK)


def per_length(made: jax.Array, knobs: Knobs) -> jax.Array:
    """What a log-probability of so many tokens is divided by."""
    return made.astype(jnp.float32) ** knobs.length_penalty


@partial(jax.jit, static_argnums=0)
def beam_search(search: Search, params: dict, rows: Rows, knobs: Knobs) -> Found:
    """The best texts of every prompt.

    Args:
      search: how.
      params: in decoding form.
      rows: each prompt as many times as it has beams.
      knobs: settings.
    """
    state = search.begin(params, rows, knobs)
    return everywhere(search.result(rows, knobs, search.run(params, rows, knobs, state)))


def find(maker: Maker, how: Beam, call: Call) -> Waiting:
    """The best text of each prompt, with the other ones of its beams.

    Raises:
      UserError: stop strings are given.
    """
    require(
        not any(call.stop_strings),
        "stop strings end a text while it is written, which a beam search does not; drop them.",
    )
    several = call.times(how.beams)
    each = [Sampling(temperature=0, no_repeat_ngram=how.no_repeat_ngram)] * len(several.prompts)
    knobs = Knobs(np.float32(how.length_penalty), np.float32(how.diversity))
    with maker.on_mesh():
        program, rows = maker.program(several, each, how.beams)
        search = Search(program, how.groups, how.early_stopping)
        running = beam_search(search, maker.params, rows, knobs)

    def result() -> list[Completion]:
        made, score_N = jax.device_get(running)

        def text(i: int, row: int) -> Completion:
            found = several.completion(maker.tokenizer, made, row)
            return replace(found, score=float(score_N[row]), seed=call.seeds[i])

        groups = [range(i * how.beams, (i + 1) * how.beams) for i in range(len(call.prompts))]
        return [
            best_of(text(i, row) for row in group if score_N[row] > NONE or row == group.start)
            for i, group in enumerate(groups)
        ]

    return result
