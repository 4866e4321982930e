"""Attention over a cache in pages, and how a page holds keys and values.

Shapes: B rows, T queries, M pages of a row, N pages, P tokens of a page, S keys of a block, H heads,
G key-value heads, R = H / G queries per key, K head size, C = 2 * G.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxgpt.config import GPT, Compute
from jaxgpt.errors import require
from jaxgpt.layers.int8 import to_int8
from jaxgpt.layers.kernels.base import Scores, score, unfit
from jaxgpt.layers.kernels.tpu import LANES
from jaxgpt.layers.mask import Mask
from jaxgpt.sharding import spec
from jaxgpt.target import Target

log = logging.getLogger(__name__)

BLOCK = {"cpu": 128, "gpu": 512, "tpu": 512}
"""Keys that one turn of `_blockwise` reads."""
QUERIES = 32
"""That one turn of the TPU's kernel computes."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Held:
    """A pool of pages.

    Attributes:
      kv_NPCK: key and value of each head in turn.
      scale_NPC: factors of numbers held in 8 bits, float32; None where they are held as they are.
      kernel: what attends to them, a name in `PAGED`.
    """

    kv_NPCK: Any
    scale_NPC: Any = None
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
        steps_BTCK, scale_BTC1 = to_int8(kv_BTCK)
        return replace(
            self,
            kv_NPCK=self.kv_NPCK.at[page_BT, place_BT].set(steps_BTCK),
            scale_NPC=self.scale_NPC.at[page_BT, place_BT].set(scale_BTC1[..., 0]),
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
    run = PAGED["xla" if extra is not None else held.kernel].run
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


def _plain_problem(model: GPT, compute: Compute, target: Target) -> str:
    return ""


def _ragged_problem(model: GPT, compute: Compute, target: Target) -> str:
    packing, here = 4 // jnp.dtype(compute.dtype).itemsize, jax.sharding.get_abstract_mesh()
    shards = 1 if here.empty else here.shape["tensor"]
    rows, rest = divmod(2 * model.groups // shards, packing)
    if problem := unfit(model, target, "tpu"):
        return problem
    if model.head % LANES:
        return f"it needs a head size that is a multiple of {LANES}, not {model.head}"
    if rest or (rows not in (1, 2, 4) and rows % 8):
        return f"it cannot tile {2 * model.groups // shards} keys and values of a token in {compute.dtype}"
    return ""


def _ragged(
    q_BTHK: jax.Array, held: Held, table_BM: jax.Array, mask: Mask, scores: Scores, extra: Any
) -> jax.Array:
    """JAX's TPU kernel, which reads no page beyond a row's own."""
    del extra
    (B, T), M = q_BTHK.shape[:2], table_BM.shape[1]
    end_B = jnp.minimum(mask.q_index_BT[:, -1] + 1, M * held.page)

    def run(q_BTHK: jax.Array, kv_NPCK: jax.Array, table_BM: jax.Array, end_B: jax.Array) -> jax.Array:
        from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

        y = ragged_paged_attention(
            q_BTHK.reshape(-1, *q_BTHK.shape[2:]).astype(kv_NPCK.dtype),
            kv_NPCK,
            end_B.astype(jnp.int32),
            table_BM.astype(jnp.int32),
            T * jnp.arange(B + 1, dtype=jnp.int32),
            jnp.full(1, B, jnp.int32),
            sm_scale=scores.scale,
            sliding_window=mask.window or None,
            soft_cap=scores.cap,
            # Given, since the kernel would ask this process's own device.
            num_kv_pages_per_block=min(M, max(1, BLOCK["tpu"] // held.page)),
            num_queries_per_block=min(B * T, QUERIES),
        )
        return y.reshape(q_BTHK.shape).astype(q_BTHK.dtype)

    if jax.sharding.get_abstract_mesh().empty:
        return run(q_BTHK, held.kv_NPCK, table_BM, end_B)
    heads = spec(("length", "length", "heads", "head"))
    layouts = (heads, spec(("pages", "length", "kv_heads", "head")), P(), P())
    spread = jax.shard_map(run, in_specs=layouts, out_specs=heads, check_vma=False)
    return spread(q_BTHK, held.kv_NPCK, table_BM, end_B)


class Paged(NamedTuple):
    """A kernel over pages.

    Attributes:
      problem: from (model, compute, target) to the reason why it cannot run, or "".
      run: from (q_BTHK, held, table_BM, mask, scores, extra) to y_BTHK.
    """

    problem: Callable[[GPT, Compute, Target], str]
    run: Callable[..., jax.Array]


PAGED = {"ragged": Paged(_ragged_problem, _ragged), "xla": Paged(_plain_problem, _blockwise)}
"""What attends to pages. GPUs have none of their own: JAX's call of cuDNN wants a pool with as many pages as
all tables together, so that rows could share none, and the Pallas one is deprecated (docs/adr/0003)."""


def pick_paged(model: GPT, compute: Compute, target: Target, *, int8: bool = False) -> str:
    """The kernel for a paged cache on a target, a name in `PAGED`; logged where the fastest cannot run.

    Raises:
      UserError: under `compute.strict`, if it cannot.
    """
    if target.platform != "tpu":
        return "xla"
    problem = _ragged_problem(model, compute, target)
    problem = problem or ("it knows no scale for each token, which a cache of int8 has" if int8 else "")
    require(
        not (problem and compute.strict),
        f"compute.strict is on but the paged attention kernel cannot run here: {problem}; use strict=False.",
    )
    if problem:
        log.warning("paged attention kernel: xla instead of ragged, because %s", problem)
    return "xla" if problem else "ragged"
