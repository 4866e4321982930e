"""Attention over a cache in pages, and how a page holds keys and values.

Shapes: B rows, T queries, M pages of a row, N pages, P tokens of a page, S keys of a block, H heads,
G key-value heads, R = H / G queries per key, K head size, C = 2 * G.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp

from jaxgpt.layers.kernels.base import Scores, score
from jaxgpt.layers.mask import Mask

BLOCK = {"cpu": 128, "gpu": 512, "tpu": 512}
"""Keys that one turn of `_blockwise` reads."""
STEPS = 127
"""Of an int8 number on either side of 0."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Held:
    """A pool of pages.

    Attributes:
      kv_NPCK: key and value of each head in turn.
      scale_NPC: factors of numbers held in 8 bits, float32; None where they are held as they are.
      kernel: what attends to them, a name in `PAGED`.
    """

    kv_NPCK: jax.Array
    scale_NPC: jax.Array | None = None
    kernel: str = field(default="xla", metadata={"static": True})

    @classmethod
    def empty(
        cls, shape: tuple[int, int, int, int], dtype: jnp.dtype, kernel: str, *, int8: bool = False
    ) -> Held:
        """A pool of zeros, of shape [N, P, C, K]."""
        kv_NPCK = jnp.zeros(shape, jnp.int8 if int8 else dtype)
        return cls(kv_NPCK, jnp.zeros(shape[:3]) if int8 else None, kernel)

    @property
    def page(self) -> int:
        """Tokens of a page."""
        return self.kv_NPCK.shape[1]

    def read(self, table_BM: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values [B, M * P, G, K] of these pages."""
        kv = self.kv_NPCK[table_BM]
        if self.scale_NPC is not None:
            kv = kv * self.scale_NPC[table_BM][..., None]
        kv_BSCK = kv.reshape(len(table_BM), -1, *kv.shape[3:])
        return kv_BSCK[:, :, ::2], kv_BSCK[:, :, 1::2]

    def write(self, page_BT: jax.Array, place_BT: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array) -> Held:
        """The pool with these keys and values at these places of these pages."""
        B, T, G, K = k_BTGK.shape
        kv_BTCK = jnp.stack([k_BTGK, v_BTGK], axis=3).reshape(B, T, 2 * G, K)
        if self.scale_NPC is None:
            return replace(
                self, kv_NPCK=self.kv_NPCK.at[page_BT, place_BT].set(kv_BTCK.astype(self.kv_NPCK.dtype))
            )
        scale_BTC = jnp.max(jnp.abs(kv_BTCK.astype(jnp.float32)), axis=-1) / STEPS
        steps_BTCK = kv_BTCK / jnp.maximum(scale_BTC, jnp.finfo(jnp.float32).tiny)[..., None]
        return replace(
            self,
            kv_NPCK=self.kv_NPCK.at[page_BT, place_BT].set(jnp.round(steps_BTCK).astype(jnp.int8)),
            scale_NPC=self.scale_NPC.at[page_BT, place_BT].set(scale_BTC),
        )


def attend_pages(
    q_BTHK: jax.Array, held: Held, table_BM: jax.Array, mask: Mask, scores: Scores, extra: Any = None
) -> jax.Array:
    """Attention of new tokens over the pages of their rows, these tokens' own keys included.

    Args:
      q_BTHK: queries.
      held: the pool.
      table_BM: pages of each row.
      mask: causal; says where the queries stand in their rows, and the window.
      scores: how scores are computed.
      extra: more keys and values [1, Q, G, K] that every query sees.

    Returns:
      [B, T, H, K], in the type of the queries. A row's result depends on its own tokens alone, bit for bit.
    """
    run = PAGED["xla" if extra is not None else held.kernel]
    return run(q_BTHK, held, table_BM, mask, scores, extra)


def _blockwise(
    q_BTHK: jax.Array, held: Held, table_BM: jax.Array, mask: Mask, scores: Scores, extra: Any
) -> jax.Array:
    """A block of keys at a time, with the softmax's largest score and sum carried along (Milakov and
    Gimelshein 2018), up to the longest row. Blocks that a row does not see change nothing of its result.
    """
    (B, T, H, K), M = q_BTHK.shape, table_BM.shape[1]
    G = held.kv_NPCK.shape[2] // 2
    many = min(M, max(1, BLOCK[scores.target.platform] // held.page))
    S, at_BT = many * held.page, mask.q_index_BT
    table_BM = jnp.pad(table_BM, ((0, 0), (0, -M % many)))
    first = jnp.maximum(jnp.min(at_BT) - mask.window + 1, 0) // S if mask.window else 0
    blocks = jnp.minimum(jnp.max(at_BT) // S + 1, table_BM.shape[1] // many)
    ones_B1 = jnp.ones((B, 1), jnp.int32)

    def turn(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        k_BSGK, v_BSGK = held.read(jax.lax.dynamic_slice_in_dim(table_BM, i * many, many, 1))
        index_1S = i * S + jnp.arange(S)[None]
        part = replace(
            mask,
            k_index_BS=index_1S,
            q_segments_BT=ones_B1,
            k_segments_BS=jnp.ones_like(index_1S),
            prefix_BS=None,
        )
        return merge(carry, score(q_BTHK, k_BSGK, part, scores), v_BSGK)

    least = jnp.full((B, G, H // G, T), jnp.finfo(jnp.float32).min)
    carry = (least, jnp.zeros_like(least), jnp.zeros((B, G, H // G, T, K), jnp.float32))
    if extra is not None:
        k_BQGK, v_BQGK = (jnp.broadcast_to(x, (B, *x.shape[1:])).astype(q_BTHK.dtype) for x in extra)
        at_1T, at_1Q = jnp.zeros((1, T), jnp.int32), jnp.zeros((1, k_BQGK.shape[1]), jnp.int32)
        everyone = Mask(at_1T, at_1Q, at_1T, at_1Q, causal=False)
        carry = merge(carry, score(q_BTHK, k_BQGK, everyone, replace(scores, bias=None)), v_BQGK)
    _, sum_BGRT, y_BGRTK = jax.lax.fori_loop(first, blocks, turn, carry)
    y_BGRTK = y_BGRTK / sum_BGRT[..., None]
    return y_BGRTK.transpose(0, 3, 1, 2, 4).reshape(B, T, H, K).astype(q_BTHK.dtype)


def merge(
    carry: tuple[jax.Array, ...], s_BGRTS: jax.Array, v_BSGK: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The largest score, the sum and the result [B, G, R, T, ...] so far, with another block of keys."""
    largest_BGRT, sum_BGRT, y_BGRTK = carry
    new_BGRT = jnp.maximum(largest_BGRT, jnp.max(s_BGRTS, axis=-1))
    p_BGRTS, keep_BGRT = jnp.exp(s_BGRTS - new_BGRT[..., None]), jnp.exp(largest_BGRT - new_BGRT)
    more_BGRTK = jnp.einsum(
        "bgrts,bsgk->bgrtk", p_BGRTS.astype(v_BSGK.dtype), v_BSGK, preferred_element_type=jnp.float32
    )
    sum_BGRT = sum_BGRT * keep_BGRT + jnp.sum(p_BGRTS, axis=-1)
    return new_BGRT, sum_BGRT, y_BGRTK * keep_BGRT[..., None] + more_BGRTK


PAGED: dict[str, Callable[..., jax.Array]] = {"xla": _blockwise}
"""What attends to pages, by name."""
