"""Bottleneck adapters: small MLPs inside the layers.

Shapes: L layers, D hidden size, R hidden size of an adapter.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxgpt.config import BottleneckAdapters
from jaxgpt.errors import require
from jaxgpt.layers.added import Added, Bottleneck, Bottlenecks
from jaxgpt.models import builder
from jaxgpt.tune.base import About, Tuning, unflatten, variable, with_own

PLACES = {"houlsby": ("attention", "mlp"), "pfeiffer": ("mlp",), "parallel": ("beside",)}
"""For each `tune.place`: the fields of `Bottlenecks`."""
PARTS = ("down", "down_bias", "up", "up_bias")


def bottleneck_adapters(tune: BottleneckAdapters, about: About) -> Tuning:
    """Adapters, whose output is 0 at first, and the norms of the layers.

    Houlsby et al. 2019, section 2.1: 2 D R + D + R parameters each.
    """
    model, R = about.model, tune.size
    inner = getattr(model, "backbone", model)
    require(
        hasattr(builder(inner), "added"),
        f"tune is BottleneckAdapters but a {type(inner).__name__} has no place for them; use LoRA.",
    )
    L, D, places = model.layers, model.width, PLACES[tune.place]
    shapes = {
        "down": ((L, D, R), ("layers", "embed", "rank"), "matrix"),
        "down_bias": ((L, R), ("layers", "rank"), "bias"),
        "up": ((L, R, D), ("layers", "rank", "embed"), "matrix"),
        "up_bias": ((L, D), ("layers", "vector"), "bias"),
    }
    learned = {
        ("added", place, name): variable(*shapes[name], **({"inputs": 1} if "bias" not in name else {}))
        for place in places
        for name in PARTS
    }

    def init(key: jax.Array, params: dict) -> dict:
        found: dict = {path: jnp.zeros(v.shape) for path, v in learned.items()}
        for place, own in zip(places, jax.random.split(key, len(places)), strict=True):
            found[("added", place, "down")] = D**-0.5 * jax.random.normal(own, (L, D, R))
        return unflatten(found)

    def enter(learned: dict, frozen: dict, key: jax.Array | None) -> dict:
        made: dict[str, Any] = {
            place: Bottleneck(
                *[learned["added"][place][name] for name in PARTS],
                activation=tune.activation,
                scale=tune.scale,
            )
            for place in places
        }
        return frozen | {"added": Added(adapters=Bottlenecks(**made))}

    own = Tuning(
        nnx.from_flat_state(list(learned.items())),
        init,
        lambda params: params,
        enter,
        lambda learned, frozen: enter(learned, frozen, None),
    )
    norms = {path for path in about.variables if "blocks" in path and str(path[-2]).endswith("norm")}
    return with_own(about, about.head | (norms if tune.norms else set()), own)
