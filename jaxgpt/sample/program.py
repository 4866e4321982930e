"""The jitted programs of generation: prefill, decode in a loop, and both as one.

A compiled program depends on the number of rows and on lengths rounded up (`bucket`), never on
temperatures, seeds, stop tokens or the exact number of new tokens.

Shapes: B rows, T prompt length (rounded up), S slots per row, D width, V vocabulary, N stop tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxgpt.config import GPT, Compute, Model
from jaxgpt.config.decoding import Weights
from jaxgpt.errors import require
from jaxgpt.layers.by_output import by_output, from_rows
from jaxgpt.layers.cache import Cache, TokenCache, cache_axes, constrain_cache, init_cache
from jaxgpt.layers.quantized import Quantized
from jaxgpt.models import abstract_model, assemble, backbone, caches_keys, decoding_params, unstacks
from jaxgpt.sample.strategies import Chosen, Controls, Features, choose, count, repeats
from jaxgpt.sharding import constrain, spec
from jaxgpt.target import Target
from jaxgpt.tune.base import flatten, unflatten

CAST = ("matrix", "embedding", "position")
"""Roles of the parameters that a product or a look-up reads in the compute type."""
SMALLEST, STRIDE = 32, 512
"""Lengths are rounded up to powers of two between these, then to multiples of `STRIDE`."""


def bucket(length: int, limit: int) -> int:
    """A length rounded up so that few programs are compiled, at most `limit`."""
    power = max(SMALLEST, 1 << (length - 1).bit_length())
    return min(power if length <= STRIDE else STRIDE * -(-length // STRIDE), limit)


T = TypeVar("T")


class Rows(NamedTuple):
    """What a call asks of each row; constant while it runs."""

    tokens_BT: jax.Array
    """Prompts, padded on the right."""
    length_B: jax.Array
    """Tokens of each prompt."""
    prefix_B: jax.Array
    """Of these, the first that see each other under `GPT.prefix`."""
    end_B: jax.Array
    """Tokens per row holds at most, prompt included."""
    stop_BN: jax.Array
    """Ids that end a row; -1 where there is none."""
    controls: Controls
    adapter_B: jax.Array | None = None
    """Slot of each row's adapter, where the weights have slots (`tune.slots`)."""
    allowed_BV: jax.Array | None = None
    """False where the next token must not come, in a call of one step, where some row keeps a rule
    (`constrained`)."""

    def adapters(self, every: int = 1) -> dict[str, jax.Array]:
        """What a model's `decode` is told of the adapters of the rows, or of one in `every`."""
        return {} if self.adapter_B is None else {"adapters_B": self.adapter_B[::every]}


class Made(NamedTuple):
    """What has been made so far: slot s of a row holds its token s, prompt included."""

    tokens_BS: jax.Array
    logprobs_BS: jax.Array
    kept_BS: jax.Array | None
    """How many tokens truncation left where each was drawn, see `strategies.Chosen`."""
    length_B: jax.Array
    done_B: jax.Array
    failed_B: jax.Array
    """Rows that ended because their logits were not finite; the token drawn from these is not kept."""

    def put(self, chosen: Chosen, end_B: jax.Array, stop_BN: jax.Array) -> Made:
        """With the next token of the rows that are not done.

        A NaN or an infinity among the logits makes the log-probability one, so that no pass over them is
        needed to find it.
        """
        ids_B, logprobs_B, kept_B, stuck_B = chosen
        row_B = jnp.arange(ids_B.shape[0])
        done_B = self.done_B if stuck_B is None else self.done_B | stuck_B
        failed_B = ~done_B & ~jnp.isfinite(logprobs_B)
        ended_B = done_B | failed_B
        slot_B = jnp.where(ended_B, self.tokens_BS.shape[1], self.length_B)  # beyond the row: dropped
        length_B = self.length_B + ~ended_B
        stopped_B = jnp.any(ids_B[:, None] == stop_BN, axis=-1)
        return Made(
            self.tokens_BS.at[row_B, slot_B].set(ids_B, mode="drop"),
            self.logprobs_BS.at[row_B, slot_B].set(logprobs_B, mode="drop"),
            None if self.kept_BS is None else self.kept_BS.at[row_B, slot_B].set(kept_B, mode="drop"),
            length_B,
            ended_B | stopped_B | (length_B >= end_B),
            self.failed_B | failed_B,
        )


class State(NamedTuple):
    """The loop's state. A row's last token is in `made` but not yet in the cache."""

    made: Made
    seen_BV: jax.Array | None
    cache: Cache


@dataclass(frozen=True)
class Program:
    """What a compiled program depends on beside the shapes of its arguments (hashable, static)."""

    model: Model
    compute: Compute
    target: Target
    slots: int
    vocab: int
    features: Features
    group: int = 1
    """Rows that share a prompt: the first of each so many is prefilled, and its cache repeated."""

    def merge(self, params: dict) -> Any:
        """The model around its parameters (in traced code)."""
        return assemble(decoder(self.model, self.compute, self.target)[0], params)

    def prefill(self, params: dict, rows: Rows) -> State:
        """Run all prompts at once and choose each row's first token.

        Logits are computed at each row's last place alone. What the padding writes into the cache
        lies behind the row's own tokens, hidden by causality until they overwrite it.
        """
        (B, T), seen_BV = rows.tokens_BT.shape, None
        cache, logits_PV, _ = self.read(params, rows)
        logits_BV = jnp.repeat(logits_PV, self.group, 0) if self.group > 1 else logits_PV
        if self.features.penalty:
            inside_BT = jnp.arange(T) < rows.length_B[:, None]
            at_BT = jnp.where(inside_BT, rows.tokens_BT, self.model.vocab_size)
            blank_BV = jnp.zeros((B, self.model.vocab_size), bool)
            seen_BV = blank_BV.at[jnp.arange(B)[:, None], at_BT].set(True, mode="drop")
        tokens_BS = jnp.pad(rows.tokens_BT, ((0, 0), (0, self.slots - T)))
        done_B, features = rows.length_B >= rows.end_B, self.features
        kept_BS = None
        if features.drawn and features.random and (features.top_k or features.top_p):
            kept_BS = jnp.zeros(tokens_BS.shape, jnp.int32)
        blank_BS, failed_B = jnp.zeros(tokens_BS.shape), jnp.zeros(done_B.shape, bool)
        made = Made(tokens_BS, blank_BS, kept_BS, rows.length_B, done_B, failed_B)
        return self.put(rows, State(made, seen_BV, cache), logits_BV)

    def read(self, params: dict, rows: Rows) -> tuple[Cache, jax.Array, jax.Array]:
        """Run the first prompt of each group.

        Returns:
          The cache of all rows, and of the P prompts run the logits at their last places [P, V] and their
          features [P, T, D].
        """
        model, dtype = self.merge(params), jnp.dtype(self.compute.dtype)
        tokens_PT, length_P, prefix_P = (x[:: self.group] for x in rows[:3])
        if caches_keys(self.model):
            shape, int8 = (len(tokens_PT), self.slots), self.compute.cache == "int8"
            cache = init_cache(self.model, self.target, *shape, dtype, int8=int8)
        else:
            cache = TokenCache(jnp.zeros((len(tokens_PT), self.slots), jnp.int32))
        x_PTD, cache = model.decode(
            tokens_PT, None, constrain_cache(cache), prefix_P, **rows.adapters(self.group)
        )
        last_P11 = jnp.maximum(length_P - 1, 0)[:, None, None]
        logits_PV = model.logits(jnp.take_along_axis(x_PTD, last_P11, axis=1)[:, 0])
        if self.group > 1:
            axis = cache_axes(cache).index("batch")
            cache = jax.tree.map(lambda x: jnp.repeat(x, self.group, axis), cache)
        return constrain_cache(cache), logits_PV, x_PTD

    def allowed(self, tokens_BS: jax.Array, length_B: jax.Array, controls: Controls) -> jax.Array | None:
        """Where a token completes no n-gram that its row must not repeat [B, V]; None where all may come."""
        if controls.ngram_B is None:
            return None
        size = self.model.vocab_size
        return ~repeats(tokens_BS, length_B, controls.ngram_B, self.features.ngram, size)

    def put(self, rows: Rows, state: State, logits_BV: jax.Array) -> State:
        """Choose the next token of the rows that are not done and write it down."""
        made, seen_BV, logits_BV = as_batch(state.made), state.seen_BV, by_rows(logits_BV)
        allowed_BV = self.allowed(made.tokens_BS, made.length_B, rows.controls)
        if rows.allowed_BV is not None:
            allowed_BV = rows.allowed_BV if allowed_BV is None else rows.allowed_BV & allowed_BV
        how = (rows.controls, self.features, self.vocab, allowed_BV)
        counts_BV = None
        if self.features.counted:
            place = (rows.length_B, made.length_B, self.model.vocab_size)
            counts_BV = count(made.tokens_BS, *place)
        chosen = choose(logits_BV, seen_BV, made.length_B, *how, counts_BV)
        chosen = as_batch(chosen)
        made = made.put(chosen, rows.end_B, rows.stop_BN)
        if seen_BV is not None:
            seen_BV = seen_BV.at[jnp.arange(len(chosen.ids_B)), chosen.ids_B].set(True)
        return State(as_batch(made), seen_BV, state.cache)

    def run(self, params: dict, rows: Rows, state: State, steps: jax.Array | int) -> State:
        """Decode until every row is done, `steps` tokens at most."""
        model = self.merge(params)

        def going(carry: tuple[jax.Array, State]) -> jax.Array:
            return (carry[0] < steps) & ~jnp.all(carry[1].made.done_B)

        def step(carry: tuple[jax.Array, State]) -> tuple[jax.Array, State]:
            i, state = carry
            last_B = state.made.length_B - 1
            token_B1 = jnp.take_along_axis(state.made.tokens_BS, last_B[:, None], axis=1)
            x_BTD, cache = model.decode(token_B1, last_B, state.cache, **rows.adapters())
            state = State(state.made, state.seen_BV, constrain_cache(cache))
            return i + 1, self.put(rows, state, model.logits(x_BTD[:, 0]))

        return jax.lax.while_loop(going, step, (jnp.int32(0), state))[1]


def by_rows(logits_BV: jax.Array) -> jax.Array:
    """Logits with whole rows on a device: sent once, instead of a sum for each of the searches in them.

    They are first made where the projection lies, or the devices would send each other its parts. Rows
    are spread over all devices where these divide them.
    """
    return constrain(constrain(logits_BV, "batch", "vocab"), _spread(len(logits_BV)), "features")


def _spread(rows: int) -> str:
    """The axis of rows over as many devices as these divide."""
    mesh = jax.sharding.get_abstract_mesh()
    return "batch" if mesh.empty or rows % mesh.size else "rows"


def likeliest(x_BV: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The largest entries of each row laid out `by_rows`, and their ids: [B, count] each.

    Every device searches its own rows; a compiler would bring all of them to all devices.
    """
    search = partial(jax.lax.top_k, k=count)
    if jax.sharding.get_abstract_mesh().empty:
        return tuple(search(x_BV))
    rows = spec((_spread(len(x_BV)), "features"))
    return jax.shard_map(search, in_specs=rows, out_specs=[rows, rows], check_vma=False)(x_BV)


def per_prompt(function: Callable[..., T]) -> Callable[..., T]:
    """A function of common scalars and of arrays of rows, or of the prompts that these belong to, run where
    each prompt's rows are: nothing crosses devices.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return function
    batch = spec(("batch",))

    def run(common: Any, *arrays: Any) -> T:
        specs = (P(), *[batch] * len(arrays))
        return jax.shard_map(function, in_specs=specs, out_specs=batch, check_vma=False)(common, *arrays)

    return run


def as_batch(tree: Any) -> Any:
    """Arrays of rows laid out as a batch, so that what is spread further stays in `choose`."""
    return jax.tree.map(lambda x: constrain(x, "batch"), tree)


def everywhere(made: T) -> T:
    """Results whole on every device, so that each process of a cluster can read them."""
    if jax.sharding.get_abstract_mesh().empty:
        return made
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, P()), made)


def decoder(model: Model, compute: Compute, target: Target) -> tuple[nnx.GraphDef, nnx.State]:
    """The model without arrays as decoding runs it: on a CPU layers apart, elsewhere stacked."""
    return abstract_model(model, compute, target, scanned=not unstacks(model, target))


@partial(jax.jit, static_argnums=0)
def generate(program: Program, params: dict, rows: Rows) -> Made:
    """Prefill and decode until every row is done, as one program."""
    state = program.prefill(params, rows)
    return everywhere(program.run(params, rows, state, program.slots).made)


@partial(jax.jit, static_argnums=0)
def prefill(program: Program, params: dict, rows: Rows) -> tuple[State, Made]:
    """The state after the first token, and what to show of it."""
    state = program.prefill(params, rows)
    return state, everywhere(state.made)


@partial(jax.jit, static_argnums=0, donate_argnums=3)
def decode(program: Program, params: dict, rows: Rows, state: State, steps: jax.Array) -> tuple[State, Made]:
    """Up to `steps` more tokens per row. The state's memory is reused: do not touch it again."""
    state = program.run(params, rows, state, steps)
    return state, everywhere(state.made)


def lays_out_by_output(model: Model, target: Target) -> bool:
    """Whether decoding can read weights `ByOutput`: a GPT on one CPU device."""
    mesh = jax.sharding.get_abstract_mesh()
    return isinstance(model, GPT) and unstacks(model, target) and (mesh.empty or mesh.size == 1)


def require_by_output(model: Model, target: Target) -> None:
    """Refuse weights by output where no product reads them."""
    require(
        lays_out_by_output(model, target),
        f"weights by_output and int8 are for a GPT on one CPU device, not a {type(model).__name__} on this "
        f"mesh of {target.device_kind}; leave them 'own' (`jaxgpt quantize` makes a run for any device).",
    )


@partial(jax.jit, static_argnums=(0, 1, 2, 4))
def prepare(model: Model, compute: Compute, target: Target, params: dict, weights: Weights = "own") -> dict:
    """Training parameters in the form decoding wants: see `decoder`, and weights in the compute type.

    The cast changes no result, since every product casts its weight anyway; it is done once here
    instead of at every token. Norms and biases stay float32.

    Args:
      model, compute, target: of the generator.
      params: in the training form.
      weights: other than `own` lay those of products and tables out `ByOutput`, where `lays_out_by_output`
        says that they can be read.
    """
    _, abstract = decoder(model, compute, target)
    about = {path: v.get_metadata() for path, v in nnx.to_flat_state(abstract)}
    by_outputs = weights != "own"

    def one(path: tuple[Any, ...], p: Any) -> Any:
        facts = about[path]
        dtype = jnp.dtype(facts.get("read_in", compute.dtype))  # a router is read in float32
        own: Weights = "by_output" if "router" in path else weights
        relaid = by_outputs and facts["role"] == "matrix" and not facts.get("lead", 0)
        if isinstance(p, Quantized):
            return p.by_output(facts["inputs"], dtype, own) if relaid else p
        if not isinstance(p, jax.Array):
            # The base of a weight of another kind is read like one, but where it decides a norm (DoRA).
            plain = hasattr(p, "base") and getattr(p, "magnitude", None) is None
            return replace(p, base=one(path, p.base)) if plain else p
        if relaid:
            return by_output(p, facts["inputs"], dtype, own)
        if by_outputs and facts["role"] == "embedding":
            return from_rows(p, dtype, own)
        return constrain(p.astype(dtype) if facts["role"] in CAST else p, *facts["axes"])

    more = {}
    if "added" in params:
        whole: Any = backbone(assemble(abstract_model(model, compute, target)[0], params))
        more["added"] = whole.settled() if hasattr(whole, "settled") else whole.added
    params = {name: part for name, part in params.items() if name != "added"}
    if unstacks(model, target):
        params = decoding_params(model, params)
    return unflatten({path: one(path, p) for path, p in flatten(params).items()}) | more
