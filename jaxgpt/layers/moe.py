"""A mixture of experts in place of the MLP: top-k routing, no token dropped.

Shapes: B batch, T length, D hidden size, E experts, K experts per token, N tokens, F MLP hidden size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxgpt.config import GPT, Compute
from jaxgpt.layers.dispatch import mix
from jaxgpt.layers.linear import GroupedLinear, Linear
from jaxgpt.layers.mlp import ACTIVATIONS, MLP
from jaxgpt.target import Target


class Routing(NamedTuple):
    """Statistics of a layer's routing; scalars."""

    balance: jax.Array
    """The load-balancing loss times its weight."""
    rounds: jax.Array
    """Number of rounds of the buffers between devices until every row was sent."""
    fill: jax.Array
    """Fraction of these buffers' slots that held a row."""


class Experts(nnx.Module):
    """Top-k of E gated or plain MLPs (Shazeer et al. 2017; Mixtral, Jiang et al. 2024, section 2.1).

    With `shared_width`, an MLP that all tokens pass through is added, with a sigmoid gate (Qwen2-MoE).
    """

    def __init__(self, key: jax.Array, model: GPT, compute: Compute, target: Target) -> None:
        assert model.moe is not None
        self.moe, self.dtype = model.moe, jnp.dtype(compute.dtype)
        D, E, F = model.width, model.moe.experts, model.moe.width or model.hidden
        keys = jax.random.split(key, 6)
        self.activation, gated = ACTIVATIONS[model.mlp]
        # In float32: a rounded logit can send a token to another expert.
        routes, how = ("embed", "vector"), {"bias": False, "std": 0.02, "target": target}
        exact = {"dtype": jnp.dtype("float32"), "precision": jax.lax.Precision.HIGHEST}
        self.router = Linear(keys[0], (D,), (E,), routes, **exact, **how)
        wide, grouped = ("embed", "mlp"), {"dtype": self.dtype, "target": target}
        self.up = GroupedLinear(keys[1], E, D, F, wide, std=0.02, **grouped)
        self.gate = GroupedLinear(keys[2], E, D, F, wide, std=0.02, **grouped) if gated else None
        std = 0.02 * (2 * model.layers) ** -0.5
        self.down = GroupedLinear(keys[3], E, F, D, ("mlp", "embed"), std=std, **grouped)
        shared = model.moe.shared_width
        self.shared = MLP(keys[4], model, compute, target, shared) if shared else None
        self.shared_gate = Linear(keys[5], (D,), (1,), routes, dtype=self.dtype, **how) if shared else None

    @jax.named_scope("experts")
    def __call__(self, x_BTD: jax.Array, real_BT: jax.Array | None = None) -> tuple[jax.Array, Routing]:
        """The weighted sum of each token's experts.

        Args:
          x_BTD: features.
          real_BT: False on padding, which goes to no expert and does not count in the balance.

        Returns:
          [B, T, D], and statistics of the routing. The balance (Switch Transformers, equation 4, over the k
          choices) is smallest when all experts are chosen equally often. It is a product of two means over
          the tokens of this call on all devices. So each microbatch is balanced separately, which requires a
          little more than balance over all of them together.
        """
        probs_BTE = jax.nn.softmax(self.router(x_BTD.astype(jnp.float32)), axis=-1)
        shares_BTK, experts_BTK = jax.lax.top_k(probs_BTE, self.moe.per_token)
        if self.moe.normalise:
            shares_BTK = shares_BTK / shares_BTK.sum(-1, keepdims=True)
        balance = self.moe.balance * _imbalance(probs_BTE, experts_BTK, real_BT)
        if real_BT is not None:
            experts_BTK = jnp.where(real_BT[..., None], experts_BTK, self.moe.experts)
        products = {"up": self.up, "down": self.down} | ({"gate": self.gate} if self.gate else {})
        graphdef, state = nnx.split(products)
        weights = nnx.to_pure_dict(state)
        layout = {name: {"weight": product.layout()} for name, product in products.items()}

        def expert(weights: Any, x_SD: jax.Array, share_S: jax.Array) -> jax.Array:
            own = nnx.merge(graphdef, weights)
            h_SF = own["up"](x_SD)
            h_SF = self.activation(own["gate"](x_SD)) * h_SF if "gate" in own else self.activation(h_SF)
            # Weighted before the last product, so its output is not needed for the gradient of the share.
            # In float32, because that gradient is a sum over the whole MLP hidden size.
            return own["down"]((h_SF.astype(jnp.float32) * share_S[:, None]).astype(h_SF.dtype))

        y_BTD, traffic = mix(
            expert,
            layout,
            weights,
            x_BTD,
            experts_BTK,
            shares_BTK,
            experts=self.moe.experts,
            dtype=self.dtype,
        )
        if self.shared is not None and self.shared_gate is not None:
            open_BT1 = jax.nn.sigmoid(self.shared_gate(x_BTD).astype(jnp.float32))
            y_BTD = y_BTD + open_BT1 * self.shared(x_BTD).astype(jnp.float32)
        return y_BTD.astype(x_BTD.dtype), Routing(balance, *traffic)


def _imbalance(probs_BTE: jax.Array, experts_BTK: jax.Array, real_BT: jax.Array | None) -> jax.Array:
    """E times the sum over experts of (fraction of tokens sent there) x (mean probability)."""
    E = probs_BTE.shape[-1]
    weight_BT1 = jnp.ones((*probs_BTE.shape[:2], 1)) if real_BT is None else real_BT[..., None]
    total = jnp.maximum(weight_BT1.sum(), 1)
    sent_BTE = jax.nn.one_hot(experts_BTK, E).sum(-2)
    share_E = jnp.sum(sent_BTE * weight_BT1, (0, 1)) / total
    return E * jnp.sum(share_E * jnp.sum(probs_BTE * weight_BT1, (0, 1)) / total)
