"""Layer-wise decay of the learning rate."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jaxgpt.config import LayerDecay
from jaxgpt.objectives.measures.base import Update


def layer_decay(config: LayerDecay, model: nnx.State) -> Update:
    """Updates of layer i of L, counted from 0, times rate^(L - 1 - i); of embeddings times rate^L."""
    about = {path: variable.get_metadata() for path, variable in nnx.to_flat_state(model)}
    shapes = {path: variable.shape for path, variable in nnx.to_flat_state(model)}
    stacked = [path for path, facts in about.items() if facts["axes"] and facts["axes"][0] == "layers"]
    depth = max((shapes[path][0] for path in stacked), default=0)

    def scale(path: Any, update: jax.Array) -> jax.Array:
        place = tuple(getattr(part, "key", part) for part in path)
        if place in stacked:
            factor = config.rate ** (depth - 1 - jnp.arange(depth, dtype=update.dtype))
            return update * factor.reshape(-1, *[1] * (update.ndim - 1))
        if about[place]["role"] in ("embedding", "position") and place[-2:-1] != ("head",):
            return update * config.rate**depth
        return update

    after = optax.stateless(lambda updates, params: jax.tree.map_with_path(scale, updates))
    return lambda optimizer: optax.chain(optimizer, after)
