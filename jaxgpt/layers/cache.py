"""The key-value cache: an explicit pytree, passed as an argument and returned as a result.

The target decides between two forms. On a CPU each layer has its own `LayerCache`, and layers run one after
the other, because a scan would copy a stacked cache at every layer there. On accelerators the cache is
stacked and the scan over layers carries it, so every layer writes its tokens in place.

Shapes: B batch, T new tokens, S slots, G key-value heads, K head size, L layers.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx

from jaxgpt.config import Model
from jaxgpt.layers.int8 import Int8, like, whole
from jaxgpt.layers.kernels import attend
from jaxgpt.layers.kernels.base import Scores
from jaxgpt.layers.mask import Mask
from jaxgpt.layers.paged import PagedLayer, PagedStack
from jaxgpt.sharding import constrain
from jaxgpt.target import Target


class LayerCache(NamedTuple):
    """Keys and values of one layer [B, S, G, K]; slot s holds the token at position s of its row.

    Each is an array, or `Int8` where they are held in 8 bits.
    """

    k: Any
    v: Any

    @property
    def k_BSGK(self) -> jax.Array:
        """The keys."""
        return whole(self.k)

    @property
    def v_BSGK(self) -> jax.Array:
        """The values."""
        return whole(self.v)

    def append(self, k_BTGK: jax.Array, v_BTGK: jax.Array, start_B: jax.Array) -> LayerCache:
        """Write T new tokens of each row, starting at its slot `start_B`."""

        def write(cache_SGK: jax.Array, new_TGK: jax.Array, start: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice(cache_SGK, new_TGK, (start, 0, 0))

        def put(held: Any, new_BTGK: jax.Array) -> Any:
            new = like(new_BTGK, held)
            return jax.tree.map(lambda x, y: jax.vmap(write)(x, y, start_B), held, new)

        return LayerCache(put(self.k, k_BTGK), put(self.v, v_BTGK))

    @property
    def slots(self) -> int:
        """Tokens that a row can hold."""
        return self.k.shape[1]

    def attend(
        self, q_BTHK: jax.Array, mask: Mask, scores: Scores, kernel: str, extra: Any = None
    ) -> jax.Array:
        """Attention over all slots; see `layers.kernels.attend`."""
        return attend(q_BTHK, self.k_BSGK, self.v_BSGK, mask, scores, kernel, extra)


class StackedCache(NamedTuple):
    """Keys and values of all layers; the axes of a head's matrix [S, K] are adjacent.

    A product reads them in this order. With another order, compilers for accelerators copy the whole cache
    into this one at the start of a program and back at its end.
    """

    k_LBGSK: Any
    """An array, or `Int8` where they are held in 8 bits."""
    v_LBGSK: Any

    @property
    def slots(self) -> int:
        """Tokens that a row can hold."""
        return self.k_LBGSK.shape[3]

    @property
    def layers(self) -> int:
        """L."""
        return self.k_LBGSK.shape[0]

    def layer(self, i: jax.Array) -> StackedLayer:
        """Layer i, in the stack's own memory."""
        return StackedLayer(self, i)

    def keep(self, layer: StackedLayer) -> StackedCache:
        """The stack after a layer wrote to it."""
        return layer.stack


class StackedLayer(NamedTuple):
    """One layer of a stacked cache: reads and appends like a `LayerCache`, in the stack's own memory."""

    stack: StackedCache
    layer: jax.Array
    """The layer's number."""

    @property
    def k_BSGK(self) -> jax.Array:
        """The layer's keys."""
        return self._of(self.stack.k_LBGSK)

    @property
    def v_BSGK(self) -> jax.Array:
        """The layer's values."""
        return self._of(self.stack.v_LBGSK)

    def _of(self, stack_LBGSK: Any) -> jax.Array:
        def one(x_LBGSK: jax.Array) -> jax.Array:
            return jax.lax.dynamic_index_in_dim(x_LBGSK, self.layer, keepdims=False).swapaxes(1, 2)

        return whole(jax.tree.map(one, stack_LBGSK))

    def append(self, k_BTGK: jax.Array, v_BTGK: jax.Array, start_B: jax.Array) -> StackedLayer:
        """Like `LayerCache.append`; writes only the new tokens."""
        at_B2 = jnp.stack([jnp.full_like(start_B, self.layer), start_B], axis=1)
        # Rows are a batch axis of the scatter: if they are sharded, each device writes its own rows.
        dims = jax.lax.ScatterDimensionNumbers(
            update_window_dims=(1, 2, 3),
            inserted_window_dims=(0,),
            scatter_dims_to_operand_dims=(0, 3),
            operand_batching_dims=(1,),
            scatter_indices_batching_dims=(0,),
        )

        def write(stack_LBGSK: jax.Array, new_BTGK: jax.Array) -> jax.Array:
            how = {"indices_are_sorted": True, "unique_indices": True, "mode": "clip"}
            return jax.lax.scatter(stack_LBGSK, at_B2, new_BTGK.swapaxes(1, 2), dims, **how)

        def put(stack_LBGSK: Any, new_BTGK: jax.Array) -> Any:
            return jax.tree.map(write, stack_LBGSK, like(new_BTGK, stack_LBGSK))

        k_LBGSK, v_LBGSK = self.stack
        return StackedLayer(StackedCache(put(k_LBGSK, k_BTGK), put(v_LBGSK, v_BTGK)), self.layer)

    def attend(
        self, q_BTHK: jax.Array, mask: Mask, scores: Scores, kernel: str, extra: Any = None
    ) -> jax.Array:
        """Attention over all slots; see `layers.kernels.attend`."""
        return attend(q_BTHK, self.k_BSGK, self.v_BSGK, mask, scores, kernel, extra)


HeldLayer = LayerCache | StackedLayer | PagedLayer
"""One layer, in any form."""


class TokenCache(NamedTuple):
    """Nothing but the tokens, of a model that computes its rows anew (`Predictor.decode`)."""

    tokens_BS: jax.Array


Cache = tuple[LayerCache, ...] | StackedCache | TokenCache | tuple[PagedLayer, ...] | PagedStack


def append_tokens(tokens_BS: jax.Array, new_BT: jax.Array, start_B: jax.Array) -> jax.Array:
    """Write T new tokens of each row, starting at its slot `start_B`."""
    return jax.vmap(lambda row_S, new_T, start: jax.lax.dynamic_update_slice(row_S, new_T, (start,)))(
        tokens_BS, new_BT, start_B
    )


def init_cache(
    model: Model, target: Target, batch: int, slots: int, dtype: jnp.dtype, *, int8: bool = False
) -> Cache:
    """An empty cache in the target's form.

    Args:
      model: the architecture.
      target: what the program is built for.
      batch, slots: B and S.
      dtype: of keys and values.
      int8: hold them in 8 bits, with a scale for each token and head; `dtype` is what they are read in.
    """
    G, K = model.groups, model.head

    def zeros(*shape: int) -> Any:
        if int8:
            return Int8(jnp.zeros(shape, jnp.int8), jnp.zeros((*shape[:-1], 1)), dtype)
        return jnp.zeros(shape, dtype)

    def pair(*shape: int) -> tuple[Any, Any]:
        return zeros(*shape), zeros(*shape)

    if target.unroll:
        return tuple(LayerCache(*pair(batch, slots, G, K)) for _ in range(model.layers))
    return StackedCache(*pair(model.layers, batch, G, slots, K))


def cache_axes(cache: Cache) -> tuple[str, ...]:
    """Logical axes of the cache's arrays."""
    if isinstance(cache, TokenCache):
        return ("batch", "length")
    if isinstance(cache, StackedCache):
        return ("layers", "batch", "kv_heads", "length", "head")
    return ("batch", "length", "kv_heads", "head")


def constrain_cache(cache: Cache) -> Cache:
    """Constrain the cache's layout: rows and heads over the mesh."""
    return jax.tree.map(lambda x: constrain(x, *cache_axes(cache)), cache)


def slots_of(cache: Cache) -> int:
    """Number of tokens per row of the cache."""
    if isinstance(cache, TokenCache):
        return cache.tokens_BS.shape[1]
    return (cast("Any", cache)[0] if type(cache) is tuple else cast("Any", cache)).slots


def cached_layers(
    blocks: Any,
    x_BTD: jax.Array,
    rows: Any,
    per_layer: Any,
    cache: Cache,
    call: Callable[[Any, jax.Array, Any, Any, Any, int], tuple[jax.Array, Any]],
    *,
    period: int = 1,
) -> tuple[jax.Array, Cache]:
    """Run `x, held = call(block, x, rows, per_layer[i], held, i % period)` through the layers.

    Args:
      blocks: stacked (`layers.stack.stacked`) if the cache is, else an `nnx.List`.
      x_BTD: [B, T, D].
      rows: a pytree of inputs common to all layers.
      per_layer: a pytree of host arrays with a leading layer axis: inputs that differ by layer. For unstacked
        layers they are constants of the program.
      cache: of all layers.
      call: applies one layer; `held` is its cache.
      period: number of layers after which their kinds repeat, as in `layers.stack.run_layers`.

    Returns:
      The last x and the new cache.
    """
    if type(cache) is tuple:
        apart = list[Any]()
        held_layers = cast("Iterable[Any]", cache)
        for i, (block, held) in enumerate(zip(cast("Iterable[Any]", blocks), held_layers, strict=True)):
            own = jax.tree.map(operator.itemgetter(i), per_layer)
            x_BTD, layer = call(block, x_BTD, rows, own, held, i % period)
            apart.append(layer)
        return x_BTD, tuple(apart)
    graphdef, params = nnx.split(blocks)
    whole_stack = cast("StackedCache | PagedStack", cache)
    layers = whole_stack.layers
    whole = layers - layers % period

    def turn(carry: tuple[jax.Array, Any], start: Any, size: int) -> tuple[Any, Any]:
        """Run `size` layers from `start` on. Each is read in place: slices of the stack would be copies."""
        x_BTD, stack = carry
        for place in range(size):
            i = jnp.asarray(start + place)
            mine, own = jax.tree.map(
                lambda x, i=i: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), (params, per_layer)
            )
            x_BTD, held = call(nnx.merge(graphdef, mine), x_BTD, rows, own, stack.layer(i), place)
            stack = stack.keep(held)
        return x_BTD, stack

    def body(carry: Any, start: jax.Array) -> tuple[Any, None]:
        return turn(carry, start, period), None

    carry, _ = jax.lax.scan(body, (x_BTD, cache), jnp.arange(0, whole, period))
    return turn(carry, whole, layers - whole)


def reorder(cache: Cache, parent_BW: jax.Array) -> Cache:
    """The cache where row w of each W rows in turn goes on from row `parent_BW[b, w]` of the same W."""
    rows = cache_axes(cache).index("batch")

    def one(x: jax.Array) -> jax.Array:
        apart = x.reshape(*x.shape[:rows], *parent_BW.shape, *x.shape[rows + 1 :])
        take = jax.vmap(lambda x, parent_W: jnp.take(x, parent_W, rows), (rows, 0), rows)
        return take(apart, parent_BW).reshape(x.shape)

    return jax.tree.map(one, cache)


def spread_slot(cache: Cache, slot_B: jax.Array, parent_BW: jax.Array) -> Cache:
    """As `reorder`, of the slot `slot_B` of each row alone: where the rows differ in nothing else."""
    axes = cache_axes(cache)
    rows, length = axes.index("batch"), axes.index("length") - 1  # of an array without rows

    def get(x: jax.Array, slot: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x, slot, 1, length)

    def put(x: jax.Array, new: jax.Array, slot: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(x, new, slot, length)

    new = jax.tree.map(lambda x: jax.vmap(get, (rows, 0), rows)(x, slot_B), cache)
    put_all = jax.vmap(put, (rows, rows, 0), rows)
    return jax.tree.map(lambda x, new: put_all(x, new, slot_B), cache, reorder(new, parent_BW))
