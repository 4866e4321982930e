"""The position-wise MLP.

Shapes: B batch, T length, D hidden size, F hidden size of the MLP.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from jaxgpt.config import GPT, Compute
from jaxgpt.layers.linear import Linear
from jaxgpt.target import Target

SLOPE, CUBIC = math.sqrt(2 / math.pi), 0.044715


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """GELU in its tanh form (Hendrycks & Gimpel 2016); keeps only x for the backward pass."""
    return 0.5 * x * (1 + jnp.tanh(SLOPE * x * (1 + CUBIC * x * x)))


def _gelu_back(x: jax.Array, dy: jax.Array) -> tuple[jax.Array]:
    t = jnp.tanh(SLOPE * x * (1 + CUBIC * x * x))
    return (0.5 * dy * (1 + t + x * (1 - t * t) * SLOPE * (1 + 3 * CUBIC * x * x)),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_back)

ACTIVATIONS: dict[str, tuple[Callable[[jax.Array], jax.Array], bool]] = {
    "gelu": (gelu, False),
    "gelu_exact": (functools.partial(jax.nn.gelu, approximate=False), False),
    "relu": (jax.nn.relu, False),
    "relu2": (lambda x: jnp.square(jax.nn.relu(x)), False),
    "swiglu": (jax.nn.silu, True),
    "geglu": (gelu, True),
}
"""For each `GPT.mlp`: the activation, and whether it is that of a gate besides the up projection."""


class MLP(nnx.Module):
    """Two projections around an activation (GPT-2: GELU), or three with a gate (Shazeer 2020).

    Args:
      key, model, compute, target: as for the whole model.
      width: hidden size of the MLP, if it is not the model's.
    """

    def __init__(
        self, key: jax.Array, model: GPT, compute: Compute, target: Target, width: int | None = None
    ) -> None:
        D, F = model.width, width or model.hidden
        keys = jax.random.split(key, 3)
        how = {"bias": model.bias, "dtype": jnp.dtype(compute.dtype), "target": target}
        inner = ("embed", "mlp")
        self.activation, gated = ACTIVATIONS[model.mlp]
        self.up = Linear(keys[0], (D,), (F,), inner, std=0.02, **how)
        self.gate = Linear(keys[1], (D,), (F,), inner, std=0.02, **how) if gated else None
        std = 0.02 * (2 * model.layers) ** -0.5
        self.down = Linear(keys[2], (F,), (D,), ("mlp", "embed"), std=std, **how)

    @jax.named_scope("mlp")
    def __call__(self, x_BTD: jax.Array, ids: jax.Array | None = None) -> jax.Array:
        """The features [B, T, D]; `ids` [B] are of the rows' adapters, as in `Linear`."""
        h_BTF = self.up(x_BTD, ids)
        gate_BTF = h_BTF if self.gate is None else self.gate(x_BTD, ids)
        h_BTF = self.activation(h_BTF) if self.gate is None else self.activation(gate_BTF) * h_BTF
        return self.down(h_BTF, ids)
