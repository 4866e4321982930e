"""From a config to a model: the one place that knows which class builds which config."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from jaxgpt.config import GPT, Compute
from jaxgpt.layers.stack import unstack
from jaxgpt.models.gpt import Decoder

MODULES = {GPT: Decoder}
"""The registry: a config class and the module it describes."""


def init_params(model: GPT, compute: Compute, key: jax.Array) -> dict:
    """Fresh parameters as a pure dict of arrays (call it under `jax.jit` to lay them out)."""
    return nnx.to_pure_dict(nnx.state(MODULES[type(model)](model, compute, key)))


def abstract_model(model: GPT, compute: Compute, *, scanned: bool = True) -> tuple[nnx.GraphDef, nnx.State]:
    """The model without arrays: its graph, and a state of shapes, types and logical axes.

    `nnx.merge(graph, params)` inside traced code gives the model back.
    """
    build = MODULES[type(model)]
    return nnx.split(nnx.eval_shape(lambda: build(model, compute, jax.random.key(0), scanned=scanned)))


def decoding_params(model: GPT, params: dict[str, Any]) -> dict[str, Any]:
    """Parameters of the training form (stacked layers) as those of the decoding form."""
    return params | {"blocks": unstack(params["blocks"], model.layers)}


def parameter_counts(model: GPT) -> dict[str, int]:
    """Number of parameters: `total`, and `non_embedding` without token and position tables.

    An untied output projection counts as non-embedding, as in Kaplan et al. 2020 it is a product.
    """
    _, state = abstract_model(model, Compute(attention="xla"))
    sizes = {path: variable.size for path, variable in nnx.to_flat_state(state)}
    tables = sum(size for path, size in sizes.items() if path[0] in ("embed", "position"))
    return {"total": sum(sizes.values()), "non_embedding": sum(sizes.values()) - tables}


def flops_per_token(model: GPT, length: int) -> int:
    """Training FLOPs a token, forward and backward (PaLM, appendix B): 6 N + 12 L H K T.

    N counts every parameter that is multiplied: not the tables that are only read, but the
    output projection also when it is tied.
    """
    counts = parameter_counts(model)
    products = counts["non_embedding"] + (model.vocab_size * model.width if model.tied else 0)
    spans = [min(length, model.window(i)) for i in range(model.layers)]
    return 6 * products + 12 * model.heads * model.head * sum(spans)
