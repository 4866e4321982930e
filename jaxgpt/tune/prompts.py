"""Prompt tuning and prefix tuning: virtual tokens before every document.

A virtual token sees only virtual ones. So its keys and values are the same for all documents, and a prompt is
run through the layers once per batch: from there on it is a prefix. It is outside every sliding window, and
documents' positions begin after it.

Shapes: P virtual tokens, L layers, G key-value heads, K head size, D hidden size, M of the projection.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxgpt.config import PrefixTuning, PromptTuning
from jaxgpt.errors import require
from jaxgpt.layers.added import Added
from jaxgpt.models import abstract_model, backbone, builder
from jaxgpt.tune.base import About, Tuning, unflatten, variable, with_own

ROLE = "added"
"""Of virtual tokens: they do not decay."""


def prompt_tuning(tune: PromptTuning, about: About, text: Sequence[int] = ()) -> Tuning:
    """Embeddings [P, D] of virtual tokens (Lester et al. 2021, section 2).

    Args:
      tune: the config.
      about: the model.
      text: token ids of `tune.text`.
    """
    _check(tune, about, "keys_and_values", causal=True)
    shape = (tune.tokens, about.model.width)
    learned = {("added", "prompt"): variable(shape, ("position", "embed"), ROLE)}

    def init(key: jax.Array, params: dict) -> dict:
        if tune.init == "random":
            prompt = 0.5 * jax.random.truncated_normal(key, -1, 1, shape)  # as in the paper, section 3.2
        else:
            prompt = _embeddings(key, about, params, tune.tokens, text if tune.init == "text" else ())
        return unflatten({("added", "prompt"): prompt})

    def enter(learned: dict, frozen: dict, key: jax.Array | None) -> dict:
        return frozen | {"added": Added(prompt_PD=learned["added"]["prompt"])}

    return _beside(about, learned, init, enter)


def prefix_tuning(tune: PrefixTuning, about: About) -> Tuning:
    """Keys and values [L, P, G, K], or an MLP that makes them (Li and Liang 2021, section 4)."""
    _check(tune, about, "keys_and_values", causal=False)
    model, P, M = about.model, tune.tokens, tune.projection
    each, heads = (model.layers, P, model.groups, model.head), ("layers", "position", "kv_heads", "head")
    if not M:
        learned = {("added", name): variable(each, heads, ROLE) for name in ("keys", "values")}
    else:
        out = (model.layers, 2, model.groups, model.head)
        axes = ("layers", "position", "kv_heads", "head")
        learned = {
            ("added", "embed"): variable((P, model.width), ("position", "embed"), ROLE),
            ("added", "up"): variable((model.width, M), ("embed", "vector"), "matrix", inputs=1),
            ("added", "up_bias"): variable((M,), ("vector",), "bias"),
            ("added", "out"): variable((M, *out), ("vector", *axes), "matrix", inputs=1),
            ("added", "out_bias"): variable(out, axes, "bias"),
        }

    def init(key: jax.Array, params: dict) -> dict:
        keys = jax.random.split(key, 3)
        if not M and tune.init == "random":
            parts = {
                name: jax.random.normal(k, each) for name, k in zip(("keys", "values"), keys, strict=False)
            }
        elif not M:
            x_PD = _embeddings(key, about, params, P)
            graph = abstract_model(model, about.compute, about.target)[0]
            module: Any = backbone(nnx.merge(graph, params))
            parts = dict(zip(("keys", "values"), module.keys_and_values(x_PD), strict=True))
            parts = {name: part.astype(jnp.float32) for name, part in parts.items()}
        else:
            shapes = {path[1]: v.shape for path, v in learned.items()}
            parts = {name: jnp.zeros(shape) for name, shape in shapes.items()}
            for name, k in zip(("embed", "up", "out"), keys, strict=True):
                std = 1.0 if name == "embed" else shapes[name][0] ** -0.5
                parts[name] = std * jax.random.normal(k, shapes[name])
        return {"added": parts}

    def enter(learned: dict, frozen: dict, key: jax.Array | None) -> dict:
        own = learned["added"]
        if not M:
            return frozen | {"added": Added(prefix=(own["keys"], own["values"]))}
        hidden_PM = jnp.tanh(own["embed"] @ own["up"] + own["up_bias"])
        made_PL2GK = jnp.tensordot(hidden_PM, own["out"], 1) + own["out_bias"]
        made_2LPGK = made_PL2GK.transpose(2, 1, 0, 3, 4)
        return frozen | {"added": Added(prefix=(made_2LPGK[0], made_2LPGK[1]))}

    return _beside(about, learned, init, enter)


def _beside(about: About, learned: dict, init: Any, enter: Any) -> Tuning:
    """A method that adds something beside the weights."""
    own = Tuning(
        nnx.from_flat_state(list(learned.items())),
        init,
        lambda params: params,
        enter,
        lambda learned, frozen: enter(learned, frozen, None),
    )
    return with_own(about, about.head, own)


def _embeddings(
    key: jax.Array, about: About, params: dict, count: int, text: Sequence[int] = ()
) -> jax.Array:
    """Rows of the model's embedding: of these ids, repeated or cut to `count`, or of random ones."""
    table_VD = params.get("backbone", params)["embed"]["weight"]
    if len(text):
        ids = jnp.asarray([text[i % len(text)] for i in range(count)])
    else:
        ids = jax.random.randint(key, (count,), 0, len(table_VD))
    return table_VD[ids]


def _check(tune: PromptTuning | PrefixTuning, about: About, needs: str, *, causal: bool) -> None:
    """Refuse a model without a place for virtual tokens, or without room for them."""
    name, model = type(tune).__name__, about.model
    inner = getattr(model, "backbone", model)
    require(
        hasattr(builder(inner), needs),
        f"tune is {name} but a {type(inner).__name__} has no place for virtual tokens; use LoRA, "
        "BottleneckAdapters or another method.",
    )
    require(
        not causal or inner.causal,
        f"tune is {name} but in a {type(inner).__name__} that sees both sides virtual tokens would see the "
        "text; use PrefixTuning.",
    )
    require(
        tune.tokens < inner.context,
        f"tune.tokens {tune.tokens} leaves nothing of model.context {inner.context}; lower it.",
    )
