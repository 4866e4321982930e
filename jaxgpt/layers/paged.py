"""The key-value cache in pages: rows of any length share one pool of memory (PagedAttention; Kwon et al.
2023).

A page holds the keys and values of `P` tokens that follow each other in a row; a table says which pages a row
has. Page 0 belongs to nobody: what has no place of its own is written there. As in `layers.cache`, a CPU has
a pool for each layer and accelerators one for all layers, which the scan carries: the pages of layer i are
`i * N` to `(i + 1) * N - 1`, so that no layer's part is ever cut out of it.

Shapes: B rows, T new tokens, M pages of a row, N pages of a layer, P tokens of a page, S = M * P slots,
G key-value heads, K head size, C = 2 * G: key and value of each head in turn, as kernels for TPUs read them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxgpt.config import GPT, Compute, Model
from jaxgpt.layers.kernels.base import Scores
from jaxgpt.layers.kernels.paged import Held, attend_pages, pick_paged
from jaxgpt.layers.mask import Mask
from jaxgpt.sharding import constrain
from jaxgpt.target import Target

POOL_AXES = ("pages", "length", "kv_heads", "head")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PagedLayer:
    """One layer's part of a pool: reads and appends like a `layers.cache.LayerCache`.

    Attributes:
      held: the pool.
      table_BM: pages of each row in the pool.
      real_B: how many of the new tokens of each row have a place; None for all. The rest is written to page
        0.
    """

    held: Held
    table_BM: Any
    real_B: Any = None

    @property
    def slots(self) -> int:
        """Tokens that a row can hold."""
        return self.table_BM.shape[1] * self.held.page

    @property
    def k_BSGK(self) -> jax.Array:
        """All keys of the rows."""
        return self.held.read(self.table_BM)[0]

    @property
    def v_BSGK(self) -> jax.Array:
        """All values of the rows."""
        return self.held.read(self.table_BM)[1]

    def append(self, k_BTGK: jax.Array, v_BTGK: jax.Array, start_B: jax.Array) -> PagedLayer:
        """Write T new tokens of each row, starting at its slot `start_B`."""
        T, M = k_BTGK.shape[1], self.table_BM.shape[1]
        slot_BT = start_B[:, None] + jnp.arange(T)
        placed_BT = slot_BT < self.slots
        if self.real_B is not None:
            placed_BT &= jnp.arange(T) < self.real_B[:, None]
        page_BT = jnp.take_along_axis(self.table_BM, jnp.minimum(slot_BT // self.held.page, M - 1), axis=1)
        page_BT = jnp.where(placed_BT, page_BT, 0)
        return replace(self, held=self.held.write(page_BT, slot_BT % self.held.page, k_BTGK, v_BTGK))

    def attend(
        self, q_BTHK: jax.Array, mask: Mask, scores: Scores, kernel: str, extra: Any = None
    ) -> jax.Array:
        """Attention of new tokens over the row's pages; `kernel` is that of whole rows, which plays no
        part.
        """
        del kernel
        return attend_pages(q_BTHK, self.held, self.table_BM, mask, scores, extra)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PagedStack:
    """The pools of all layers as one, which a scan over layers carries.

    Attributes:
      held: the pool, [L * N, P, C, K].
      table_BM: pages of each row in a layer.
      real_B: as in `PagedLayer`.
      layers: L.
    """

    held: Held
    table_BM: Any
    real_B: Any = None
    layers: int = field(default=1, metadata={"static": True})

    @property
    def slots(self) -> int:
        """Tokens that a row can hold."""
        return self.table_BM.shape[1] * self.held.page

    def layer(self, i: jax.Array) -> PagedLayer:
        """Layer i, in the pool's own memory."""
        first = i * (len(self.held.kv_NPCK) // self.layers)
        return PagedLayer(self.held, self.table_BM + first, self.real_B)

    def keep(self, layer: PagedLayer) -> PagedStack:
        """The stack after a layer wrote to it."""
        return replace(self, held=layer.held)


class Pools(NamedTuple):
    """The memory of a paged cache: one pool for each layer, or one for all."""

    helds: tuple[Held, ...]

    def cache(self, layers: int, table_BM: jax.Array, real_B: jax.Array | None = None) -> Any:
        """The cache that these pools are to rows with these pages."""
        if len(self.helds) == layers > 1 or layers == 1:
            return tuple(PagedLayer(held, table_BM, real_B) for held in self.helds)
        return PagedStack(self.helds[0], table_BM, real_B, layers)

    @classmethod
    def of(cls, cache: Any) -> Pools:
        """The pools of a cache after the layers wrote to it."""
        held = [layer.held for layer in cache] if isinstance(cache, tuple) else [cache.held]
        return cls(tuple(held))


def init_pools(
    model: Model, compute: Compute, target: Target, pages: int, page: int, *, int8: bool = False
) -> Pools:
    """Empty pools of `pages` pages in each layer, in the target's form.

    Args:
      model: the architecture.
      compute: its type is that of keys and values.
      target: what the program is built for.
      pages: N, page 0 included.
      page: P.
      int8: whether they are held in 8 bits, with a scale for each token and head.
    """
    G, K = model.groups, model.head
    count, size = (model.layers, pages) if target.unroll else (1, model.layers * pages)
    kernel = pick_paged(model, compute, target, int8=int8) if isinstance(model, GPT) else "xla"
    shape = (size, page, 2 * G, K)
    made = [Held.empty(shape, jnp.dtype(compute.dtype), kernel, int8=int8) for _ in range(count)]
    return Pools(tuple(made))


def constrain_pools(pools: Pools) -> Pools:
    """Constrain the layout of pools: heads over the mesh."""
    return jax.tree.map(lambda x: constrain(x, *POOL_AXES[: x.ndim]), pools)
