"""Normalisation over the last axis, computed in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxgpt.config import GPT
from jaxgpt.target import Target


class Norm(nnx.Module):
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang & Sennrich 2019).

    Args:
      width: number of features normalised over.
      kind: `layernorm` or `rmsnorm`.
      eps: added to the variance.
      target: what the program is built for.
      bias: whether a LayerNorm adds a bias.
      centered: multiply by 1 + scale, with the scale initialised to 0 (Gemma).
    """

    def __init__(
        self,
        width: int,
        kind: str,
        eps: float,
        target: Target,
        *,
        bias: bool = False,
        centered: bool = False,
    ) -> None:
        self.kind, self.eps, self.offset, self.target = kind, eps, float(centered), target
        self.scale = nnx.Param(
            jnp.zeros(width) if centered else jnp.ones(width), axes=("vector",), role="norm"
        )
        self.bias = (
            nnx.Param(jnp.zeros(width), axes=("vector",), role="bias")
            if bias and kind == "layernorm"
            else None
        )

    @jax.named_scope("norm")
    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        if self.kind == "layernorm":
            y = y - y.mean(-1, keepdims=True)
        scale = self.scale[...] + self.offset if self.offset else self.scale[...]
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps) * scale
        return self.target.pin((y if self.bias is None else y + self.bias[...]).astype(x.dtype))


def model_norm(model: GPT, target: Target, width: int | None = None, kind: str | None = None) -> Norm:
    """The norm that a config specifies.

    Args:
      model: the config.
      target: what the program is built for.
      width: number of features, if not the hidden size.
      kind: overrides the model's kind.
    """
    return Norm(
        width or model.width,
        kind or model.norm,
        model.norm_eps,
        target,
        bias=model.bias,
        centered=model.zero_centered_norm,
    )
