"""How much earlier data depend on each parameter: the diagonal Fisher information that EWC weights by.

Shapes: B rows (one for each device that rows are spread over), T tokens per row.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from jaxgpt.alive import alive
from jaxgpt.batch import Batch
from jaxgpt.config import EWC, CausalLM, Classification, MaskedLM, Run, load_run
from jaxgpt.data.loader import TrainIterator, train_iterator
from jaxgpt.errors import require
from jaxgpt.models import backbone
from jaxgpt.objectives import make_objective
from jaxgpt.objectives.measures.penalty import with_importance
from jaxgpt.optim import join
from jaxgpt.sharding import batch_sharding, place_rows, process_rows, row_shards
from jaxgpt.text.tokenizer import Tokenizer
from jaxgpt.text.vocabulary import Vocabulary
from jaxgpt.train.state import Program, State

log = logging.getLogger(__name__)


def remember(run: Run, program: Program, state: State, base: dict | None, tokenizer: Tokenizer) -> State:
    """A state before its first step, with what EWC needs; as it is where a run has no EWC.

    Args:
      run, program: of the state.
      state: fresh.
      base: what of the model is not trained.
      tokenizer: of this run's data and the earlier ones'.

    Raises:
      UserError: a run that it names has data or labels that this one's model cannot be scored on.
    """
    for config in run.measures:
        if not isinstance(config, EWC):
            continue
        held = [
            _fisher(run, name, program, state, base, tokenizer, config.rows) for name in _names(run, config)
        ]
        state = replace(state, opt=with_importance(state.opt, jax.tree.map(lambda *parts: sum(parts), *held)))
    return state


def _names(run: Run, config: EWC) -> tuple[str, ...]:
    return config.runs or (run.init_from,)


def _fisher(
    run: Run, name: str, program: Program, state: State, base: dict | None, tokenizer: Tokenizer, rows: int
) -> Any:
    """The diagonal for one target of an earlier run's training data, from `rows` of its rows: the sum of the
    squared gradients of each row's loss, over the number of targets.
    """
    old = load_run(name)
    _require_scored(run, old, name)
    size, layout = row_shards(program.mesh), batch_sharding(program.mesh)
    part = process_rows(layout, size)
    shape = {"model_length": min(old.row, run.row), "batch_size": size, "task": old.task, "part": part}
    data = train_iterator(old.data, tokenizer, seed=old.train.seed, **shape)
    count = -(-min(rows or data.epoch_rows, data.epoch_rows) // size)
    objective = make_objective(old.objective, Vocabulary.of(tokenizer))
    learned, frozen = program.split(state.params)

    def squares(learned: Any, frozen: Any, base: Any, batch: Batch) -> tuple[Any, jax.Array]:
        def loss(learned: Any, row: jax.Array) -> tuple[jax.Array, jax.Array]:
            mine = (jnp.arange(size) == row)[:, None]
            weights_BT, segments_BT = mine * batch.weights_BT, mine * batch.segments_BT
            model = program.model(join(learned, frozen), base)
            model = model if old.headed else backbone(model)
            sums = objective(model, replace(batch, weights_BT=weights_BT, segments_BT=segments_BT), None)
            return sums.loss, sums.weight

        def add(total: Any, row: jax.Array) -> tuple[Any, jax.Array]:
            grads, weight = jax.grad(loss, has_aux=True)(learned, row)
            return jax.tree.map(lambda t, g: t + jnp.square(g), total, grads), weight

        # One row at a time, of which each device computes its part: squares of sums are no sums of squares.
        total, weights = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, learned), jnp.arange(size))
        return total, jnp.sum(weights)

    layouts = program.split(program.shardings.params)[0]
    step = jax.jit(squares, out_shardings=(layouts, None))
    add = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b), donate_argnums=0)
    found: Any = None
    try:
        with alive(f"measuring what the data of {name} depend on"), jax.set_mesh(program.mesh):
            for _ in range(count):
                more = step(learned, frozen, base, _placed(data, layout, size, part))
                found = more if found is None else add(found, more)
            scale = jax.jit(lambda total, weight: jax.tree.map(lambda t: t / jnp.maximum(weight, 1.0), total))
            log.info("EWC: the Fisher information of %d rows of %s", count * size, name)
            return scale(*found)
    finally:
        data.close()


def _placed(data: TrainIterator, layout: Any, size: int, part: Any) -> Batch:
    batch = next(data)
    if jax.process_count() == 1:
        return jax.device_put(batch, layout)
    return jax.tree.map(lambda a: place_rows(layout, size, part, a), batch)


def _require_scored(run: Run, old: Run, name: str) -> None:
    kinds = CausalLM, MaskedLM, Classification
    require(
        isinstance(old.objective, kinds),
        f"measures has EWC over the run {name!r}, whose objective is {type(old.objective).__name__}(); it is "
        f"measured for one of {', '.join(kind.__name__ + '()' for kind in kinds)}: name another run, or use "
        "L2SP.",
    )
    require(
        old.headed is None or old.headed == run.headed,
        f"measures has EWC over the run {name!r}, whose head is not this model's; name a run with the same "
        "labels, or one without a head.",
    )
