"""LoRA and DoRA: a product of two thin matrices beside each weight.

Shapes: I inputs, O outputs, R rank; a leading axis of layers, then one of experts, where the weight has them.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxgpt.config import DoRA, LoRA
from jaxgpt.errors import require
from jaxgpt.layers.linear import contract, weighted
from jaxgpt.layers.quantized import Quantized, quantize
from jaxgpt.layers.residual import dropout
from jaxgpt.target import Target
from jaxgpt.tune.base import (
    About,
    Path,
    Tuning,
    chosen,
    flatten,
    linear_weights,
    module,
    unflatten,
    variable,
    with_own,
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Adapted:
    """The weight `base + scale a b` (Hu et al. 2022, section 4.1), never added up; or with DoRA's magnitude.

    Attributes:
      base: a weight of any kind; it gets no gradient.
      a: [*inputs, R].
      b: [R, *outputs].
      magnitude: [*outputs], the norm of each output's column (Liu et al. 2024, equation 5); None for LoRA.
      key: of dropout on the adapter's input; None for none.
      scale: factor of the product.
      rate: of dropout.
    """

    base: Any
    a: jax.Array
    b: jax.Array
    magnitude: jax.Array | None = None
    key: jax.Array | None = None
    scale: float = field(default=1.0, metadata={"static": True})
    rate: float = field(default=0.0, metadata={"static": True})

    def product(
        self, x: jax.Array, axes: int, dtype: jnp.dtype, target: Target, ids: jax.Array | None = None
    ) -> jax.Array:
        """`layers.linear.contract` with this weight."""
        y = weighted(x, self.base, axes, dtype, target)
        low = contract(dropout(x, self.rate, self.key), self.a, axes, dtype, target)
        y = y + (self.scale * contract(low, self.b, 1, dtype, target)).astype(y.dtype)
        if self.magnitude is None:
            return y
        # The norm counts as a constant in the backward pass (section 4.3 of the paper).
        norm = jax.lax.stop_gradient(column_norms(self.whole(axes), 0, axes))
        return y * (self.magnitude / norm).astype(y.dtype)

    def whole(self, axes: int) -> jax.Array:
        """The sum without magnitude, float32, of one layer."""
        base = self.base.whole() if isinstance(self.base, Quantized) else self.base
        return base + self.scale * jnp.tensordot(self.a, self.b, 1)

    def layout(self, split: P) -> Adapted:
        """How the arrays of experts' weights are sharded: like [E, I, O], the rank not at all."""
        experts, inputs, outputs = split
        whole: Any = Adapted
        return whole(split, P(experts, inputs, None), P(experts, None, outputs), scale=self.scale)


def column_norms(weight: jax.Array, lead: int, inputs: int) -> jax.Array:
    """The norm of each output's weights [*lead, *outputs]."""
    return jnp.sqrt(jnp.sum(jnp.square(weight), axis=range(lead, lead + inputs)))


@dataclass(frozen=True)
class _Place:
    """A weight that gets an adapter: its shape [*lead, *inputs, *outputs] and axes."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    lead: int
    inputs: int
    experts: bool

    @classmethod
    def of(cls, v: Any) -> _Place:
        about = v.get_metadata()
        axes, experts = about["axes"], bool(about.get("lead", 0))
        return cls(tuple(v.shape), axes, int(axes[0] == "layers") + experts, about["inputs"], experts)

    @property
    def cut(self) -> int:
        """Where outputs begin."""
        return self.lead + self.inputs

    def learned(self, tune: LoRA) -> dict[str, nnx.Param]:
        """The adapter's abstract variables by name."""
        R, cut, lead = tune.rank, self.cut, self.lead
        how: dict[str, Any] = {"lead": 1} if self.experts else {}
        found = {
            "a": variable(
                (*self.shape[:cut], R), (*self.axes[:cut], "rank"), "matrix", inputs=self.inputs, **how
            ),
            "b": variable(
                (*self.shape[:lead], R, *self.shape[cut:]),
                (*self.axes[:lead], "rank", *self.axes[cut:]),
                "matrix",
                inputs=1,
                rate=tune.lr_ratio,
                **how,
            ),
        }
        if isinstance(tune, DoRA):
            shape, axes = self.shape[:lead] + self.shape[cut:], self.axes[:lead] + self.axes[cut:]
            found["magnitude"] = variable(shape, axes, "norm")
        return found

    def product(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """`a b` in the weight's shape."""
        layers, rank, outputs = self.shape[: self.lead], a.shape[-1], self.shape[self.cut :]
        return jnp.matmul(a.reshape(*layers, -1, rank), b.reshape(*layers, rank, -1)).reshape(
            *self.shape[: self.cut], *outputs
        )

    def matrix(self, weight: jax.Array) -> jax.Array:
        """A weight as [*lead, I, O]."""
        return weight.reshape(*self.shape[: self.lead], math.prod(self.shape[self.lead : self.cut]), -1)


def lora(tune: LoRA, about: About) -> Tuning:
    """LoRA or DoRA over the linear layers that `tune.targets` name."""
    places = {
        path: _Place.of(v) for path, v in chosen(linear_weights(about), tune.targets, "tune.targets").items()
    }
    _check(tune, places)
    names = list(places[next(iter(places))].learned(tune))
    learned = nnx.from_flat_state(
        [((*path, name), v) for path, place in places.items() for name, v in place.learned(tune).items()]
    )

    def born(place: _Place, key: jax.Array, weight: jax.Array) -> dict[str, jax.Array]:
        shapes = {name: v.shape for name, v in place.learned(tune).items()}
        if tune.init == "pissa":
            return dict(zip("ab", _principal(tune, place, weight), strict=True))
        # As in peft and in the paper's code: uniform with a standard deviation of 1 / sqrt(3 I).
        limit = math.prod(place.shape[place.lead : place.cut]) ** -0.5
        found = {"a": jax.random.uniform(key, shapes["a"], jnp.float32, -limit, limit)}
        found["b"] = jnp.zeros(shapes["b"], jnp.float32)
        if isinstance(tune, DoRA):
            base = quantize(weight, tune.base, place.lead, place.inputs) if tune.base != "float" else weight
            base = base.whole() if isinstance(base, Quantized) else base
            found["magnitude"] = column_norms(base, place.lead, place.inputs)
        return found

    def init(key: jax.Array, params: dict) -> dict:
        flat = flatten(params)
        found = {}
        for path, place in places.items():
            own = jax.random.fold_in(key, zlib.crc32(module(path).encode()))
            found |= {(*path, name): leaf for name, leaf in born(place, own, flat[path]).items()}
        return unflatten(found)

    def freeze(params: dict) -> dict:
        flat = flatten(params)
        for path, place in places.items():
            weight = flat[path]
            if tune.init == "pissa":
                weight = weight - tune.scale * place.product(*_principal(tune, place, weight))
            if tune.base != "float":
                weight = quantize(weight, tune.base, place.lead, place.inputs)
            flat[path] = weight
        return unflatten(flat)

    def parts(learned: dict, path: Path) -> dict[str, jax.Array]:
        flat = flatten(learned)
        return {name: flat[(*path, name)] for name in names}

    def enter(learned: dict, frozen: dict, key: jax.Array | None) -> dict:
        flat = flatten(frozen)
        for number, (path, place) in enumerate(places.items()):
            own, rate = None, 0.0
            if key is not None and tune.dropout > 0:
                own, rate = jax.random.fold_in(key, number), tune.dropout
                own = jax.random.split(own, place.shape[0]) if place.lead else own
            flat[path] = Adapted(flat[path], **parts(learned, path), key=own, scale=tune.scale, rate=rate)
        return unflatten(flat)

    def merge(learned: dict, frozen: dict) -> dict:
        flat = flatten(frozen)
        for path, place in places.items():
            own = parts(learned, path)
            base = flat[path].whole() if isinstance(flat[path], Quantized) else flat[path]
            weight = base + tune.scale * place.product(own["a"], own["b"])
            if "magnitude" in own:
                factor = own["magnitude"] / column_norms(weight, place.lead, place.inputs)
                weight = weight * jnp.expand_dims(factor, tuple(range(place.lead, place.cut)))
            flat[path] = weight
        return unflatten(flat)

    return with_own(about, about.head, Tuning(learned, init, freeze, enter, merge))


def _check(tune: LoRA, places: dict[Path, _Place]) -> None:
    experts = [module(path) for path, place in places.items() if place.experts]
    fix = f"leave {', '.join(experts)} out of tune.targets, or change it"
    for bad, words in (
        (tune.dropout > 0, f"tune.dropout is {tune.dropout} but adapters of experts have no dropout"),
        (tune.base != "float", f"tune.base is {tune.base!r} but weights of experts are not quantized"),
        (isinstance(tune, DoRA), "tune is DoRA but weights of experts have no magnitude"),
    ):
        require(not (experts and bad), f"{words}; {fix}.")
    for path, place in places.items():
        size = place.shape[place.lead : place.cut], place.shape[place.cut :]
        least = min(math.prod(side) for side in size)
        require(
            tune.init != "pissa" or tune.rank <= least,
            f"tune.rank is {tune.rank} but {module(path)} has only {least} singular values; "
            "lower it or set tune.init to 'zero'.",
        )


def _principal(tune: LoRA, place: _Place, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A and B whose scaled product is the weight's part of the largest singular values (PiSSA, equations 2
    and 3).
    """
    u, s, vt = jnp.linalg.svd(place.matrix(weight), full_matrices=False)
    root = jnp.sqrt(s[..., : tune.rank] / tune.scale)
    a, b = u[..., : tune.rank] * root[..., None, :], root[..., :, None] * vt[..., : tune.rank, :]
    lead, cut = place.shape[: place.lead], place.cut
    return a.reshape(*place.shape[:cut], tune.rank), b.reshape(*lead, tune.rank, *place.shape[cut:])
