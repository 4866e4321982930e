"""Contrastive search (Su et al. 2022, section 3.2) as one jitted program.

The k likeliest next tokens of a prompt run as k neighbouring rows of a `Program`, whose caches hold the same
tokens; the hidden states that this gives decide which of them is taken, and the caches of the others take
over its slot.

Shapes: P prompts, K tokens to choose from, N = P K rows, D width, S slots, V vocabulary.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.config import Contrastive, Sampling
from jaxgpt.layers.cache import Cache, constrain_cache, spread_slot
from jaxgpt.sample.completion import Call, Completion, Maker, Waiting
from jaxgpt.sample.program import Made, Program, Rows, as_batch, by_rows, everywhere, likeliest
from jaxgpt.sample.strategies import Chosen, argmax


class State(NamedTuple):
    """The loop's state; the cache holds all tokens that were made."""

    made: Made
    unit_PSD: jax.Array
    """Last hidden states of the tokens, of length 1."""
    logits_PV: jax.Array
    cache: Cache


def begin(program: Program, params: dict, rows: Rows) -> State:
    """Run the prompts; nothing is chosen yet."""
    cache, logits_PV, x_PTD = program.read(params, rows)
    tokens_PT, length_P = (x[:: program.group] for x in rows[:2])
    more = program.slots - tokens_PT.shape[1]
    tokens_PS = jnp.pad(tokens_PT, ((0, 0), (0, more)))
    unit_PSD = jnp.pad(unit(x_PTD), ((0, 0), (0, more), (0, 0)))
    blank_PS, done_P = jnp.zeros(tokens_PS.shape), length_P >= rows.end_B[:: program.group]
    made = Made(tokens_PS, blank_PS, None, length_P, done_P, jnp.zeros(done_P.shape, bool))
    return State(as_batch(made), as_batch(unit_PSD), logits_PV, cache)


def run(program: Program, params: dict, rows: Rows, alpha: jax.Array, state: State) -> State:
    """Choose tokens until every row is done."""
    model, K = program.merge(params), program.group
    end_P, stop_PN = (x[::K] for x in (rows.end_B, rows.stop_BN))

    def step(state: State) -> State:
        made, logits_PV = state.made, by_rows(state.logits_PV)
        P, V = logits_PV.shape
        total_P1 = jax.nn.logsumexp(logits_PV, axis=-1, keepdims=True)
        may_V = jnp.arange(V) < program.vocab
        logprob_PK, id_PK = as_batch(likeliest(jnp.where(may_V, logits_PV - total_P1, -jnp.inf), K))
        at_N = jnp.repeat(made.length_B, K)
        x_N1D, cache = model.decode(id_PK.reshape(-1, 1), at_N, state.cache, **rows.adapters())
        unit_PKD = unit(x_N1D).reshape(P, K, -1)
        alike_PKS = jnp.einsum("pkd,psd->pks", unit_PKD, state.unit_PSD, precision=jax.lax.Precision.HIGHEST)
        before_P1S = jnp.arange(program.slots) < made.length_B[:, None, None]
        worst_PK = jnp.max(jnp.where(before_P1S, alike_PKS, -1.0), axis=-1)
        score_PK = (1 - alpha) * jnp.exp(logprob_PK) - alpha * worst_PK
        best_P1 = argmax(jnp.where(logprob_PK > -jnp.inf, score_PK, -jnp.inf))[:, None]
        id_P, logprob_P = (jnp.take_along_axis(x, best_P1, axis=1)[:, 0] for x in (id_PK, logprob_PK))
        cache = spread_slot(cache, at_N, jnp.broadcast_to(best_P1, (P, K)))
        last_PD = x_N1D.reshape(P, K, -1)[jnp.arange(P), best_P1[:, 0]]
        new_PD = unit_PKD[jnp.arange(P), best_P1[:, 0]]
        made = made.put(Chosen(id_P, logprob_P), end_P, stop_PN)
        slot_P = jnp.where(made.length_B > state.made.length_B, state.made.length_B, program.slots)
        unit_PSD = state.unit_PSD.at[jnp.arange(P), slot_P].set(new_PD, mode="drop")
        return State(as_batch(made), as_batch(unit_PSD), model.logits(last_PD), constrain_cache(cache))

    return jax.lax.while_loop(lambda state: ~jnp.all(state.made.done_B), step, state)


def unit(x: jax.Array) -> jax.Array:
    """Vectors of length 1 in these directions, float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))


@partial(jax.jit, static_argnums=0)
def contrastive_search(program: Program, params: dict, rows: Rows, alpha: jax.Array) -> Made:
    """Go on with every prompt; rows of the result are prompts.

    Args:
      program: how; its group is k.
      params: in decoding form.
      rows: each prompt k times.
      alpha: see `config.decoding.Contrastive`.
    """
    return everywhere(run(program, params, rows, alpha, begin(program, params, rows)).made)


def find(maker: Maker, how: Contrastive, call: Call) -> Waiting:
    """What contrastive search goes on with."""
    k = min(how.k, maker.tokenizer.vocab_size)
    several = call.times(k)
    with maker.on_mesh():
        program, rows = maker.program(several, [Sampling(temperature=0)] * len(several.prompts), k)
        running = contrastive_search(program, maker.params, rows, np.float32(how.alpha))

    def result() -> list[Completion]:
        made = jax.device_get(running)
        found = [call.completion(maker.tokenizer, made, row) for row in range(len(call.prompts))]
        return [call.cut(maker.tokenizer, completion, row) for row, completion in enumerate(found)]

    return result
