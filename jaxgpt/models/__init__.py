"""From a config to a model: the one place that knows which class builds which config.

Shapes: B rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from jaxgpt.config import (
    GPT,
    Architecture,
    Bert,
    Classifier,
    Compute,
    Headed,
    Model,
    RewardModel,
    TransformerXL,
)
from jaxgpt.layers.stack import unstack
from jaxgpt.models import transformer_xl
from jaxgpt.models.bert import Encoder
from jaxgpt.models.gpt import Decoder
from jaxgpt.models.heads import ClassifierModule, RewardModule
from jaxgpt.models.predictor import Predictor
from jaxgpt.models.transformer_xl import Recurrent
from jaxgpt.target import Target


def _headed(kind: type) -> Callable[..., nnx.Module]:
    def build(
        model: Headed, compute: Compute, target: Target, key: jax.Array, *, scanned: bool = True
    ) -> nnx.Module:
        backbone: Any = builder(model.backbone)
        return kind(model, compute, target, key, backbone=backbone, scanned=scanned)

    return build


MODULES: dict[type, Callable[..., Any]] = {
    GPT: Decoder,
    Bert: Encoder,
    TransformerXL: Recurrent,
    Classifier: _headed(ClassifierModule),
    RewardModel: _headed(RewardModule),
}
"""The registry of the package: from a config class to the builder of the module it describes."""


def builder(model: Model) -> Callable[..., Any]:
    """What builds the module of a config, called as (model, compute, target, key, scanned=...)."""
    return model.module() if isinstance(model, Architecture) else MODULES[type(model)]


def init_params(model: Model, compute: Compute, target: Target, key: jax.Array) -> dict:
    """Initial parameters as a pure dict of arrays (call it under `jax.jit` to shard them)."""
    return nnx.to_pure_dict(nnx.state(builder(model)(model, compute, target, key)))


def abstract_model(
    model: Model, compute: Compute, target: Target, *, scanned: bool = True
) -> tuple[nnx.GraphDef, nnx.State]:
    """The model without arrays: its graph, and a state of shapes, types and logical axes.

    `nnx.merge(graph, params)` inside traced code restores the model.
    """
    build = builder(model)
    return nnx.split(
        nnx.eval_shape(lambda: build(model, compute, target, jax.random.key(0), scanned=scanned))
    )


def abstract_params(model: Model) -> nnx.State:
    """Shapes, types and metadata of the parameters in training form; they depend only on the model."""
    return abstract_model(model, Compute(attention="xla"), Target("cpu", "cpu"))[1]


def backbone(module: Any) -> Any:
    """The module itself, or what a head over labels stands on."""
    return getattr(module, "backbone", module)


def assemble(graphdef: nnx.GraphDef, params: Mapping[str, Any]) -> Any:
    """The model around its parameters, in traced code.

    Args:
      graphdef: its graph.
      params: a pure dict; weights may be of other kinds than arrays. Its entry `added`, if there is one, is
        what a tuning method adds beside weights (`layers.added`).
    """
    module = nnx.merge(graphdef, {name: part for name, part in params.items() if name != "added"})
    if "added" in params:
        backbone(module).added = nnx.data(params["added"])
    return module


def context_of(model: Model, params: Mapping[str, Any]) -> int:
    """Number of tokens that a text may have: the context, less what virtual tokens take of it."""
    return model.context - (params["added"].tokens if "added" in params else 0)


def init_memory(
    model: Model, compute: Compute, target: Target, rows: int, *, evaluation: bool = False
) -> Any:
    """The empty memory of a recurrent model, [B, ...] arrays; None for other models.

    Args:
      model: the architecture.
      compute, target: determine the type.
      rows: B.
      evaluation: use the memory length of evaluation, which may differ from that of training.
    """
    if not isinstance(model, TransformerXL):
        return None
    length = model.eval_memory if evaluation and model.eval_memory is not None else model.memory
    return transformer_xl.init_memory(model, compute, target, rows, length) if length else None


def trainable(model: Model) -> Callable[[tuple[Any, ...], Mapping[str, Any]], bool]:
    """Whether a parameter is trained, by its path and its metadata (axes, role)."""
    frozen = isinstance(model, Headed) and model.frozen
    return lambda path, about: not (frozen and path[0] == "backbone")


def caches_keys(model: Model) -> bool:
    """Whether the module decodes with a cache of keys and values, and not by `Predictor.decode`."""
    return getattr(builder(model), "decode", Predictor.decode) is not Predictor.decode


def decoding_params(model: Model, params: dict[str, Any]) -> dict[str, Any]:
    """Convert parameters from the training form (stacked layers) to unstacked layers."""
    return params | {"blocks": unstack(params["blocks"], model.layers)}


def unstacks(model: Model, target: Target) -> bool:
    """Whether decoding runs the layers one after another, each with its own parameters."""
    return target.unroll and caches_keys(model)


def parameter_counts(model: Model) -> dict[str, int]:
    """Number of parameters: `total`, and `non_embedding` without token, position and type tables.

    An untied output projection counts as non-embedding because it is a product (Kaplan et al. 2020).
    """
    state = abstract_params(model)
    sizes = {path: variable.size for path, variable in nnx.to_flat_state(state)}
    tables = sum(size for path, size in sizes.items() if {"embed", "position", "types"} & set(path))
    return {"total": sum(sizes.values()), "non_embedding": sum(sizes.values()) - tables}


def flops_per_token(model: Model, length: int) -> int:
    """Training FLOPs per token, forward and backward (PaLM, appendix B): 6 N + 12 L H K T.

    N counts every parameter that a token is multiplied by. It excludes tables that are only read, includes
    the output projection even if tied, and counts only the experts that a token uses.
    """
    state = abstract_params(model)
    products = parameter_counts(model)["non_embedding"]
    if model.moe:
        flat = nnx.to_flat_state(state)
        experts = sum(v.size for _, v in flat if "experts" in v.get_metadata()["axes"])
        products -= experts * (model.moe.experts - model.moe.per_token) // model.moe.experts
    if not isinstance(model, Headed) and model.tied:
        products += sum(v.size for path, v in nnx.to_flat_state(state) if "embed" in path)
    spans, factor = [min(length, model.window(i)) for i in range(model.layers)], 12
    if isinstance(model, TransformerXL):
        # The keys include the memory, and scores have a second product, by distance. The projection of the
        # sinusoids is shared by all rows of a batch.
        products -= sum(v.size for path, v in nnx.to_flat_state(state) if "relative" in path)
        spans, factor = [length + model.memory] * model.layers, 18
    return 6 * products + factor * model.heads * model.head * sum(spans)
