"""Methods that train some of the model's own parameters: the biases, or the last layers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxgpt.config import BitFit, LastLayers
from jaxgpt.errors import require
from jaxgpt.tune.base import About, Path, Tuning, flatten, selected, unflatten, variable

BEFORE = ("embed", "position", "types", "embed_norm", "biases")
"""First names of what comes before the layers or is shared by them."""


def bitfit(tune: BitFit, about: About) -> Tuning:
    """All biases (Ben Zaken et al. 2022), those of norms included."""
    biases = {path for path, v in about.variables.items() if v.get_metadata()["role"] == "bias"}
    return selected(about, biases - about.head, "biases")


def last_layers(tune: LastLayers, about: About) -> Tuning:
    """The last layers and what follows them.

    Layers are stacked: those that are trained are cut off the stack, and put back when the model is run.
    """
    total, count = about.model.layers, tune.layers
    require(
        count <= total,
        f"tune.layers is {count} but the model has {total}; it must be between 0 and {total}.",
    )
    inside = {path for path in about.variables if "blocks" in path[:2]} if count else set()
    after = {path for path in about.variables if _follows(path, about)}
    own = [
        (path, v if path in after else variable((count, *v.shape[1:]), **_facts(v)))
        for path, v in about.variables.items()
        if path in inside | after
    ]
    require(bool(own), "tune.layers is 0 and nothing of this model follows its layers; raise it.")

    def cut(params: dict, first: int, stop: int, rest: bool) -> dict:
        """The layers [first, stop), with what follows them or with all that does not."""
        flat = flatten(params)
        found = {p: v for p, v in flat.items() if p not in inside and (p in after) != rest}
        layers = {p: flat[p][first:stop] for p in inside} if stop > first else {}
        return unflatten(found | layers)

    def init(key: jax.Array, params: dict) -> dict:
        return cut(params, total - count, total, rest=False)

    def freeze(params: dict) -> dict:
        return cut(params, 0, total - count, rest=True)

    def enter(learned: dict, frozen: dict, key: jax.Array | None) -> dict:
        below, above = flatten(frozen), flatten(learned)
        both = {p: jnp.concatenate([below[p], above[p]]) for p in inside if p in below}
        return unflatten(below | above | both)

    return Tuning(
        nnx.from_flat_state(own), init, freeze, enter, lambda learned, frozen: enter(learned, frozen, None)
    )


def _follows(path: Path, about: About) -> bool:
    if path in about.head:
        return True
    own = path[1:] if path[0] == "backbone" else path
    if own[0] in (*BEFORE, "blocks"):
        return False
    return not about.head or own[0] == "norm"  # a head over labels takes the place of the backbone's own


def _facts(v: nnx.Variable) -> dict:
    about = v.get_metadata()
    return {name: about[name] for name in ("axes", "role", "inputs", "lead", "read_in") if name in about}
