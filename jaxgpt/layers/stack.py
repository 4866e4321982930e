"""A stack of equal layers: one module whose parameters carry a leading layer axis, or a list.

Training scans over the stacked form, one period of layers per iteration. On a CPU, decoding runs the
unstacked form, because a scan over a stacked key-value cache copies it at every step there.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxgpt.config import Compute
from jaxgpt.layers.tape import tape
from jaxgpt.target import Target

Call = Callable[[Any, jax.Array, Any, Any, int], tuple[jax.Array, Any]]
"""`x, extra = call(layer, x, rows, own, place)`; see `run_layers`."""
REMAT: dict[str, Callable[..., bool] | None] = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    # With several layers per iteration, views of something kept are recomputed, not copied.
    "none": lambda primitive, *_, **__: primitive.name not in ("slice", "squeeze"),
}


def stacked(make: Callable[[jax.Array], nnx.Module], key: jax.Array, layers: int) -> nnx.Module:
    """One module made with `layers` keys at once; every parameter gets a leading axis `layers`."""
    keys = jax.random.split(key, layers)
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: make(keys[0])))
    arrays = jax.vmap(lambda k: nnx.to_pure_dict(nnx.split(make(k))[1]))(keys)
    nnx.replace_by_pure_dict(abstract, arrays)
    for _, variable in nnx.to_flat_state(abstract):
        variable.set_metadata(axes=("layers", *variable.get_metadata()["axes"]))
    return nnx.merge(graphdef, abstract)


@jax.named_scope("layers")
def run_layers(
    blocks: Any,
    x_BTD: jax.Array,
    rows: Any,
    per_layer: Any,
    call: Call,
    compute: Compute,
    target: Target,
    *,
    period: int = 1,
) -> tuple[jax.Array, Any]:
    """Run `x, extra = call(layer, x, rows, per_layer[i], i % period)` through the layers.

    Stacked layers are scanned, `period` of them per iteration, so that what differs in kind within a period
    (a window, which a kernel must know) is a Python number. Leftover layers form a shorter scan. The remat
    policy applies to each layer separately.

    Args:
      blocks: from `stacked`, or an `nnx.List` of layers.
      x_BTD: [B, T, D].
      rows: a pytree of inputs common to all layers.
      per_layer: a pytree with a leading layer axis (keys, frequencies): what differs in value.
      call: applies one layer.
      compute: the remat policy, and how many layers are unrolled per iteration.
      target: decides the latter if the config leaves it unspecified.
      period: number of layers after which their kinds repeat. If it does not divide the layers, the whole
        periods and the rest are two scans, and the backward pass keeps a copy of all layers' parameters.

    Returns:
      The final x, and the extras of all layers with a leading layer axis.
    """
    if isinstance(blocks, nnx.List):
        return _one_by_one(list(blocks), x_BTD, rows, per_layer, call, period)
    graphdef, params = nnx.split(blocks)
    layers = jax.tree.leaves(params)[0].shape[0]
    if tape() is not None:  # a scan could not tell its layers apart
        apart = [nnx.merge(graphdef, jax.tree.map(operator.itemgetter(i), params)) for i in range(layers)]
        return _one_by_one(apart, x_BTD, rows, per_layer, call, period)
    parts, done = [], 0
    for size, turns in ((period, layers // period), (layers % period, 1)):
        if size and turns:
            part = _turns((params, per_layer), done, size, turns)
            unroll = max(1, target.layers_unrolled(compute, layers) // size)
            body = _turn(graphdef, call, compute, size, apart=unroll == 1 < turns)
            step = functools.partial(body, rows)
            x_BTD, extras = jax.lax.scan(step, x_BTD, part, unroll=min(unroll, turns))
            parts.append(extras if size == 1 else jax.tree.map(lambda e: e.reshape(-1, *e.shape[2:]), extras))
            done += size * turns
    return x_BTD, parts[0] if len(parts) == 1 else jax.tree.map(lambda *e: jnp.concatenate(e), *parts)


def _one_by_one(
    blocks: list[Any], x_BTD: jax.Array, rows: Any, per_layer: Any, call: Call, period: int
) -> tuple[jax.Array, Any]:
    """`run_layers` without a scan; an open tape sees every layer."""
    extras, seen = [], tape()
    if seen is not None:
        seen.note_state(x_BTD)
    for i, block in enumerate(blocks):
        own = jax.tree.map(operator.itemgetter(i), per_layer)
        x_BTD, extra = call(block, x_BTD, rows, own, i % period)
        extras.append(extra)
        if seen is not None:
            seen.layers += 1
            seen.note_state(x_BTD)
    return x_BTD, _stack(extras)


def _turns(tree: Any, start: int, size: int, turns: int) -> Any:
    """The layers from `start` on; if `size` > 1, their axis is split into iterations of `size` layers."""

    def one(x_L: jax.Array) -> jax.Array:
        part = x_L if size * turns == len(x_L) else x_L[start : start + size * turns]
        return part if size == 1 else part.reshape(turns, size, *x_L.shape[1:])

    return jax.tree.map(one, tree)


def _turn(graphdef: Any, call: Call, compute: Compute, size: int, *, apart: bool) -> Callable[..., Any]:
    """One iteration of the scan: `size` layers in sequence.

    The backward pass must keep the parameters exactly as the scan receives them. Anything derived from them
    in here, even one layer's slice, would be kept as a copy of all parameters.

    Args:
      apart: whether forward and backward pass are separate loops. Otherwise the compiler would detect what
        remat recomputes, and keep the first result.
    """

    def layer(place: int, x: jax.Array, rows: Any, layers: Any) -> tuple[jax.Array, Any]:
        if size > 1:
            layers = jax.tree.map(lambda a: jax.lax.index_in_dim(a, place, keepdims=False), layers)
        params, own = layers
        return call(nnx.merge(graphdef, params), x, rows, own, place)

    if compute.remat != "none" or size > 1:
        how = {"policy": REMAT[compute.remat], "prevent_cse": not apart, "static_argnums": 0}
        layer = jax.checkpoint(layer, **how)

    def turn(rows: Any, x: jax.Array, layers: Any) -> tuple[jax.Array, Any]:
        extras = []
        for place in range(size):
            x, extra = layer(place, x, rows, layers)
            extras.append(extra)
        return x, extras[0] if size == 1 else _stack(extras)

    return turn


def _stack(entries: list[Any]) -> Any:
    return jax.tree.map(lambda *parts: jnp.stack(parts), *entries)


def unstack(params: dict, layers: int) -> dict:
    """Parameters with a leading layer axis as a dict from layer number to one layer's parameters."""
    return {i: jax.tree.map(operator.itemgetter(i), params) for i in range(layers)}
