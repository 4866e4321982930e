"""Normalisation over the last axis, computed in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxgpt.config import GPT
from jaxgpt.layers.fusion import pin


class Norm(nnx.Module):
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang & Sennrich 2019).

    Args:
      width: features normalised over.
      kind: `layernorm` or `rmsnorm`.
      eps: added to the variance.
      bias: whether a LayerNorm adds one.
      centered: multiply by 1 + scale, the scale beginning at 0 (Gemma).
    """

    def __init__(
        self, width: int, kind: str, eps: float, *, bias: bool = False, centered: bool = False
    ) -> None:
        self.kind, self.eps, self.offset = kind, eps, float(centered)
        self.scale = nnx.Param(jnp.zeros(width) if centered else jnp.ones(width), axes=("vector",))
        self.bias = nnx.Param(jnp.zeros(width), axes=("vector",)) if bias and kind == "layernorm" else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        if self.kind == "layernorm":
            y = y - y.mean(-1, keepdims=True)
        scale = self.scale[...] + self.offset if self.offset else self.scale[...]
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps) * scale
        return pin((y if self.bias is None else y + self.bias[...]).astype(x.dtype))


def model_norm(model: GPT, width: int | None = None, kind: str | None = None) -> Norm:
    """A norm as a config asks for it.

    Args:
      model: the config.
      width: features, where they are not the model's.
      kind: in place of the model's.
    """
    return Norm(
        width or model.width,
        kind or model.norm,
        model.norm_eps,
        bias=model.bias,
        centered=model.zero_centered_norm,
    )
