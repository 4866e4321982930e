"""(IA)^3: factors of the keys, the values and the MLP's hidden features (Liu et al. 2022, section 3.3).

Shapes: I inputs, O outputs; a leading axis of layers, then one of experts, where the weight has them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxgpt.config import IA3
from jaxgpt.layers.linear import weighted
from jaxgpt.target import Target
from jaxgpt.tune.base import (
    About,
    Path,
    Tuning,
    chosen,
    flatten,
    linear_weights,
    unflatten,
    variable,
    with_own,
)

OUTPUTS, INPUTS = ("*attention.k", "*attention.v"), ("*mlp.down",)
"""Modules whose outputs, and whose inputs, are scaled."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Scaled:
    """A weight whose inputs [*inputs] or outputs [*outputs] are multiplied by factors; None for the other."""

    base: Any
    into: jax.Array | None = None
    out: jax.Array | None = None

    def product(
        self, x: jax.Array, axes: int, dtype: jnp.dtype, target: Target, ids: jax.Array | None = None
    ) -> jax.Array:
        """`layers.linear.contract` with this weight."""
        x = x if self.into is None else x * self.into.astype(x.dtype)
        y = weighted(x, self.base, axes, dtype, target)
        return y if self.out is None else y * self.out.astype(y.dtype)

    def whole(self) -> jax.Array:
        """The weight as an array, where inputs alone are scaled."""
        assert self.into is not None and self.out is None
        base = self.base if isinstance(self.base, jax.Array) else self.base.whole()
        return base * self.into.reshape(*self.into.shape, *(1,) * (base.ndim - self.into.ndim))

    def layout(self, split: P) -> Scaled:
        """How the arrays of experts' weights are sharded."""
        experts, inputs, outputs = split
        whole: Any = Scaled
        into = None if self.into is None else P(experts, inputs)
        return whole(split, into, None if self.out is None else P(experts, outputs))


def ia3(tune: IA3, about: About) -> Tuning:
    """Factors, 1 at first, of every layer's keys, values and hidden features of the MLP."""
    weights = linear_weights(about)
    out, into = chosen(weights, OUTPUTS, "IA3"), chosen(weights, INPUTS, "IA3")

    def cuts(v: Any) -> tuple[int, int]:
        """Numbers of leading axes, and of those before the outputs."""
        facts = v.get_metadata()
        lead = int(facts["axes"][0] == "layers") + facts.get("lead", 0)
        return lead, lead + facts["inputs"]

    def factor(v: Any, of_outputs: bool) -> nnx.Param:
        lead, cut = cuts(v)
        axes, span = v.get_metadata()["axes"], slice(cut, None) if of_outputs else slice(lead, cut)
        return variable(v.shape[:lead] + v.shape[span], axes[:lead] + axes[span], "norm")

    own = {(*p, "out"): factor(v, True) for p, v in out.items()}
    own |= {(*p, "into"): factor(v, False) for p, v in into.items()}
    learned = nnx.from_flat_state(list(own.items()))

    def bias(path: Path) -> Path:
        return (*path[:-1], "bias")

    def init(key: jax.Array, params: dict) -> dict:
        return unflatten({path: jnp.ones(v.shape, jnp.float32) for path, v in own.items()})

    def enter(learned: dict, frozen: dict, key: jax.Array | None) -> dict:
        flat, mine = flatten(frozen), flatten(learned)
        for *names, side in own:
            path = tuple(names)
            flat[path] = Scaled(flat[path], **{side: mine[(*path, side)]})
            if side == "out" and bias(path) in flat:  # what is scaled is the whole output
                flat[bias(path)] = flat[bias(path)] * mine[(*path, side)]
        return unflatten(flat)

    def merge(learned: dict, frozen: dict) -> dict:
        flat = flatten(enter(learned, frozen, None))
        for path, v in (out | into).items():
            weight, (lead, cut) = flat[path], cuts(v)
            over = tuple(range(lead, cut)) if weight.into is None else tuple(range(cut, v.ndim))
            factor = weight.out if weight.into is None else weight.into
            flat[path] = weight.base * jnp.expand_dims(factor, over)
        return unflatten(flat)

    return with_own(about, about.head, Tuning(learned, init, lambda params: params, enter, merge))
