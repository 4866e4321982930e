"""The compiled programs of the serving engine: rows come and go, the programs stay the same.

`place` writes a request into a slot, `chunk` computes a part of its prompt, `step` makes the next token of
all rows that run, or several where they are proposed first (speculative decoding; Leviathan et al. 2023).
What is proposed changes no result: the model draws at every place with the noise of that place, and a
proposal is kept where it is what the model drew.

Shapes: B slots, S tokens of a row, T = 1 + proposals, C tokens of a chunk, M pages of a row, V vocabulary,
N stop ids or biased ones, A alternatives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.config import Compute, Model, Sampling
from jaxgpt.layers.paged import Pools, constrain_pools
from jaxgpt.models import assemble
from jaxgpt.sample.program import by_rows, decoder, everywhere
from jaxgpt.sample.request import MOST_ALTERNATIVES
from jaxgpt.sample.strategies import (
    Chosen,
    Controls,
    Features,
    biases,
    choose,
    controls_of,
    count,
    features_of,
    host,
    repeats,
)
from jaxgpt.target import Target
from jaxgpt.tune.slots import Slots

MOST_STOPS = 16
"""Ids that may end a row."""
LONGEST_NGRAM = 8
"""Of `Sampling.no_repeat_ngram` in the engine."""
MOST_BIASES = 1024
"""Ids of `Sampling.logit_bias` in the engine."""
MATCH = 3
"""Tokens that must be the same for what followed them to be proposed; fewer where no three are."""
LEVELS = (
    Features(random=False, top_k=False, top_p=False, penalty=False),
    Features(random=True, top_k=False, top_p=False, penalty=False),
    Features(random=True, top_k=True, top_p=True, penalty=False),
    (_MOST := Features(random=True, top_k=True, top_p=True, penalty=True, typical=True, ngram=LONGEST_NGRAM)),
    _MOST._replace(counted=True, biased=True),
)
"""What a step does for its rows, from the quickest: the first that all of them can do with."""
RULED = 3
"""The first of them that follows rules."""


def level_of(rows: Sequence[Sampling], *, ruled: bool = False) -> int:
    """The first level that does what these rows ask."""
    need = features_of(rows) if rows else LEVELS[0]
    able = (i for i, has in enumerate(LEVELS) if all(n <= h for n, h in zip(need, has, strict=True)))
    return max(next(able), RULED if ruled else 0)


class Row(NamedTuple):
    """A request as a slot holds it; `Lanes.rows` has the same with a leading axis B.

    Attributes:
      tokens_S: prompt and what was made, padded.
      length: how many there are.
      prompt: how many of them are the prompt's.
      known: tokens that must come as they stand, since they were made before (see `Engine`); prompt included.
      end: most tokens.
      stop_N: ids that end it; -1 where there is none.
      controls: how tokens are chosen, a number each.
      adapter: slot of its adapter.
      alternatives: how many are asked for.
      ruled: it follows a rule, of which a step knows what comes next and no more.
      done: it has ended.
    """

    tokens_S: Any
    length: Any
    prompt: Any
    known: Any
    end: Any
    stop_N: Any
    controls: Controls
    adapter: Any
    alternatives: Any
    ruled: Any
    done: Any


class Lanes(NamedTuple):
    """What the programs pass on. A row's last token is not yet in the cache.

    Attributes:
      rows: of all slots.
      seen_BV: tokens that a row holds.
      pools: the cache.
      draft: the cache of the draft; None without one.
    """

    rows: Row
    seen_BV: jax.Array
    pools: Pools
    draft: Pools | None


class Out(NamedTuple):
    """What a step made.

    Attributes:
      ids_BT, logprobs_BT: of which the first `count_B` are new.
      count_B: 0 where a row did not run, or ended before it made a token.
      failed_B: logits were not finite.
      likely_BTA, likely_logprobs_BTA: the likeliest tokens of each place, where some row asks for them.
    """

    ids_BT: jax.Array
    logprobs_BT: jax.Array
    count_B: jax.Array
    failed_B: jax.Array
    likely_BTA: jax.Array
    likely_logprobs_BTA: jax.Array


@dataclass(frozen=True)
class Lane:
    """What the programs depend on beside shapes (hashable, static).

    Attributes:
      model, compute, target: of the model.
      vocab: ids from here on are never chosen.
      proposals: tokens proposed a step.
      draft: the model that proposes; None means earlier text does.
    """

    model: Model
    compute: Compute
    target: Target
    vocab: int
    proposals: int = 0
    draft: tuple[Model, Compute] | None = None

    def run(self, params: dict, tokens_BT: jax.Array, start_B: jax.Array, pools: Pools, **call: Any) -> Any:
        """The model's features of new tokens, and the pools with them."""
        return _run(self.model, self.compute, self.target, params, tokens_BT, start_B, pools, **call)

    def logits(self, params: dict, x: jax.Array) -> jax.Array:
        """Of features [..., D]."""
        return assemble(decoder(self.model, self.compute, self.target)[0], params).logits(x)


def _run(
    model: Model,
    compute: Compute,
    target: Target,
    params: Any,
    tokens_BT: jax.Array,
    start_B: jax.Array,
    pools: Any,
    *,
    table_BM: jax.Array,
    real_B: jax.Array | None = None,
    adapter_B: jax.Array | None = None,
) -> tuple[jax.Array, Pools]:
    module: Any = assemble(decoder(model, compute, target)[0], params)
    cache = pools.cache(model.layers, table_BM, real_B)
    more = {} if adapter_B is None else {"adapters_B": adapter_B}
    x_BTD, cache = module.decode(tokens_BT, start_B, cache, **more)
    return x_BTD, constrain_pools(Pools.of(cache))


def row_of(
    tokens: Sequence[int],
    prompt: int,
    end: int,
    stop: Sequence[int],
    sampling: Sampling,
    seed: int,
    adapter: int,
    alternatives: int,
    ruled: bool,
    width: int,
) -> Row:
    """A request as host arrays: `tokens` of which the first `prompt` are the prompt, in a row of `width`."""
    tokens_S, stop_N = np.zeros(width, np.int32), np.full(MOST_STOPS, -1, np.int32)
    tokens_S[: len(tokens)], stop_N[: len(stop)] = tokens, stop
    controls = controls_of([sampling], [seed])
    more = {
        "typical_B": host([sampling.typical_p], np.float32),
        "ngram_B": host([sampling.no_repeat_ngram], np.int32),
        "presence_B": host([sampling.presence_penalty], np.float32),
        "frequency_B": host([sampling.frequency_penalty], np.float32),
    }
    more["bias_ids_BN"], more["bias_BN"] = biases([sampling], MOST_BIASES)
    controls = controls._replace(**more)
    return Row(
        tokens_S=tokens_S,
        length=np.int32(prompt),
        prompt=np.int32(prompt),
        known=np.int32(len(tokens)),
        end=np.int32(end),
        stop_N=stop_N,
        controls=jax.tree.map(lambda x_B: x_B[0], controls),
        adapter=np.int32(adapter),
        alternatives=np.int32(alternatives),
        ruled=np.bool_(ruled),
        done=np.bool_(False),
    )


def empty_lanes(lane: Lane, slots: int, width: int, pools: Pools, draft: Pools | None) -> Lanes:
    """Slots with nothing in them."""
    row = row_of([], 0, 0, [], Sampling(), 0, 0, 0, False, width)
    rows = jax.tree.map(lambda x: jnp.broadcast_to(x, (slots, *np.shape(x))), row)
    return Lanes(rows, jnp.zeros((slots, lane.model.vocab_size), bool), pools, draft)


@partial(jax.jit, donate_argnums=0)
def place(lanes: Lanes, slot: jax.Array, row: Row) -> Lanes:
    """The lanes with a request in a slot; nothing of it is computed yet."""
    rows = jax.tree.map(lambda x_B, x: x_B.at[slot].set(x), lanes.rows, row)
    V = lanes.seen_BV.shape[1]
    at_S = jnp.where(jnp.arange(len(row.tokens_S)) < row.length, row.tokens_S, V)
    seen_V = jnp.zeros(V, bool).at[at_S].set(True, mode="drop")
    return lanes._replace(rows=rows, seen_BV=lanes.seen_BV.at[slot].set(seen_V))


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def chunk(
    lane: Lane,
    size: int,
    params: tuple[Any, Any],
    lanes: Lanes,
    table_1M: jax.Array,
    allowed_1V: jax.Array,
    where: jax.Array,
) -> tuple[Lanes, Out]:
    """Compute a part of a slot's prompt, and after the last one the first token.

    Args:
      lane, size: C; static.
      params: of the model and of the draft.
      lanes: their memory is used again.
      table_1M: pages of the row.
      allowed_1V: False where the first token must not come.
      where: slot, first token of the part, how many there are, whether it is the last, and the level.
    """
    slot, start, count, last, level = where
    one = jax.tree.map(lambda x_B: jax.lax.dynamic_slice_in_dim(x_B, slot, 1), (lanes.rows, lanes.seen_BV))
    rows, seen_1V = one
    tokens_1C = jax.lax.dynamic_slice(rows.tokens_S, (0, start), (1, size))
    call = {"table_BM": table_1M, "real_B": count[None]}
    adapters = {} if not _adapted(params[0]) else {"adapter_B": rows.adapter}
    x_1CD, pools = lane.run(params[0], tokens_1C, start[None], lanes.pools, **call, **adapters)
    draft = lanes.draft
    if lane.draft is not None:
        _, draft = _run(*lane.draft, lane.target, params[1], tokens_1C, start[None], draft, **call)
    logits_11V = lane.logits(params[0], jax.lax.dynamic_slice_in_dim(x_1CD, count - 1, 1, 1))
    runs_1 = (last > 0)[None]
    rows, seen_1V, out = _settle(lane, rows, seen_1V, logits_11V, None, runs_1, allowed_1V, level)
    put = partial(jax.tree.map, lambda x_B, x_1: jax.lax.dynamic_update_slice_in_dim(x_B, x_1, slot, 0))
    rows, seen_BV = put((lanes.rows, lanes.seen_BV), (rows, seen_1V))
    return Lanes(rows, seen_BV, pools, draft), everywhere(out)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def step(
    lane: Lane,
    params: tuple[Any, Any],
    lanes: Lanes,
    slot_B: jax.Array,
    table_BM: jax.Array,
    runs_B: jax.Array,
    allowed_BV: jax.Array,
    level: jax.Array,
) -> tuple[Lanes, Out]:
    """The next tokens of the rows that run and are not done, of all slots or of B of them.

    Args:
      lane: static.
      params: of the model and of the draft.
      lanes: their memory is used again.
      slot_B: which slots these are, each at most once.
      table_BM: pages of the rows.
      runs_B: which rows run.
      allowed_BV: False where the next token must not come.
      level: of `LEVELS`.
    """
    rows, whole_BV = jax.tree.map(lambda x: x[slot_B], (lanes.rows, lanes.seen_BV))
    runs_B = runs_B & ~rows.done
    table_BM = jnp.where(runs_B[:, None], table_BM, 0)
    start_B = jnp.where(runs_B, rows.length - 1, 0)
    last_B1 = jnp.take_along_axis(rows.tokens_S, start_B[:, None], axis=1)
    draft, proposed_BT = lanes.draft, None
    if lane.proposals:
        if lane.draft is None:
            proposed_BT = look_back(rows.tokens_S, rows.length, lane.proposals)
        else:
            some = lanes._replace(rows=rows, seen_BV=whole_BV)
            proposed_BT, draft = _drafted(lane, params[1], some, start_B, table_BM, allowed_BV, level)
        at_BT = rows.length[:, None] + jnp.arange(lane.proposals)
        held_BT = jnp.take_along_axis(rows.tokens_S, at_BT, axis=1, mode="clip")
        proposed_BT = jnp.where(at_BT < rows.known[:, None], held_BT, proposed_BT)
    tokens_BT = last_B1 if proposed_BT is None else jnp.concatenate([last_B1, proposed_BT], axis=1)
    adapters = {} if not _adapted(params[0]) else {"adapter_B": rows.adapter}
    x_BTD, pools = lane.run(params[0], tokens_BT, start_B, lanes.pools, table_BM=table_BM, **adapters)
    logits_BTV = lane.logits(params[0], x_BTD)
    new = _settle(lane, rows, whole_BV, logits_BTV, proposed_BT, runs_B, allowed_BV, level)
    rows, seen_BV = jax.tree.map(lambda x, y: x.at[slot_B].set(y), (lanes.rows, lanes.seen_BV), new[:2])
    return Lanes(rows, seen_BV, pools, draft), everywhere(new[2])


def _adapted(params: dict) -> bool:
    """Whether the weights have slots for adapters."""
    leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, Slots))
    return any(isinstance(leaf, Slots) for leaf in leaves)


def look_back(tokens_BS: jax.Array, length_B: jax.Array, count: int) -> jax.Array:
    """What followed the last time that a row's last tokens stood in it [B, count] (prompt look-up; Saxena
    2023).

    The longest match counts, of `MATCH` tokens at most, and of these the latest. Without one, or beyond the
    row's end, the proposal is its last token.
    """
    S = tokens_BS.shape[1]
    place_S = jnp.arange(S)
    same_BS = place_S < length_B[:, None] - 1
    best_BS = jnp.full(tokens_BS.shape, -1)
    for i in range(MATCH):
        last_B1 = jnp.take_along_axis(tokens_BS, jnp.maximum(length_B - 1 - i, 0)[:, None], axis=1)
        before_BS = jnp.pad(tokens_BS, ((0, 0), (i, 0)), constant_values=-1)[:, :S]
        same_BS &= before_BS == last_B1
        best_BS = jnp.where(same_BS, place_S + i * S, best_BS)
    found_B = jnp.max(best_BS, axis=1)
    at_BT = jnp.where(found_B < 0, S, found_B % S)[:, None] + 1 + jnp.arange(count)
    at_BT = jnp.minimum(at_BT, length_B[:, None] - 1)
    return jnp.take_along_axis(tokens_BS, at_BT, axis=1, mode="clip")


def _drafted(
    lane: Lane,
    params: Any,
    lanes: Lanes,
    start_B: jax.Array,
    table_BM: jax.Array,
    allowed_BV: jax.Array,
    level: jax.Array,
) -> tuple[jax.Array, Any]:
    """What the draft would draw next with the same noise [B, proposals], and its cache.

    It runs once more than it proposes, so that its cache has the last proposal too, should it be kept.
    """
    assert lane.draft is not None
    model, compute = lane.draft
    rows, seen_BV, pools = lanes.rows, lanes.seen_BV, lanes.draft
    module: Any = assemble(decoder(model, compute, lane.target)[0], params)
    V, row_B = lane.model.vocab_size, jnp.arange(len(start_B))

    def one(carry: tuple[Any, ...], i: jax.Array) -> tuple[Any, jax.Array]:
        token_B, tokens_BS, seen_BV, pools = carry
        how = (model, compute, lane.target, params)
        x_BTD, pools = _run(*how, token_B[:, None], start_B + i, pools, table_BM=table_BM)
        logits_BV, at_B = module.logits(x_BTD[:, 0])[:, :V], rows.length + i
        pad = ((0, 0), (0, V - logits_BV.shape[1]))
        logits_BV = jnp.pad(logits_BV, pad, constant_values=-jnp.inf)
        chosen = _choose(lane, rows, tokens_BS, seen_BV, at_B, logits_BV, allowed_BV, level)
        held_B = jnp.take_along_axis(rows.tokens_S, at_B[:, None], axis=1, mode="clip")[:, 0]
        token_B = jnp.where(at_B < rows.known, held_B, chosen.ids_B)
        tokens_BS = tokens_BS.at[row_B, at_B].set(token_B, mode="drop")
        return (token_B, tokens_BS, seen_BV.at[row_B, token_B].set(True), pools), token_B

    first_B = jnp.take_along_axis(rows.tokens_S, start_B[:, None], axis=1)[:, 0]
    carry = (first_B, rows.tokens_S, seen_BV, pools)
    (*_, pools), token_TB = jax.lax.scan(one, carry, jnp.arange(lane.proposals + 1))
    return token_TB[:-1].T, pools


def _choose(
    lane: Lane,
    rows: Row,
    tokens_BS: jax.Array,
    seen_BV: jax.Array,
    position_B: jax.Array,
    logits_BV: jax.Array,
    allowed_BV: jax.Array,
    level: jax.Array,
) -> Chosen:
    """The next token of every row, at the given level."""

    def at(features: Features) -> Callable[[], Chosen]:
        def run() -> Chosen:
            may_BV = None
            if features.ngram:
                assert rows.controls.ngram_B is not None
                size = lane.model.vocab_size
                again_BV = repeats(tokens_BS, position_B, rows.controls.ngram_B, features.ngram, size)
                may_BV = allowed_BV & ~again_BV
            counts_BV = None
            if features.counted:
                counts_BV = count(tokens_BS, rows.prompt, position_B, lane.model.vocab_size)
            how = (rows.controls, features, lane.vocab, may_BV, counts_BV)
            chosen = choose(logits_BV, seen_BV, position_B, *how)
            stuck_B = jnp.zeros(len(logits_BV), bool) if chosen.stuck_B is None else chosen.stuck_B
            return Chosen(chosen.ids_B, chosen.logprobs_B, None, stuck_B)

        return run

    return jax.lax.switch(level, [at(features) for features in LEVELS])


def _settle(
    lane: Lane,
    rows: Row,
    seen_BV: jax.Array,
    logits_BTV: jax.Array,
    proposed_BT: jax.Array | None,
    runs_B: jax.Array,
    allowed_BV: jax.Array,
    level: jax.Array,
) -> tuple[Row, jax.Array, Out]:
    """Draw at every place, keep what was proposed as long as it is what was drawn, and write it down."""
    (B, T, V), row_B = logits_BTV.shape, jnp.arange(len(logits_BTV))
    at_BT = rows.length[:, None] + jnp.arange(T)
    logits_NV = by_rows(logits_BTV.reshape(B * T, V))

    def each(x_B: jax.Array) -> jax.Array:
        return jnp.repeat(x_B, T, axis=0) if T > 1 else x_B

    tokens_BS, seen_BTV = rows.tokens_S, seen_BV[:, None]
    if proposed_BT is not None:
        tokens_BS = tokens_BS.at[row_B[:, None], at_BT[:, :-1]].set(proposed_BT, mode="drop")
        parts = [seen_BV]
        for j in range(T - 1):
            parts.append(parts[-1].at[row_B, proposed_BT[:, j]].set(True))
        seen_BTV = jnp.stack(parts, axis=1)
    flat = jax.tree.map(each, rows)
    chosen = _choose(
        lane,
        flat,
        each(tokens_BS),
        seen_BTV.reshape(B * T, V),
        at_BT.reshape(-1),
        logits_NV,
        each(allowed_BV),
        level,
    )
    ids_BT, logprobs_BT = chosen.ids_B.reshape(B, T), chosen.logprobs_B.reshape(B, T)
    known_BT = at_BT < rows.known[:, None]
    held_BT = jnp.take_along_axis(rows.tokens_S, at_BT, axis=1, mode="clip")
    ids_BT = jnp.where(known_BT, held_BT, ids_BT)
    assert chosen.stuck_B is not None
    bad_BT = ~known_BT & ~jnp.isfinite(logprobs_BT)
    stuck_BT = ~known_BT & chosen.stuck_B.reshape(B, T)
    stops_BT = jnp.any(ids_BT[..., None] == rows.stop_N[:, None], axis=-1)
    # A place is reached if all before it were kept, made a token and did not end the row.
    fine_BT = ~bad_BT & ~stuck_BT
    go_BT = fine_BT & ~stops_BT & (at_BT + 1 < rows.end[:, None])
    if proposed_BT is not None:
        go_BT &= jnp.concatenate([ids_BT[:, :-1] == proposed_BT, jnp.zeros((B, 1), bool)], axis=1)
        go_BT &= ~rows.ruled[:, None] | (at_BT + 1 < rows.known[:, None])
    before_BT = jnp.cumprod(go_BT.astype(jnp.int32), axis=1)
    reached_BT = jnp.concatenate([jnp.ones((B, 1), bool), before_BT[:, :-1] > 0], axis=1) & runs_B[:, None]
    made_BT = reached_BT & fine_BT
    count_B = jnp.sum(made_BT, axis=1, dtype=jnp.int32)
    ended_BT = reached_BT & (~fine_BT | stops_BT | (at_BT + 1 >= rows.end[:, None]))
    slot_BT = jnp.where(made_BT, at_BT, rows.tokens_S.shape[1])
    tokens_BS = rows.tokens_S.at[row_B[:, None], slot_BT].set(ids_BT, mode="drop")
    seen_BV = seen_BV.at[row_B[:, None], jnp.where(made_BT, ids_BT, V)].set(True, mode="drop")
    rows = rows._replace(
        tokens_S=tokens_BS, length=rows.length + count_B, done=rows.done | jnp.any(ended_BT, axis=1)
    )
    likely_BTA, likely_logprobs_BTA = _likely(logits_BTV, lane.vocab, jnp.any(rows.alternatives > 0))
    failed_B = jnp.any(reached_BT & bad_BT, axis=1)
    return rows, seen_BV, Out(ids_BT, logprobs_BT, count_B, failed_B, likely_BTA, likely_logprobs_BTA)


def _likely(logits_BTV: jax.Array, vocab: int, wanted: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The likeliest tokens and their log-probabilities, where some row wants them."""
    shape = (*logits_BTV.shape[:2], min(MOST_ALTERNATIVES, vocab))

    def find() -> tuple[jax.Array, jax.Array]:
        of_BTV = jax.nn.log_softmax(logits_BTV, axis=-1)
        best_BTA, ids_BTA = jax.lax.top_k(of_BTV[..., :vocab], shape[-1])
        return ids_BTA, best_BTA

    return jax.lax.cond(wanted, find, lambda: (jnp.zeros(shape, jnp.int32), jnp.zeros(shape)))
