"""A mixture of experts in the place of the MLP: top-k routing, no token dropped.

Shapes: B batch, T length, D width, E experts, K experts a token, N tokens, F hidden width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxgpt.config import GPT, Compute
from jaxgpt.layers.linear import GroupedLinear, Linear, grouped_product
from jaxgpt.layers.mlp import ACTIVATIONS, MLP
from jaxgpt.sharding import spec
from jaxgpt.target import Target


class Experts(nnx.Module):
    """Top-k of E gated or plain MLPs (Shazeer et al. 2017; Mixtral, Jiang et al. 2024, section 2.1).

    With `shared_width`, an MLP that all tokens pass is added behind a sigmoid gate (Qwen2-MoE).
    """

    def __init__(self, key: jax.Array, model: GPT, compute: Compute, target: Target) -> None:
        assert model.moe is not None
        self.moe, self.dtype = model.moe, jnp.dtype(compute.dtype)
        D, E, F = model.width, model.moe.experts, model.moe.width or model.hidden
        keys = jax.random.split(key, 6)
        self.activation, gated = ACTIVATIONS[model.mlp]
        # In float32: a rounded logit can send a token to another expert.
        routes, how = ("embed", "vector"), {"bias": False, "std": 0.02, "target": target}
        self.router = Linear(keys[0], (D,), (E,), routes, dtype=jnp.dtype("float32"), **how)
        self.up = GroupedLinear(keys[1], E, D, F, ("embed", "mlp"), std=0.02)
        self.gate = GroupedLinear(keys[2], E, D, F, ("embed", "mlp"), std=0.02) if gated else None
        self.down = GroupedLinear(keys[3], E, F, D, ("mlp", "embed"), std=0.02 * (2 * model.layers) ** -0.5)
        shared = model.moe.shared_width
        self.shared = MLP(keys[4], model, compute, target, shared) if shared else None
        self.shared_gate = Linear(keys[5], (D,), (1,), routes, dtype=self.dtype, **how) if shared else None

    def __call__(self, x_BTD: jax.Array, real_BT: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """Each token's experts, weighted.

        Args:
          x_BTD: features.
          real_BT: False on padding, which does not count in the balance.

        Returns:
          [B, T, D], and the load-balancing loss times its weight (Switch Transformers, equation 4,
          over the k choices): smallest where every expert is chosen alike.
        """
        probs_BTE = jax.nn.softmax(self.router(x_BTD.astype(jnp.float32)), axis=-1)
        weights_BTK, experts_BTK = jax.lax.top_k(probs_BTE, self.moe.per_token)
        if self.moe.normalise:
            weights_BTK = weights_BTK / weights_BTK.sum(-1, keepdims=True)
        gate = None if self.gate is None else self.gate.weight[...]
        run = functools.partial(_mix, self.activation, self.dtype)
        args = (x_BTD, experts_BTK, weights_BTK, self.up.weight[...], gate, self.down.weight[...])
        if jax.sharding.get_abstract_mesh().empty:
            y_BTD = run(*args)
        else:
            rows, wide = spec(("batch", "length", "features")), P("expert", None, "tensor")
            layouts = (rows, rows, rows, wide, None if gate is None else wide, P("expert", "tensor", None))
            run = functools.partial(_mix_sharded, self.activation, self.dtype)
            y_BTD = jax.shard_map(run, in_specs=layouts, out_specs=rows, check_vma=False)(*args)
        if self.shared is not None and self.shared_gate is not None:
            y_BTD = y_BTD + jax.nn.sigmoid(self.shared_gate(x_BTD)) * self.shared(x_BTD)
        return y_BTD.astype(x_BTD.dtype), self.moe.balance * _imbalance(probs_BTE, experts_BTK, real_BT)


def _imbalance(probs_BTE: jax.Array, experts_BTK: jax.Array, real_BT: jax.Array | None) -> jax.Array:
    """E times the sum over experts of (share of tokens sent there) x (mean probability)."""
    E = probs_BTE.shape[-1]
    weight_BT1 = jnp.ones((*probs_BTE.shape[:2], 1)) if real_BT is None else real_BT[..., None]
    total = jnp.maximum(weight_BT1.sum(), 1)
    sent_BTE = jax.nn.one_hot(experts_BTK, E).sum(-2)
    share_E = jnp.sum(sent_BTE * weight_BT1, (0, 1)) / total
    return E * jnp.sum(share_E * jnp.sum(probs_BTE * weight_BT1, (0, 1)) / total)


def _mix(
    activation: Callable[[jax.Array], jax.Array],
    dtype: jnp.dtype,
    x_BTD: jax.Array,
    experts_BTK: jax.Array,
    weights_BTK: jax.Array,
    up_EDF: jax.Array,
    gate_EDF: jax.Array | None,
    down_EFD: jax.Array,
    first: jax.Array | int = 0,
) -> jax.Array:
    """The weighted sum of those of each token's experts that are here: `first` and the E - 1 after it.

    Every (token, choice) pair is a row; rows are sorted by expert, so that each expert's are one
    block, of whatever size: nothing is dropped and nothing padded.
    """
    (B, T, K), E, D = experts_BTK.shape, up_EDF.shape[0], x_BTD.shape[-1]
    expert_N = experts_BTK.reshape(-1) - first
    here_N = (expert_N >= 0) & (expert_N < E)
    expert_N = jnp.where(here_N, expert_N, E)  # those of other devices come last
    order_N = jnp.argsort(expert_N, stable=True)
    sizes_E = jnp.bincount(expert_N, length=E).astype(jnp.int32)
    token_N = order_N // K
    x_ND = x_BTD.reshape(-1, D)[token_N]
    h_NF = grouped_product(x_ND, up_EDF, sizes_E, dtype)
    if gate_EDF is None:
        h_NF = activation(h_NF)
    else:
        h_NF = activation(grouped_product(x_ND, gate_EDF, sizes_E, dtype)) * h_NF
    y_ND = grouped_product(h_NF, down_EFD, sizes_E, dtype)
    y_ND = jnp.where(here_N[order_N, None], y_ND * weights_BTK.reshape(-1)[order_N, None], 0)
    return jnp.zeros((B * T, D), jnp.float32).at[token_N].add(y_ND).reshape(B, T, D)


def _mix_sharded(
    activation: Callable[[jax.Array], jax.Array],
    dtype: jnp.dtype,
    x_BTD: jax.Array,
    experts_BTK: jax.Array,
    weights_BTK: jax.Array,
    *weights: jax.Array | None,
) -> jax.Array:
    """`_mix` on one device's experts, for the rows of all devices along the mesh axis `expert`.

    The rows are gathered along that axis, and the sums scattered back to their devices.
    """
    x, experts, shares = (
        jax.lax.all_gather(a, "expert", tiled=True) for a in (x_BTD, experts_BTK, weights_BTK)
    )
    up, gate, down = weights
    assert up is not None and down is not None
    first = jax.lax.axis_index("expert") * up.shape[0]
    y_BTD = _mix(activation, dtype, x, experts, shares, up, gate, down, first)
    return jax.lax.psum(jax.lax.psum_scatter(y_BTD, "expert", tiled=True), "tensor")
