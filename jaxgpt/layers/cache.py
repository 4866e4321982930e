"""The key-value cache: an explicit pytree, in as an argument and out as a result.

Shapes: B batch, T new tokens, S slots, G key-value heads, K head width.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxgpt.config import Model


class LayerCache(NamedTuple):
    """Keys and values of one layer; slot s holds the token at position s of its row."""

    k_BSGK: jax.Array
    v_BSGK: jax.Array

    def append(self, k_BTGK: jax.Array, v_BTGK: jax.Array, start_B: jax.Array) -> LayerCache:
        """Write T new tokens of each row from its own slot `start_B` on."""

        def write(cache_SGK: jax.Array, new_TGK: jax.Array, start: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice(cache_SGK, new_TGK.astype(cache_SGK.dtype), (start, 0, 0))

        put = jax.vmap(write)
        return LayerCache(put(self.k_BSGK, k_BTGK, start_B), put(self.v_BSGK, v_BTGK, start_B))


Cache = tuple[LayerCache, ...]


def init_cache(model: Model, batch: int, slots: int, dtype: jnp.dtype) -> Cache:
    """An empty cache: one `LayerCache` a layer, never stacked, since a scan would copy it."""
    shape = (batch, slots, model.groups, model.head)
    return tuple(LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(model.layers))
