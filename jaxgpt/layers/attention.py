"""The attention of a layer: projections, rotary embedding and cache around a kernel.

Shapes: B batch, T queries, S keys, P extra keys, H heads, G key-value heads, K head size, D hidden size.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx

from jaxgpt.config import GPT, Compute
from jaxgpt.layers.cache import HeldLayer
from jaxgpt.layers.kernels import attend, pick_kernel
from jaxgpt.layers.kernels.base import Scores
from jaxgpt.layers.linear import Linear
from jaxgpt.layers.mask import LayerFacts, RowFacts
from jaxgpt.layers.norm import model_norm
from jaxgpt.layers.position import Bias, rotate
from jaxgpt.target import Target


class Attention(nnx.Module):
    """Self-attention with its projections, for training, prefill and cached decoding."""

    def __init__(self, key: jax.Array, model: GPT, compute: Compute, target: Target) -> None:
        D, H, G, K = model.width, model.heads, model.groups, model.head
        dtype = jnp.dtype(compute.dtype)
        keys = jax.random.split(key, 4)
        bias = model.bias if model.qkv_bias is None else model.qkv_bias

        def into_heads(key: jax.Array, count: int, name: str) -> Linear:
            axes = ("embed", name, "head")
            how = {"bias": bias, "std": 0.02, "dtype": dtype, "target": target}
            return Linear(key, (D,), (count, K), axes, **how)

        self.q = into_heads(keys[0], H, "heads")
        self.k = into_heads(keys[1], G, "kv_heads")
        self.v = into_heads(keys[2], G, "kv_heads")
        # GPT-2, section 2.3: residual projections are initialised smaller by a factor sqrt(2 x layers).
        std = 0.02 * (2 * model.layers) ** -0.5
        out_axes = ("heads", "head", "embed")
        self.out = Linear(
            keys[3], (H, K), (D,), out_axes, bias=model.bias, std=std, dtype=dtype, target=target
        )
        self.q_norm = model_norm(model, target, K, "rmsnorm") if model.qk_norm else None
        self.k_norm = model_norm(model, target, K, "rmsnorm") if model.qk_norm else None
        biased = model.position in ("alibi", "relative")
        self.bias = Bias(jax.random.fold_in(key, 4), model) if biased else None
        scale = (model.attention_scalar or K) ** -0.5
        self.scores = Scores(scale, target, model.attention_softcap)
        self.kernel = pick_kernel(model, compute, target)
        self.about = (model, compute, target)

    @jax.named_scope("attention")
    def __call__(
        self,
        x_BTD: jax.Array,
        rows: RowFacts,
        layer: LayerFacts,
        cache: HeldLayer | None = None,
    ) -> tuple[jax.Array, HeldLayer | None]:
        """Attend within x, or over a cache after appending x to it at the slots `rows.start_B`.

        Args:
          x_BTD: features.
          rows: the tokens' positions and the attention mask.
          layer: the layer's frequencies, window and prefix: keys and values [P, G, K] that every query sees
            (prefix tuning; Li and Liang 2021). They get no rotary embedding.
          cache: keys and values before x. If `rows.start_B` is None, the cache is empty: it stores those of
            x, and attention stays within x.

        Returns:
          [B, T, D], and the cache with the new tokens (None without a cache).
        """
        q_BTHK, k_BSGK, v_BSGK = (project(x_BTD, rows.adapters_B) for project in (self.q, self.k, self.v))
        if self.q_norm is not None and self.k_norm is not None:
            q_BTHK, k_BSGK = self.q_norm(q_BTHK), self.k_norm(k_BSGK)
        if layer.frequency_K is not None:
            q_BTHK = rotate(q_BTHK, rows.positions_BT, layer.frequency_K)
            k_BSGK = rotate(k_BSGK, rows.positions_BT, layer.frequency_K)
        if cache is not None:
            start_B = jnp.zeros(len(x_BTD), jnp.int32) if rows.start_B is None else rows.start_B
            cache = cache.append(k_BSGK, v_BSGK, start_B)
        mask, kernel, extra = layer.seen(rows), self.kernel, None
        if layer.prefix is not None:
            extra = (layer.prefix[0][None], layer.prefix[1][None])
            kernel = pick_kernel(*self.about, extra=True)
        if mask.layout == "any":
            kernel = "xla"
        scores = replace(self.scores, bias=self.bias)
        if cache is not None and rows.start_B is not None:
            y_BTHK = cache.attend(q_BTHK, mask, scores, kernel, extra)
        else:
            y_BTHK = attend(q_BTHK, k_BSGK, v_BSGK, mask, scores, kernel, extra)
        return self.out(y_BTHK, rows.adapters_B), cache
