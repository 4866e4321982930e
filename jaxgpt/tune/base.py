"""What every method says: what is trained, how it is born, and how it enters the model's parameters.

A path is the tuple of names of a parameter, such as ("blocks", "attention", "q", "weight"). Trees are pure
dicts. What is trained of a weight lies under the weight's own path, (..., "weight", "a").

Shapes: L layers, I inputs, O outputs.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxgpt.config import Compute, Model
from jaxgpt.errors import require
from jaxgpt.target import Target

Path = tuple[Any, ...]
Flat = dict[Path, Any]


@dataclass(frozen=True)
class Tuning:
    """A method over one model. All functions are pure and may be traced.

    Attributes:
      learned: what is trained and saved, an abstract `nnx.State` with every variable's axes and role.
      init: (key, parameters of the whole model) -> what is trained, at first.
      freeze: parameters of the whole model -> what stays as it is, beside what is trained.
      enter: (trained, frozen, key of dropout or None) -> parameters that `models.assemble` takes; weights may
        be of other kinds than arrays.
      merge: (trained, frozen) -> the same with arrays as weights: those of a model without the method, unless
        it adds something beside weights.
    """

    learned: nnx.State
    init: Callable[[jax.Array, dict], dict]
    freeze: Callable[[dict], dict]
    enter: Callable[[dict, dict, jax.Array | None], dict]
    merge: Callable[[dict, dict], dict]


@dataclass(frozen=True)
class About:
    """What a method is told of the model that it tunes.

    Attributes:
      model: the architecture.
      compute, target: of the program.
      state: the model's parameters, abstract, with their axes and roles.
    """

    model: Model
    compute: Compute
    target: Target
    state: nnx.State

    @property
    def variables(self) -> dict[Path, Any]:
        """The model's abstract variables by path."""
        return dict(nnx.to_flat_state(self.state))

    @property
    def head(self) -> set[Path]:
        """Paths of a head over labels: it is new to the model, so that every method trains it."""
        labelled = any(path[0] == "backbone" for path in self.variables)
        return {path for path in self.variables if path[0] != "backbone"} if labelled else set()


def flatten(tree: Mapping[str, Any]) -> Flat:
    """A pure dict by path; a weight that is no array is a leaf."""
    found: Flat = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            found |= {(name, *path): leaf for path, leaf in flatten(value).items()}
        else:
            found[(name,)] = value
    return found


def unflatten(flat: Mapping[Path, Any]) -> dict:
    """The inverse of `flatten`."""
    tree: dict = {}
    for path, leaf in flat.items():
        here = tree
        for name in path[:-1]:
            here = here.setdefault(name, {})
        here[path[-1]] = leaf
    return tree


def variable(shape: Iterable[int], axes: tuple[str, ...], role: str, **more: Any) -> nnx.Param:
    """An abstract float32 variable."""
    return nnx.Param(jax.ShapeDtypeStruct(tuple(shape), jnp.float32), axes=axes, role=role, **more)


def module(path: Path) -> str:
    """The name of a weight's module, as patterns see it: without a backbone and the word `weight`."""
    return ".".join(str(name) for name in path[:-1] if name != "backbone")


def linear_weights(about: About) -> dict[Path, Any]:
    """The weights of linear layers that an adapter may stand beside (routers of experts may not)."""
    return {
        path: v
        for path, v in about.variables.items()
        if path[-1] == "weight" and v.get_metadata()["role"] == "matrix" and "router" not in path
    }


def chosen(weights: Mapping[Path, Any], patterns: Iterable[str], field: str) -> dict[Path, Any]:
    """The weights whose module's name fits one of the patterns.

    Raises:
      UserError: a pattern fits none; it names all there are.
    """
    names = {path: module(path) for path in weights}
    for pattern in patterns:
        require(
            any(fnmatch.fnmatchcase(name, pattern) for name in names.values()),
            f"{field} has {pattern!r}, which fits no linear layer of this model; there are "
            f"{', '.join(sorted(set(names.values())))}.",
        )
    fits = {path for path, name in names.items() if any(fnmatch.fnmatchcase(name, p) for p in patterns)}
    return {path: v for path, v in weights.items() if path in fits}


def selected(about: About, paths: set[Path], words: str) -> Tuning:
    """A method that trains some of the model's own parameters and adds nothing.

    Raises:
      UserError: there are none of these.
    """
    require(bool(paths), f"tune trains {words}, of which this model has none; choose another method.")
    trained = paths | about.head
    learned = nnx.from_flat_state([(p, v) for p, v in about.variables.items() if p in trained])

    def init(key: jax.Array, params: dict) -> dict:
        return unflatten({p: v for p, v in flatten(params).items() if p in trained})

    def freeze(params: dict) -> dict:
        return unflatten({p: v for p, v in flatten(params).items() if p not in trained})

    def enter(learned: dict, frozen: dict, key: jax.Array | None) -> dict:
        return unflatten(flatten(frozen) | flatten(learned))

    return Tuning(learned, init, freeze, enter, lambda learned, frozen: enter(learned, frozen, None))


def with_own(about: About, paths: set[Path], method: Tuning) -> Tuning:
    """A method that also trains these parameters of the model's own."""
    if not paths:
        return method
    own = selected(about, paths, "")
    learned = nnx.from_flat_state([*nnx.to_flat_state(method.learned), *nnx.to_flat_state(own.learned)])

    def init(key: jax.Array, params: dict) -> dict:
        return unflatten(flatten(method.init(key, params)) | flatten(own.init(key, params)))

    def freeze(params: dict) -> dict:
        return unflatten({p: v for p, v in flatten(method.freeze(params)).items() if p not in paths})

    def split(learned: dict, frozen: dict) -> tuple[dict, dict]:
        """What is the method's, and the model around it."""
        flat = flatten(learned)
        mine = unflatten({p: v for p, v in flat.items() if p not in paths})
        return mine, unflatten(flatten(frozen) | {p: v for p, v in flat.items() if p in paths})

    def enter(learned: dict, frozen: dict, key: jax.Array | None) -> dict:
        return method.enter(*split(learned, frozen), key)

    def merge(learned: dict, frozen: dict) -> dict:
        return method.merge(*split(learned, frozen))

    return Tuning(learned, init, freeze, enter, merge)
