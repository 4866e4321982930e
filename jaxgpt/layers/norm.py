"""Normalisation over the last axis, computed in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxgpt.layers.fusion import pin


class Norm(nnx.Module):
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang & Sennrich 2019)."""

    def __init__(self, width: int, kind: str, eps: float, *, bias: bool = False) -> None:
        self.kind, self.eps = kind, eps
        self.scale = nnx.Param(jnp.ones(width), axes=("vector",))
        self.bias = nnx.Param(jnp.zeros(width), axes=("vector",)) if bias and kind == "layernorm" else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        if self.kind == "layernorm":
            y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps) * self.scale[...]
        return pin((y if self.bias is None else y + self.bias[...]).astype(x.dtype))
