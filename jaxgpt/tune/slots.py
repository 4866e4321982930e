"""Several LoRA adapters over one base, chosen for each row of a batch.

Shapes: B rows, T tokens, S slots, R the maximum rank, I inputs, O outputs; a leading axis of layers where
they are stacked.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxgpt.config import LoRA
from jaxgpt.config.tune import Tune
from jaxgpt.errors import require
from jaxgpt.layers.linear import weighted
from jaxgpt.target import Target
from jaxgpt.tune.base import Flat, flatten, unflatten


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Slots:
    """A weight with places for adapters: row b has `base + scale_S[s] a_S[s] b_S[s]` with s = ids_B[b].

    Slot 0 is empty: it stays the base alone.

    Attributes:
      base: a weight of any kind.
      a: [S, *inputs, R], zeros beyond an adapter's own rank.
      b: [S, R, *outputs].
      scale_S: of the products.
    """

    base: Any
    a: jax.Array
    b: jax.Array
    scale_S: jax.Array

    def product(
        self, x: jax.Array, axes: int, dtype: jnp.dtype, target: Target, ids: jax.Array | None = None
    ) -> jax.Array:
        """`layers.linear.contract` with the weight of each row; without ids, with the base."""
        y = weighted(x, self.base, axes, dtype, target)
        if ids is None:
            return y
        (B, T), R, outputs = x.shape[:2], self.a.shape[-1], self.b.shape[2:]
        a_BIR = self.a[ids].reshape(B, -1, R).astype(dtype)
        b_BRO = self.b[ids].reshape(B, R, -1).astype(dtype)
        x_BTI = x.reshape(B, T, -1).astype(dtype)
        low_BTR = jnp.einsum("bti,bir->btr", x_BTI, a_BIR, preferred_element_type=jnp.float32)
        low_BTR = (low_BTR * self.scale_S[ids][:, None, None]).astype(dtype)
        more_BTO = jnp.einsum("btr,bro->bto", low_BTR, b_BRO, preferred_element_type=jnp.float32)
        return y + more_BTO.reshape(B, T, *outputs).astype(y.dtype)


def with_slots(params: dict, state: nnx.State, slots: int, rank: int) -> dict:
    """Parameters, as decoding runs them, whose linear layers have empty slots.

    Args:
      params: from `sample.program.prepare`.
      state: the module's abstract state in the same form, with axes and roles.
      slots: S, the empty one included.
      rank: R.
    """
    flat = flatten(params)
    for path, v in nnx.to_flat_state(state):
        about = v.get_metadata()
        fits = about["role"] == "matrix" and path[0] == "blocks" and "router" not in path
        if not fits or about.get("lead", 0):
            continue
        lead = int(about["axes"][0] == "layers")
        cut, base = lead + about["inputs"], flat[path]
        dtype = getattr(base, "dtype", jnp.float32)  # none of one in few bits
        a = jnp.zeros((*v.shape[:lead], slots, *v.shape[lead:cut], rank), dtype)
        b = jnp.zeros((*v.shape[:lead], slots, rank, *v.shape[cut:]), dtype)
        flat[path] = Slots(base, a, b, jnp.zeros((*v.shape[:lead], slots), jnp.float32))
    return unflatten(flat)


def check_adapter(tune: Tune, rank: int, name: str) -> LoRA:
    """The config of an adapter that a slot can hold.

    Raises:
      UserError: it is no LoRA, changes the base's weights, or has a higher rank.
    """
    fits = type(tune) is LoRA and tune.init == "zero" and tune.base == "float"
    kind = type(tune).__name__ if type(tune) is not LoRA else f"LoRA(init={tune.init!r}, base={tune.base!r})"
    require(
        fits,
        f"adapter {name} is {kind}; a slot holds a LoRA of init 'zero' over a base that is not quantized.",
    )
    assert isinstance(tune, LoRA)
    require(
        tune.rank <= rank,
        f"adapter {name} has rank {tune.rank} but slots have {rank}; make slots of that rank.",
    )
    return tune


def padded(params: Flat, adapter: Mapping[Any, Any], tune: LoRA) -> Flat:
    """An adapter for every weight with slots, in one slot's shapes: zeros where it has none.

    Args:
      params: parameters with slots.
      adapter: what was trained, by path, on the host, in the form of `params` (stacked or by layer).
      tune: its config.
    """
    found = {}
    for path, weight in params.items():
        if not isinstance(weight, Slots):
            continue
        lead = weight.scale_S.ndim - 1
        a_shape = weight.a.shape[:lead] + weight.a.shape[lead + 1 :]
        b_shape = weight.b.shape[:lead] + weight.b.shape[lead + 1 :]
        a, b = (adapter.get((*path, name)) for name in "ab")
        if a is None or b is None:
            parts = (np.zeros(a_shape), np.zeros(b_shape), np.zeros(a_shape[:lead]))
        else:
            more = weight.a.shape[-1] - a.shape[-1]
            a = np.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, more)])
            b = np.pad(b, [(0, more if axis == lead else 0) for axis in range(b.ndim)])
            parts = (a, b, np.full(a_shape[:lead], tune.scale))
        found[path] = tuple(part.astype(np.float32) for part in parts)
    return found


@functools.partial(jax.jit, donate_argnums=0)
def fill(params: dict, number: jax.Array, adapter: dict) -> dict:
    """Parameters with an adapter, from `padded`, in a slot; the same program for every slot and adapter."""
    flat = flatten(params)
    for path, parts in adapter.items():
        weight = flat[path]
        axis = weight.scale_S.ndim - 1
        put = functools.partial(jax.lax.dynamic_update_index_in_dim, index=number, axis=axis)
        held = (weight.a, weight.b, weight.scale_S)
        a, b, scale_S = (put(old, new.astype(old.dtype)) for old, new in zip(held, parts, strict=True))
        flat[path] = Slots(weight.base, a, b, scale_S)
    return unflatten(flat)
