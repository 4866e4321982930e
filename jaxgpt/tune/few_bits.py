"""Runs whose matrices are held in few bits, and training through that rounding.

A weight is saved under its own path as `codes`, two of 4 bits in a byte, and their `scale`; and `into`, what
its inputs are multiplied by, where the method scales them.

Shapes: L layers, I inputs, O outputs.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxgpt.config import Quantization, QuantizationAware
from jaxgpt.errors import require
from jaxgpt.layers.quantized import FOUR_BITS, Form, Quantized, from_codes, quantize
from jaxgpt.tune.base import About, Flat, Path, Tuning, flatten, linear_weights, module, unflatten
from jaxgpt.tune.ia3 import Scaled


def matrices(about: About, skip: Sequence[str]) -> dict[Path, Any]:
    """The weights that are held in few bits: those of role `matrix` (routers of experts stay), less `skip`.

    Raises:
      UserError: a pattern fits none, or no weight is left.
    """
    found = linear_weights(about)
    names = {path: module(path) for path in found}
    known = ", ".join(sorted(set(names.values())))
    for pattern in skip:
        fits = any(fnmatch.fnmatchcase(name, pattern) for name in names.values())
        require(fits, f"skip has {pattern!r}, which fits no linear layer of this model; there are {known}.")
    left = {p: v for p, v in found.items() if not any(fnmatch.fnmatchcase(names[p], s) for s in skip)}
    require(bool(left), f"skip leaves no linear layer of {known}; name fewer.")
    return left


def cuts(v: Any) -> tuple[int, int]:
    """Of a weight's axes, how many are of layers and experts, and how many of inputs."""
    facts = v.get_metadata()
    return int(facts["axes"][0] == "layers") + facts.get("lead", 0), facts["inputs"]


def held(params: dict, tune: Quantization, places: dict[Path, Any]) -> dict:
    """What is saved of parameters in few bits."""
    flat = flatten(params)
    for path, v in places.items():
        lead, inputs = cuts(v)
        weight, axis = flat.pop(path), lead + inputs - 1
        if isinstance(weight, Scaled):
            flat[(*path, "into")] = weight.into
            weight = weight.base
        codes = weight.array.qvalue
        flat[(*path, "codes")] = _packed(codes, axis) if tune.to in FOUR_BITS else codes
        flat[(*path, "scale")] = weight.array.scale
    return unflatten(flat)


def rounded(params: dict, form: Form, places: dict[Path, Any]) -> dict:
    """Float parameters with each of these weights rounded to the nearest value."""
    flat = flatten(params)
    for path, v in places.items():
        flat[path] = quantize(flat[path], form, *cuts(v))
    return unflatten(flat)


def whole_params(params: dict) -> dict:
    """Parameters of which every weight is an array again."""
    flat = flatten(params)
    whole = {path: p.whole() for path, p in flat.items() if isinstance(p, Quantized | Scaled)}
    return unflatten(flat | whole) if whole else params


def quantization(tune: Quantization, about: About) -> Tuning:
    """Matrices in few bits; all else is as it was."""
    places = matrices(about, tune.skip)

    def init(key: jax.Array, params: dict) -> dict:
        params = rounded(params, tune.to, places)
        if tune.method == "awq":
            flat = flatten(params)
            for path, v in places.items():
                if not v.get_metadata().get("lead", 0):
                    flat[path] = Scaled(flat[path], into=jnp.ones(v.shape[: sum(cuts(v))]))
            params = unflatten(flat)
        return held(params, tune, places)

    def enter(learned: dict, frozen: dict, key: jax.Array | None) -> dict:
        flat: Flat = flatten(learned)
        for path, v in places.items():
            codes, scale = flat.pop((*path, "codes")), flat.pop((*path, "scale"))
            if tune.to in FOUR_BITS:
                codes = _unpacked(codes, sum(cuts(v)) - 1, tune.to, v.shape)
            own: Any = Quantized(from_codes(codes, scale, tune.to), tune.activations)
            into = flat.pop((*path, "into"), None)
            flat[path] = own if into is None else Scaled(own, into=into)
        return unflatten(flat)

    shapes = jax.eval_shape(init, jax.random.key(0), nnx.to_pure_dict(about.state))
    learned = nnx.from_flat_state(
        [(path, _variable(path, leaf, about.variables)) for path, leaf in flatten(shapes).items()]
    )
    return Tuning(learned, init, lambda params: {}, enter, lambda own, _: whole_params(enter(own, {}, None)))


def _variable(path: Path, leaf: Any, variables: dict[Path, Any]) -> nnx.Param:
    """What is saved, with its axes: those of the weight that it stands for, where it is as long."""
    if path in variables:
        return variables[path]
    like = variables[path[:-1]]
    pairs = zip(like.get_metadata()["axes"], leaf.shape, like.shape, strict=False)
    halved = path[-1] == "codes"
    axes = tuple(name if size == whole or halved else "vector" for name, size, whole in pairs)
    return nnx.Param(leaf, axes=axes, role="matrix")


def _packed(codes: jax.Array, axis: int) -> jax.Array:
    """Codes of 4 bits as bytes: two in one along an even axis, else one."""
    low = codes.astype(jnp.int8).astype(jnp.uint8) & 15
    if codes.shape[axis] % 2:
        return low
    pairs = low.reshape(*codes.shape[:axis], -1, 2, *codes.shape[axis + 1 :])
    first, second = (jax.lax.index_in_dim(pairs, i, axis + 1, keepdims=False) for i in (0, 1))
    return first | second << 4


def _unpacked(packed: jax.Array, axis: int, form: Form, shape: Sequence[int]) -> jax.Array:
    """The inverse of `_packed`."""
    codes = packed
    if packed.shape[axis] != shape[axis]:
        codes = jnp.stack([packed & 15, packed >> 4], axis + 1).reshape(shape)
    if form == "nf4":
        return codes.astype(jnp.uint4)
    return ((codes ^ 8).astype(jnp.int8) - 8).astype(jnp.int4)


def quantization_aware(tune: QuantizationAware, about: About) -> Tuning:
    """All parameters, of which matrices enter the model as they will be rounded."""
    places = matrices(about, tune.skip)

    def enter(learned: dict, frozen: dict, key: jax.Array | None) -> dict:
        flat = flatten(learned)
        for path, v in places.items():
            nearby = quantize(flat[path], tune.to, *cuts(v)).whole()
            flat[path] = flat[path] + jax.lax.stop_gradient(nearby - flat[path])
        return unflatten(flat)

    def merge(learned: dict, frozen: dict) -> dict:
        return enter(learned, frozen, None)

    return Tuning(about.state, lambda key, params: params, lambda params: {}, enter, merge)
