"""The attention kernel for TPUs: JAX's splash attention.

Shapes: B batch, T length, H heads, G key-value heads, K head size.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxgpt.config import GPT, Compute
from jaxgpt.layers.kernels.base import Kernel, Scores, spread, unfit
from jaxgpt.layers.mask import Mask
from jaxgpt.target import Target

LANES = 128
"""Rows per tile of the TPU's vector unit; splash attention needs lengths that are multiples of it."""
LONG = 2**14
"""Sequence length from which larger blocks are faster."""


def _splash_problem(model: GPT, compute: Compute, target: Target) -> str:
    return unfit(model, target, "tpu") or ("it does not support model.prefix" if model.prefix else "")


def splash(q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array, mask: Mask, scores: Scores) -> Any:
    """JAX's TPU kernel, which skips blocks hidden by causality or the window."""
    T = q_BTHK.shape[1]

    def rows(q: jax.Array, k: jax.Array, v: jax.Array, segments_BT: jax.Array) -> Any:
        from jax.experimental.pallas.ops.tpu import splash_attention as pallas  # slow to import

        padding = ((0, 0), (0, -T % LANES), (0, 0), (0, 0))
        q, k, v = (jnp.pad(x, padding).swapaxes(1, 2) for x in (q * scores.scale, k, v))
        segments = jnp.pad(segments_BT, padding[:2], constant_values=-1)
        kernel = _splash_kernel(q.shape[1], q.shape[2], q.shape[3], mask, scores)
        out: Any = jax.vmap(kernel)(q, k, v, pallas.SegmentIds(segments, segments))
        if scores.residual:
            out = out[0], out[1][0]
        return jax.tree.map(lambda x: x.swapaxes(1, 2)[:, :T], out)

    return spread(rows, q_BTHK, k_BTGK, v_BTGK, mask.q_segments_BT, scores)


def _splash_kernel(heads: int, length: int, width: int, mask: Mask, scores: Scores) -> Any:
    """The kernel for rows of one length, a multiple of `LANES`; long rows use larger blocks."""
    from jax.experimental.pallas.ops.tpu import splash_attention as pallas

    square, back = (length, length), mask.window - 1 if mask.window else None
    seen = pallas.LocalMask(square, (back, 0), 0) if mask.causal else pallas.FullMask(square)
    largest = 1024 if length >= LONG else 512
    forward, backward = (
        next(size for size in (1024, 512, 256, LANES) if size <= most and length % size == 0)
        for most in (largest, largest if width <= 128 else 512)  # larger does not fit v5p's memory
    )
    blocks: Any = dict.fromkeys(("block_q", "block_kv"), forward)
    blocks |= dict.fromkeys(("block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq"), backward)
    return pallas.make_splash_mha_single_device(
        pallas.MultiHeadMask([seen] * heads),
        block_sizes=pallas.BlockSizes(**blocks),
        attn_logits_soft_cap=scores.cap,
        save_residuals=scores.residual,
        interpret=scores.target.interpret,
    )


SPLASH = Kernel(_splash_problem, splash)
