"""What kernels share: their arguments besides the mask, and plain attention, which supports everything.

Shapes: B batch, T queries, S keys, H heads, G key-value heads, R = H / G queries per key, K head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxgpt.config import GPT, Compute
from jaxgpt.layers.linear import softcap
from jaxgpt.layers.mask import Mask
from jaxgpt.sharding import spec
from jaxgpt.target import Target

PAIRS = 2**21
"""Queries times keys above which accelerators compute plain attention one chunk of queries at a time."""
SELDOM = "seldom"
"""Named scope of a loop that most rows do not enter, so that FLOP counts of a program can exclude it."""
CHUNK = 128
"""Minimum number of queries per chunk."""
BLOCKS = 8
"""Most blocks of queries that a CPU computes apart, each with the keys up to its own last."""


@dataclass(frozen=True)
class Scores:
    """What determines the scores besides the mask, and where they are computed.

    Attributes:
      scale: factor of the scores.
      target: what the program is built for.
      cap: soft-cap, applied before the bias; None for none.
      bias: added to the scores, float32 [B, H, T, S], or a function of `Mask.distance` that returns it; only
        `xla` supports it.
      residual: whether a kernel also returns the log-sum-exp of each query's scores [B, T, H], float32.
    """

    scale: float
    target: Target
    cap: float | None = None
    bias: jax.Array | Callable[[jax.Array], jax.Array] | None = None
    residual: bool = False


class Kernel(NamedTuple):
    """An entry of the table.

    Attributes:
      problem: from (model, compute, target) to the reason why it cannot run, or ""; logged once at the start.
      run: from (q_BTHK, k_BSGK, v_BSGK, mask, scores) to y_BTHK, or to (y_BTHK, lse_BTH).
      alone: why it returns no log-sum-exp, so that nothing can be merged with its result; or "".
      note: a remark that is logged with its name.
    """

    problem: Callable[[GPT, Compute, Target], str]
    run: Callable[..., Any]
    alone: str = ""
    note: str = ""


def unfit(model: GPT, target: Target, platform: str) -> str:
    """Why no kernel of a platform can run, or ""."""
    if target.platform != platform:
        return f"it needs a {platform.upper()}, not a {target.platform.upper()}"
    if model.position in ("alibi", "relative"):
        return f"it supports no bias, which model.position {model.position!r} adds"
    return ""


def spread(
    run: Callable[..., Any],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments_BT: jax.Array,
    scores: Scores,
) -> Any:
    """`run(q, k, v, segments)` on every device, for its own rows and heads.

    The partitioner cannot split a kernel by itself.
    """
    segments_BT = jnp.broadcast_to(segments_BT, q.shape[:2])
    if jax.sharding.get_abstract_mesh().empty:
        return run(q, k, v, segments_BT)
    heads, groups = (spec(("batch", "length", name, "head")) for name in ("heads", "kv_heads"))
    layouts = (heads, groups, groups, spec(("batch", "length")))
    out = (heads, spec(("batch", "length", "heads"))) if scores.residual else heads
    return jax.shard_map(run, in_specs=layouts, out_specs=out, check_vma=False)(q, k, v, segments_BT)


def plain(q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, mask: Mask, scores: Scores) -> Any:
    """Attention by its definition: scores, softmax and sum, with any mask and bias.

    For many queries and keys, accelerators hold the scores of one chunk of queries at a time, in the backward
    pass too; a CPU leaves out keys that come after all queries of a block.
    """
    (B, T), S = q_BTHK.shape[:2], k_BSGK.shape[1]
    if scores.target.platform == "cpu":
        ahead = mask.causal and mask.layout != "any" and mask.prefix_BS is None
        blocks = min(BLOCKS, T // CHUNK) if ahead and not isinstance(scores.bias, jax.Array) else 1
        return _by_blocks(q_BTHK, k_BSGK, v_BSGK, mask, scores, max(1, blocks))
    chunk = max(CHUNK, PAIRS // S)
    if chunk >= T or isinstance(scores.bias, jax.Array):
        return _plain(q_BTHK, k_BSGK, v_BSGK, mask, scores)

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, -T % chunk)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)

    # The gradients of keys and values are summed over the chunks, which requires float32.
    wide_k, wide_v = k_BSGK.astype(jnp.float32), v_BSGK.astype(jnp.float32)

    @jax.checkpoint
    def one(chunk: tuple[jax.Array, ...]) -> Any:
        q, index, segments = chunk
        part = replace(mask, q_index_BT=index, q_segments_BT=segments, layout="any")
        return _plain(q, wide_k.astype(k_BSGK.dtype), wide_v.astype(v_BSGK.dtype), part, scores)

    parts = jax.lax.map(one, tuple(map(split, (q_BTHK, mask.q_index_BT, mask.q_segments_BT))))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(B, -1, *x.shape[3:])[:, :T], parts)


def _by_blocks(
    q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, mask: Mask, scores: Scores, blocks: int
) -> Any:
    """`_plain` by blocks of queries, without the keys after a block's last query or out of its window.

    Rows must be whole: queries and keys are the same tokens.
    """
    if blocks == 1:
        return _plain(q_BTHK, k_BSGK, v_BSGK, mask, scores)
    T, parts = q_BTHK.shape[1], []
    # As above: several blocks add to the gradient of a key.
    wide_k, wide_v = k_BSGK.astype(jnp.float32), v_BSGK.astype(jnp.float32)
    size = -(-T // blocks)
    for start in range(0, T, size):
        end = min(start + size, T)
        first = max(0, start - mask.window + 1) if mask.window else 0
        part = replace(
            mask,
            q_index_BT=mask.q_index_BT[:, start:end],
            k_index_BS=mask.k_index_BS[:, first:end],
            q_segments_BT=mask.q_segments_BT[:, start:end],
            k_segments_BS=mask.k_segments_BS[:, first:end],
            layout="any",
        )
        k, v = wide_k[:, first:end].astype(k_BSGK.dtype), wide_v[:, first:end].astype(v_BSGK.dtype)
        parts.append(_plain(q_BTHK[:, start:end], k, v, part, scores))
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *parts)


def _plain(q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, mask: Mask, scores: Scores) -> Any:
    (B, T, H, K), s_BGRTS = q_BTHK.shape, score(q_BTHK, k_BSGK, mask, scores)
    with jax.named_scope("softmax"):
        probs = jax.nn.softmax(s_BGRTS, axis=-1).astype(v_BSGK.dtype)
    with jax.named_scope("values"):
        y_BTGRK = jnp.einsum("bgrts,bsgk->btgrk", probs, v_BSGK)
    y_BTHK = y_BTGRK.reshape(B, T, H, K).astype(q_BTHK.dtype)
    if not scores.residual:
        return y_BTHK
    lse_BHT = jax.nn.logsumexp(s_BGRTS, axis=-1).reshape(B, H, T)
    return y_BTHK, lse_BHT.swapaxes(1, 2)


def probabilities(q_BTHK: jax.Array, k_BSGK: jax.Array, mask: Mask, scores: Scores) -> jax.Array:
    """How much each query attends to each key [B, H, T, S], float32; rows sum to 1."""
    s_BGRTS = score(q_BTHK, k_BSGK, mask, scores)
    return jax.nn.softmax(s_BGRTS, axis=-1).reshape(*q_BTHK.shape[::2], *s_BGRTS.shape[3:])


@jax.named_scope("scores")
def score(q_BTHK: jax.Array, k_BSGK: jax.Array, mask: Mask, scores: Scores) -> jax.Array:
    """Scores with cap, bias and mask [B, G, R, T, S], float32."""
    B, T, H, K = q_BTHK.shape
    G, bias = k_BSGK.shape[2], scores.bias
    q_BTGRK = q_BTHK.reshape(B, T, G, H // G, K) * scores.scale
    s_BGRTS = jnp.einsum("btgrk,bsgk->bgrts", q_BTGRK, k_BSGK, preferred_element_type=jnp.float32)
    s_BGRTS = softcap(s_BGRTS, scores.cap)
    if bias is not None:
        bias_BHTS = bias(mask.distance()) if callable(bias) else bias
        s_BGRTS = s_BGRTS + bias_BHTS.reshape(-1, G, H // G, *bias_BHTS.shape[2:])
    # A finite floor: gradients of -inf would be NaN.
    return jnp.where(mask.dense()[:, None, None], s_BGRTS, jnp.finfo(jnp.float32).min)
