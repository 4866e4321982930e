"""What a tuning method adds to a model beside its weights (pytrees, whose leaves JAX may replace by others).

Shapes: B batch, T length, P virtual tokens, L layers, G key-value heads, K head size, D hidden size,
R hidden size of an adapter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxgpt.layers.linear import add_bias, contract
from jaxgpt.layers.mlp import ACTIVATIONS
from jaxgpt.target import Target

Pair = tuple[Any, Any]
"""Keys and values: arrays, or what stands for arrays in a pytree."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Bottleneck:
    """A small MLP: down to R features, an activation, and up again (Houlsby et al. 2019, figure 2).

    Attributes:
      down_DR, down_bias_R, up_RD, up_bias_D: its parameters.
      activation: between the two projections.
      scale: factor of the output.
    """

    down_DR: Any
    down_bias_R: Any
    up_RD: Any
    up_bias_D: Any
    activation: Literal["gelu", "relu"] = field(default="gelu", metadata={"static": True})
    scale: float = field(default=1.0, metadata={"static": True})

    def __call__(self, x_BTD: jax.Array, dtype: jnp.dtype, target: Target) -> jax.Array:
        """What is added to the stream [B, T, D]."""
        h_BTR = add_bias(contract(x_BTD, self.down_DR, 1, dtype, target), self.down_bias_R, target)
        h_BTR = ACTIVATIONS[self.activation][0](h_BTR)
        y_BTD = add_bias(contract(h_BTR, self.up_RD, 1, dtype, target), self.up_bias_D, target)
        return (self.scale * y_BTD).astype(x_BTD.dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Bottlenecks:
    """The adapters of a layer, or of all with a leading layer axis.

    Attributes:
      attention, mlp: on the outputs of these branches.
      beside: on the input of the MLP's branch, whose output it is added to.
    """

    attention: Any = None
    mlp: Any = None
    beside: Any = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Added:
    """What is added to a model.

    Attributes:
      prompt_PD: embeddings of virtual tokens before every document (prompt tuning).
      prefix: keys and values [L, P, G, K] that every token attends to (prefix tuning).
      adapters: of the layers.
    """

    prompt_PD: Any = None
    prefix: Any = None
    adapters: Any = None

    @property
    def tokens(self) -> int:
        """Positions before every document's first: P."""
        if self.prefix is not None:
            return self.prefix[0].shape[1]
        return 0 if self.prompt_PD is None else len(self.prompt_PD)


NOTHING = Added()


def around(
    adapter: Bottleneck | None, dtype: jnp.dtype, target: Target
) -> Callable[[jax.Array], jax.Array] | None:
    """An adapter with the connection around it, for `layers.residual`; None without one."""
    return None if adapter is None else lambda x_BTD: x_BTD + adapter(x_BTD, dtype, target)
