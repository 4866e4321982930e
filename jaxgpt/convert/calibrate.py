"""What the linear layers of a model read on a text: sums over their inputs, by which weights are rounded.

Shapes: L layers, R rows, T tokens of a row, N tokens of a layer's inputs, I inputs of a layer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jaxgpt.batch import Batch
from jaxgpt.config import Compute
from jaxgpt.layers.linear import contract
from jaxgpt.layers.tape import Tape, recording
from jaxgpt.models import abstract_model, assemble
from jaxgpt.sample.load import Trained
from jaxgpt.sharding import row_shards, spec
from jaxgpt.target import Target
from jaxgpt.tune.base import Path, flatten, unflatten

Inputs = dict[str, jax.Array]
"""Of a layer's inputs: `products` [I, I], the sum over tokens of x x^T; `sizes` [I], that of |x|; `peaks`
[I], the largest |x|."""
SUMS: dict[str, tuple[Callable[[jax.Array], jax.Array], Callable[..., jax.Array]]] = {
    "products": (lambda x_NI: x_NI.T @ x_NI, jnp.add),
    "sizes": (lambda x_NI: jnp.abs(x_NI).sum(0), jnp.add),
    "peaks": (lambda x_NI: jnp.abs(x_NI).max(0), jnp.maximum),
}
"""For each name: what is computed of a batch's inputs, and how two such are joined."""
ROWS = 4
"""Rows of a forward pass, more on a mesh."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Watched:
    """A weight that shows what it is multiplied by, while a program is traced."""

    weight: jax.Array
    see: Callable[[jax.Array], None] = field(metadata={"static": True})

    def product(
        self, x: jax.Array, axes: int, dtype: jnp.dtype, target: Target, ids: jax.Array | None = None
    ) -> jax.Array:
        """`layers.linear.contract` with this weight."""
        self.see(x.reshape(*x.shape[: x.ndim - axes], -1))
        return contract(x, self.weight, axes, dtype, target)


def rows_of(texts: Iterable[np.ndarray], length: int, most: int) -> np.ndarray:
    """The first tokens of texts, one after the other, as rows [R, T] of at most `length` tokens and no
    padding.
    """
    ids_N, wanted = np.zeros(0, np.int32), most * length
    for ids in texts:
        ids_N = np.concatenate([ids_N, ids])
        if len(ids_N) >= wanted:
            break
    T = max(1, min(length, len(ids_N)))
    return ids_N[: len(ids_N) // T * T].reshape(-1, T)[:most]


def observe(
    trained: Trained, params: dict, places: Iterable[Path], rows_RT: np.ndarray, names: tuple[str, ...],
    span: tuple[int, int],
) -> dict[Path, list[Inputs]]:  # fmt: skip
    """Sums over the inputs of these weights, in each of the layers of a span.

    Weights that are used once stand at layer 0; those in loops of their own (experts) are not seen.

    Args:
      trained: the run.
      params: its parameters, all of them arrays.
      places: paths of the weights.
      rows_RT: what is read.
      names: which sums (see `Inputs`).
      span: the first layer and that after the last.
    """
    B = max(ROWS, row_shards(trained.mesh))
    layout = NamedSharding(trained.mesh, spec(("batch",)))
    sums = functools.partial(_sums, trained.run.model, Target.of(trained.mesh), tuple(places), names, span)
    add = jax.jit(lambda total, *batch: _joined(total, sums(*batch)), donate_argnums=0)
    with jax.set_mesh(trained.mesh):
        shapes = jax.eval_shape(sums, params, jnp.zeros((B, rows_RT.shape[1]), jnp.int32))
        total = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        for part_BT in _parts(rows_RT, B):
            total = add(total, params, jax.device_put(part_BT, layout))
    return total


def _parts(rows_RT: np.ndarray, B: int) -> Iterator[np.ndarray]:
    """Batches of B rows; the first rows again fill the last one."""
    for start in range(0, len(rows_RT), B):
        yield np.take(rows_RT, range(start, start + B), axis=0, mode="wrap")


def _sums(
    model: Any, target: Target, places: tuple[Path, ...], names: tuple[str, ...], span: tuple[int, int],
    params: dict, tokens_BT: jax.Array,
) -> dict[Path, list[Inputs]]:  # fmt: skip
    """`observe` of one batch."""
    seen: dict[Path, list[jax.Array]] = {path: [] for path in places}
    flat = flatten(params)
    for path, inputs in seen.items():
        flat[path] = Watched(flat[path], inputs.append)
    compute = Compute(dtype="float32", attention="xla")
    module: Any = assemble(abstract_model(model, compute, target)[0], unflatten(flat))
    ones_BT = jnp.ones_like(tokens_BT)
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    weights_BT = ones_BT.astype(jnp.float32)
    with recording(Tape()):  # layers then run one after the other
        module.hidden(Batch(tokens_BT, tokens_BT, weights_BT, ones_BT, positions_BT))
    first, last = span
    return {path: [_of(x, names) for x in inputs[first:last]] for path, inputs in seen.items() if inputs}


def _of(x: jax.Array, names: tuple[str, ...]) -> Inputs:
    x_NI = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    return {name: SUMS[name][0](x_NI) for name in names}


def _joined(total: dict[Path, list[Inputs]], more: dict[Path, list[Inputs]]) -> dict[Path, list[Inputs]]:
    return {
        path: [
            {name: SUMS[name][1](old[name], new[name]) for name in old}
            for old, new in zip(total[path], more[path], strict=True)
        ]
        for path in total
    }
