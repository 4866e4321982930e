"""What a model computes for texts: logits, hidden states, attention maps and embeddings of texts.

Shapes: B rows, T tokens per row, D hidden size, V vocabulary, H heads, L layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxgpt.batch import Batch
from jaxgpt.config import Compute, Headed, Model
from jaxgpt.errors import NotFinite, UserError, require
from jaxgpt.evals.loss import fetch_behind
from jaxgpt.evals.scoring import progress
from jaxgpt.layers.tape import Tape, recording
from jaxgpt.models import abstract_model, assemble, context_of
from jaxgpt.sample.encode import Pooling, pooled
from jaxgpt.sample.load import Trained
from jaxgpt.sample.program import bucket
from jaxgpt.sharding import row_shards, spec
from jaxgpt.target import Target

MOST_BYTES = 2**28
"""Of results that are on the device at a time, unless one row has more."""


class Wanted(NamedTuple):
    """What to return of a forward pass.

    Attributes:
      logits: [T, V] of each text.
      states: numbers of hidden states: 0 is the embedding, i the output of layer i; the last is after the
        final norm, as what the head reads.
      maps: layers, counted from 0, whose attention probabilities are returned.
      pooling: how the last hidden states of a text become one vector; empty for none.
    """

    logits: bool = False
    states: tuple[int, ...] = ()
    maps: tuple[int, ...] = ()
    pooling: Pooling | Literal[""] = ""


def observe(
    trained: Trained, rows: Sequence[Sequence[int]], wanted: Wanted, about: str = ""
) -> list[dict[str, Any]]:
    """What is wanted of every row, as float32 numpy arrays without padding.

    Args:
      trained: the run.
      rows: token ids of one text each.
      wanted: what to return.
      about: what the progress line says; nothing for none.

    Returns:
      For each row `logits` [T, V], `hidden` {number: [T, D]}, `attention` [L, H, T, T], `embedding` [D], as
      far as they are wanted.

    Raises:
      UserError: a row that is empty or longer than the context; attention of a model that has none.
      NotFinite: something in the result is NaN or infinite.
    """
    context = context_of(trained.run.model, trained.params)
    for i, row in enumerate(rows):
        require(len(row) > 0, f"text {i} has no token; give at least one character.")
        require(
            len(row) <= context,
            f"text {i} has {len(row)} tokens but the model's context is {context}; split it.",
        )
    found: list[Any] = [None] * len(rows)
    parts = list(_parts(trained, rows, wanted))
    running = (_dispatch(trained, [rows[i] for i in part], T, wanted) for part, T in progress(parts, about))
    for (part, _), arrays in zip(parts, fetch_behind(running), strict=True):
        for place, i in enumerate(part):
            found[i] = _cut(arrays, place, len(rows[i]))
    return found


def _parts(
    trained: Trained, rows: Sequence[Sequence[int]], wanted: Wanted
) -> Iterator[tuple[list[int], int]]:
    """Numbers of the rows of each batch, and its length T; rows of one batch have similar lengths."""
    model, shards = trained.run.model, row_shards(trained.mesh)
    context = context_of(model, trained.params)
    by_length: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        by_length.setdefault(bucket(len(row), context), []).append(i)
    for T, members in sorted(by_length.items()):
        numbers = T * (model.vocab_size * wanted.logits + model.width * (len(wanted.states) + 1))
        numbers += len(wanted.maps) * model.heads * T * T
        most = max(shards, min(64, MOST_BYTES // (4 * numbers)))
        most -= most % shards
        for start in range(0, len(members), most):
            yield members[start : start + most], T


def _dispatch(trained: Trained, rows: Sequence[Sequence[int]], T: int, wanted: Wanted) -> Any:
    """The program's results for a batch, perhaps still being computed."""
    run, mesh = trained.run, trained.mesh
    B = 1 << (len(rows) - 1).bit_length()
    B += -B % row_shards(mesh)
    tokens_BT, segments_BT = np.zeros((2, B, T), np.int32)
    for i, row in enumerate(rows):
        tokens_BT[i, : len(row)], segments_BT[i, : len(row)] = row, 1
    positions_BT = np.tile(np.arange(T, dtype=np.int32), (B, 1))
    # Weights on all targets: to a prefix LM no token is prompt, and it reads from left to right.
    columns: Any = (tokens_BT, tokens_BT, segments_BT.astype(np.float32), segments_BT, positions_BT)
    layout = NamedSharding(mesh, spec(("batch",)))
    compute = replace(run.compute, remat="none")
    with jax.set_mesh(mesh):
        batch = jax.device_put(Batch(*columns), layout)
        return _observe(run.model, compute, Target.of(mesh), wanted, trained.params, batch)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _observe(
    model: Model, compute: Compute, target: Target, wanted: Wanted, params: dict, batch: Batch
) -> dict[str, Any]:
    module: Any = assemble(abstract_model(model, compute, target)[0], params)
    if isinstance(model, Headed):
        module = module.backbone
    inner = tuple(i for i in wanted.states if i != model.layers)
    if inner or wanted.maps:
        with recording(Tape(inner, wanted.maps)) as seen:
            x_BTD = module.hidden(batch).x_BTD
        states, maps = seen.hidden_BTD, seen.attention_BHTS
        missing = [*(i for i in inner if i not in states), *(i for i in wanted.maps if i not in maps)]
        if missing:
            what = "attention maps" if maps.keys() != set(wanted.maps) else "hidden states of its layers"
            raise UserError(
                f"a {type(model).__name__} has no {what}: its module does not compute them by "
                f"{'layers.kernels.attend' if 'maps' in what else 'layers.stack.run_layers'}."
            )
    else:
        x_BTD, states, maps = module.hidden(batch).x_BTD, {}, {}
    made: dict[str, Any] = {}
    if wanted.logits:
        made["logits"] = module.logits(x_BTD)
    if wanted.states:
        made["hidden"] = {i: states.get(i, x_BTD) for i in wanted.states}
    if wanted.maps:
        made["attention"] = jnp.stack([maps[i] for i in wanted.maps], axis=1)
    if wanted.pooling:
        made["embedding"] = pooled(x_BTD.astype(jnp.float32), batch.segments_BT, wanted.pooling)
    made = jax.tree.map(lambda x: x.astype(jnp.float32), made)
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, P()), made)


_LENGTHS = {"logits": 1, "hidden": 1, "attention": 2, "embedding": 0}
"""How many axes of tokens, after those of layers and heads, a result has."""


def _cut(arrays: dict[str, Any], row: int, length: int) -> dict[str, Any]:
    """One row's results without its padding, in memory of their own."""

    def one(x: np.ndarray, axes: int, before: int) -> np.ndarray:
        part = x[row][(slice(None),) * before + (slice(length),) * axes].copy()
        if not np.isfinite(part).all():
            raise NotFinite("what the model computes for a text is")
        return part

    return {
        name: jax.tree.map(lambda x, n=name: one(x, _LENGTHS[n], 2 * (n == "attention")), value)
        for name, value in arrays.items()
    }
