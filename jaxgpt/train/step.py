"""One training step and one evaluation step: pure functions, jitted and donated by the loop.

Shapes: B batch, A microbatches, T length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxgpt.batch import Batch
from jaxgpt.config import Full, Run
from jaxgpt.errors import require
from jaxgpt.objectives import Mean, Metrics, Objective, TwoPass, add, before, means
from jaxgpt.objectives.measures.base import live_parameters
from jaxgpt.optim import join
from jaxgpt.sharding import batch_sharding, replicated
from jaxgpt.train.noise import SQUARE
from jaxgpt.train.reference import frozen_reference
from jaxgpt.train.state import Program, State


def train_step(
    program: Program,
    objective: Objective,
    accumulate: int,
    seed: int,
    state: State,
    batch: Batch,
    base: Any = None,
    teacher: Any = None,
) -> tuple[State, Metrics]:
    """One update from a batch.

    The loss is the total over all devices and microbatches divided by the total weight: accumulation
    equals the full batch, but that experts are balanced over each microbatch for itself. An update
    whose loss or gradient norm is not finite is skipped: parameters and optimizer stay as they were,
    and a memory is emptied. Where not all of the model is trained, `base` is the rest of it; `teacher` holds
    the parameters of the model that is distilled.

    Returns:
      The next state, and scalars: `loss` and `nll` (nats per target), `grad_norm`, `accuracy`,
      `weight`, `bytes` (sums), `bad_steps`, the model's `Features.stats` and the objective's own figures.
    """
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    batch = replace(batch, memory=state.memory)

    learned, frozen = program.split(state.params)
    if program.refers:
        objective = before(objective, frozen_reference(program.graphdef, base))
    objective = _settled(objective, lambda: program.model(state.params, base), batch, accumulate)

    def loss_sum(learned: dict, part: Batch, key: jax.Array) -> tuple[jax.Array, tuple[Metrics, Any]]:
        dropping = None if key is None else jax.random.fold_in(key, 1)
        sums = objective(program.model(join(learned, frozen), base, dropping, teacher), part, key)
        return sums.loss, (sums.metrics | {"loss": sums.loss, "weight": sums.weight}, sums.memory)

    live = live_parameters(state.opt, learned)

    def gradients(part: Batch, key: jax.Array) -> tuple[tuple[Metrics, dict], Any]:
        (_, (sums, memory)), grads = jax.value_and_grad(loss_sum, has_aux=True)(live, part, key)
        if program.noise:
            mean = optax.tree.norm(grads) / jnp.maximum(sums["weight"], 1e-9)
            sums = sums | {SQUARE: Mean(jnp.square(mean), jnp.ones(()))}
        return (sums, grads), memory

    (sums, grads), memory = _accumulate(gradients, batch, key, accumulate)
    # A batch without weight (all rows masked) gives zero gradients, not NaN.
    weight = jnp.maximum(sums["weight"], 1e-9)
    with jax.named_scope("optimizer"):
        grads = jax.tree.map(lambda g: g / weight, grads)
        grad_norm = optax.tree.norm(grads)
        good = jnp.isfinite(sums["loss"]) & jnp.isfinite(grad_norm)
        # Pinned: the old moments are then dead before the parameters change, and need no copy.
        updates, opt = program.target.pin(program.optimizer.update(grads, state.opt, learned))
        new, opt = jax.tree.map(
            lambda new, old: jnp.where(good, new, old),
            (optax.apply_updates(learned, updates), opt),
            (learned, state.opt),
        )
    # The old memory does not end where the next batch begins, so after a bad step there is none.
    memory = jax.tree.map(lambda new: jnp.where(good, new, 0).astype(new.dtype), memory)
    bad_steps = jnp.where(good, 0, state.bad_steps + 1)
    metrics = {
        "loss": sums["loss"] / weight,
        "nll": sums["nll"] / weight,
        **means(sums, weight),
        "weight": sums["weight"],
        "bytes": sums["bytes"],
        "grad_norm": grad_norm,
        "bad_steps": bad_steps,
    }
    return State(state.step + 1, bad_steps, join(new, frozen), opt, memory), metrics


def jit_train_step(run: Run, program: Program, objective: Objective) -> Any:
    """`train_step` as the loop runs it: the state donated, everything in its layout."""
    return jax.jit(
        partial(train_step, program, objective, run.train.accumulate, run.train.seed),
        donate_argnums=0,
        out_shardings=(program.shardings, replicated(program.mesh)),
    )


def jit_eval_step(run: Run, program: Program, objective: Objective) -> Any:
    """`eval_step` as the loop runs it, over what is saved and the frozen base."""
    rows = batch_sharding(program.mesh)

    def step(params: dict, batch: Batch, base: Any = None) -> tuple[Metrics, Any]:
        refer = partial(before, change=frozen_reference(program.graphdef, base))
        own = refer(objective) if program.refers else objective
        return eval_step(lambda: program.model(params, base), own, run.train.accumulate, batch)

    # The memory goes in again as it came out.
    out = (replicated(program.mesh), rows)
    if isinstance(run.tune, Full):
        return jax.jit(step, in_shardings=(program.shardings.params, rows), out_shardings=out)
    return jax.jit(step, out_shardings=out)


def _accumulate(function: Any, batch: Batch, key: jax.Array | None, parts: int) -> Any:
    """Sums of what `function(batch, key)` gives over microbatches in turn, and the memories of all rows.

    Args:
      function: gives a tree of sums, and the memory of a recurrent model (or None).
      batch: all rows.
      key: split between the microbatches; None for none.
      parts: how many.
    """
    if parts == 1:
        return function(batch, key)
    # Microbatch i takes every parts-th row, so that each stays spread over all devices.
    split = jax.tree.map(lambda a: a.reshape(-1, parts, *a.shape[1:]).swapaxes(0, 1), batch)
    given = split, None if key is None else jax.random.split(key, parts)
    shapes, _ = jax.eval_shape(function, *jax.tree.map(lambda a: a[0], given))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def body(total: Any, part: tuple[Batch, jax.Array | None]) -> tuple[Any, Any]:
        sums, memory = function(*part)
        return add(total, sums), memory

    sums, memory = jax.lax.scan(body, zeros, given)
    return sums, jax.tree.map(lambda a: a.swapaxes(0, 1).reshape(-1, *a.shape[2:]), memory)


def _settled(objective: Objective, model: Callable[[], Any], batch: Batch, accumulate: int) -> Objective:
    """The objective, once what it needs of the whole step first is known."""
    if not isinstance(objective, TwoPass):
        return objective
    statistics = objective.statistics
    sums, _ = _accumulate(lambda part, _: (statistics(model(), part), None), batch, None, accumulate)
    return objective.given(jax.lax.stop_gradient(sums))


def eval_step(
    model: Callable[[], Any], objective: Objective, accumulate: int, batch: Batch
) -> tuple[Metrics, Any]:
    """Sums over one validation batch, `nll`, `weight`, `correct`, `bytes` and what else there is; and the
    model's memory.

    As training it goes through `accumulate` microbatches in turn, and so needs no more memory. `model` makes
    the model anew for each.
    """
    objective = _settled(objective, model, batch, accumulate)

    def one(part: Batch, _: None) -> tuple[Metrics, Any]:
        sums = objective(model(), part, None)
        return sums.metrics | {"weight": sums.weight}, sums.memory

    return _accumulate(one, batch, None, accumulate)


def evaluation_sums(
    step: Callable[..., tuple[Metrics, Any]],
    params: dict,
    batches: Iterable[Batch],
    memory: Any,
    base: Any = None,
) -> list[Metrics]:
    """What an `eval_step` returns of each batch in turn, a recurrent model's memory carried along.

    Args:
      step: called as (params, batch, base), or without a base.
      params, base: what is trained, and the rest.
      batches: of one source.
      memory: empty.

    Raises:
      UserError: there are no batches.
    """
    sums = []
    for batch in batches:
        part, memory = step(params, replace(batch, memory=memory), *([] if base is None else [base]))
        sums.append(part)
    require(bool(sums), "the validation data hold no batch; add data.")
    return sums


def loss_means(sums: Sequence[Metrics]) -> dict[str, float]:
    """Means of `eval_step`s: `loss` (nats per target), `accuracy`, the objective's own figures, `targets`;
    for text `bits_per_byte`.
    """
    total = jax.tree.map(lambda *parts: float(sum(map(float, parts))), *sums)
    weight = max(total["weight"], 1e-9)
    found = {"loss": total["nll"] / weight, **means(total, weight)}
    if total["bytes"]:
        found["bits_per_byte"] = total["nll"] / math.log(2) / total["bytes"]
    return found | {"targets": total["weight"]}
