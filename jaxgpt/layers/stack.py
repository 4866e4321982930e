"""A stack of equal layers: one module whose parameters carry a leading layer axis, or a list.

Training scans over the stacked form; decoding runs the unstacked one, since a scan over a stacked
key-value cache copies it at every step.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxgpt.config import Compute
from jaxgpt.target import Target

REMAT: dict[str, Callable[..., bool] | None] = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def stacked(make: Callable[[jax.Array], nnx.Module], key: jax.Array, layers: int) -> nnx.Module:
    """One module made with `layers` keys at once; every parameter gets the axis `layers` in front."""
    keys = jax.random.split(key, layers)
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: make(keys[0])))
    arrays = jax.vmap(lambda k: nnx.to_pure_dict(nnx.split(make(k))[1]))(keys)
    nnx.replace_by_pure_dict(abstract, arrays)
    for _, variable in nnx.to_flat_state(abstract):
        variable.set_metadata(axes=("layers", *variable.get_metadata()["axes"]))
    return nnx.merge(graphdef, abstract)


def scan_layers(
    block: nnx.Module,
    x_BTD: jax.Array,
    per_layer: Any,
    call: Callable[[Any, jax.Array, Any], tuple[jax.Array, Any]],
    compute: Compute,
    target: Target,
) -> tuple[jax.Array, Any]:
    """Run `x, extra = call(layer, x, per_layer[i])` through the stacked layers.

    Args:
      block: from `stacked`.
      x_BTD: [B, T, D].
      per_layer: a pytree with a leading layer axis (keys, windows): what differs by layer.
      call: applies one layer.
      compute: gives the remat policy and how far the scan is unrolled.
      target: as far as the config does not say the latter.

    Returns:
      The last x, and the extras of all layers with a leading layer axis.
    """
    graphdef, params = nnx.split(block)
    layers = jax.tree.leaves(params)[0].shape[0]

    def body(x: jax.Array, layer: tuple[Any, Any]) -> tuple[jax.Array, Any]:
        return call(nnx.merge(graphdef, layer[0]), x, layer[1])

    unroll = target.layers_unrolled(compute, layers)
    if compute.remat != "none":
        # Between unrolled layers the compiler would find what is computed again, and keep the first.
        body = jax.checkpoint(body, policy=REMAT[compute.remat], prevent_cse=unroll > 1)
    return jax.lax.scan(body, x_BTD, (params, per_layer), unroll=unroll)


def run_layers(
    blocks: Any,
    x_BTD: jax.Array,
    per_layer: Any,
    call: Callable[..., Any],
    compute: Compute,
    target: Target,
) -> tuple[jax.Array, Any]:
    """`scan_layers`, also over layers that are apart (an `nnx.List`)."""
    if not isinstance(blocks, nnx.List):
        return scan_layers(blocks, x_BTD, per_layer, call, compute, target)
    extras = []
    for i, block in enumerate(blocks):
        x_BTD, extra = call(block, x_BTD, jax.tree.map(operator.itemgetter(i), per_layer))
        extras.append(extra)
    return x_BTD, jax.tree.map(lambda *parts: jnp.stack(parts), *extras)


def unstack(params: dict, layers: int) -> dict:
    """Parameters with a leading layer axis as a dict from layer number to one layer's parameters."""
    return {i: jax.tree.map(operator.itemgetter(i), params) for i in range(layers)}
