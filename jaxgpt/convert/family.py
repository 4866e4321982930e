"""What a family of Hugging Face models is, and what its config and its tensors are to ours.

The same table of names serves import and export: `tensors` turns it, for one model, into a map from
every tensor's name to the parameters it holds, with a reversible view between the two.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from jaxgpt.config import GPT, Bert
from jaxgpt.errors import UserError
from jaxgpt.models import abstract_params

Path = tuple[Any, ...]
Model = GPT | Bert


class Fields(dict[str, Any]):
    """The fields of a config.json over a family's defaults, and what in them cannot be honoured."""

    def __init__(self, defaults: Mapping[str, Any], given: Mapping[str, Any]) -> None:
        super().__init__({**defaults, **given})
        self.problems: list[str] = []
        if self.get("tie_word_embeddings") is None:
            self["tie_word_embeddings"] = defaults.get("tie_word_embeddings")

    def note(self, fine: bool, name: str, value: Any, allowed: str) -> None:
        """Note a value that has no counterpart here."""
        if not fine:
            self.problems.append(f"{name} is {value!r:.100}; only {allowed} can be imported")

    def only(self, name: str, *allowed: Any) -> None:
        """Note a field that is there with another value than these."""
        self.note(
            self.get(name, allowed[0]) in allowed, name, self.get(name), " or ".join(map(repr, allowed))
        )


class Place(NamedTuple):
    """Where a module's parameters are kept.

    Attributes:
      name: of their module, with {layer} and {expert} where there are several; empty for the root.
      part, parts: which part of the last axis, where several of our modules share one of theirs.
    """

    name: str
    part: int = 0
    parts: int = 1


@dataclass(frozen=True)
class Family:
    """One `model_type` of Hugging Face.

    Attributes:
      model_type, architecture: as config.json names them.
      defaults: fields of config.json that may be left out.
      read: `Fields` to our config; adds to `Fields.problems`.
      write: our config to fields of config.json, as transformers 4.56 and later read them. What it
        cannot say it leaves out: reading the fields again shows it.
      places: our modules to theirs, "blocks.attention.q" to "model.layers.{layer}.self_attn.q_proj".
      transposed: whether matrices are kept as [outputs, inputs].
      renames: patterns of names that older or larger models use, and what stands for them.
      unused: pattern of the tensors that a model may have but we have no use for.
      tied: names that may repeat another tensor.
    """

    model_type: str
    architecture: str
    defaults: Mapping[str, Any]
    read: Callable[[Fields], Model]
    write: Callable[[Any], dict[str, Any]]
    places: Mapping[str, Place]
    transposed: bool = True
    renames: tuple[tuple[str, str], ...] = ()
    unused: str = r"(?!)"
    tied: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def head(self) -> str:
        """Their module that turns features into logits."""
        return (self.places.get("head") or self.places[""]).name


@dataclass(frozen=True)
class Slot:
    """One layer's (or expert's) parameter, and how it lies in a tensor of theirs.

    Attributes:
      path: of the parameter, all layers stacked.
      index: of the layer and the expert along its first axes; () where it is whole.
      shape: without those axes.
      inputs: how many axes a matrix contracts; 0 where it is none.
      transposed: whether theirs is [outputs, inputs].
      part, parts: see `Place`.
    """

    path: Path
    index: tuple[int, ...]
    shape: tuple[int, ...]
    inputs: int
    transposed: bool
    part: int
    parts: int

    @property
    def flat(self) -> tuple[int, ...]:
        """The part's own shape in theirs, not transposed."""
        if self.inputs:
            return math.prod(self.shape[: self.inputs]), math.prod(self.shape[self.inputs :])
        return (math.prod(self.shape),) if self.path[-1] == "bias" else self.shape

    @property
    def their_shape(self) -> tuple[int, ...]:
        """The shape of the whole tensor."""
        *lead, last = self.flat[::-1] if self.inputs and self.transposed else self.flat
        return (*lead, last * self.parts)

    def ours(self, tensor: np.ndarray) -> np.ndarray:
        """Our view of their tensor."""
        width = tensor.shape[-1] // self.parts
        tensor = tensor[..., self.part * width : (self.part + 1) * width]
        return (tensor.T if self.inputs and self.transposed else tensor).reshape(self.shape)

    def theirs(self, array: np.ndarray) -> np.ndarray:
        """The inverse: the part of their tensor that holds our array."""
        array = array.reshape(self.flat)
        return array.T if self.inputs and self.transposed else array


@functools.cache
def abstract(model: Model) -> nnx.State:
    """The model's parameters without arrays."""
    return abstract_params(model)


def tensors(family: Family, model: Model) -> dict[str, list[Slot]]:
    """The tensors that a model of the family has, by name, each with the parameters in it."""
    table: dict[str, list[Slot]] = {}
    for path, variable in nnx.to_flat_state(abstract(model)):
        metadata = variable.get_metadata()
        place = family.places[".".join(map(str, path[:-1]))]
        leaf = "weight" if path[-1] == "scale" else path[-1]
        lead = sum(axis in ("layers", "experts") for axis in metadata["axes"])
        sizes, shape = variable.shape[:lead], variable.shape[lead:]
        for index in product(*map(range, sizes)):
            module = place.name.format(**dict(zip(("layer", "expert"), index, strict=False)))
            target = Slot(
                path, index, shape, metadata.get("inputs", 0), family.transposed, place.part, place.parts
            )
            table.setdefault(f"{module}.{leaf}", []).append(target)
    return table


# ------------------------------------------------------------------------------------- which family


def canonical(model: Model) -> dict[str, Any]:
    """What a model computes, field by field: defaults filled in, fields without effect left out."""
    fields = {f.name: getattr(model, f.name) for f in dataclasses.fields(model)}
    fields["mlp_width"] = model.hidden
    if isinstance(model, Bert):
        return _without(fields, "dropout")
    fields |= {
        "kv_heads": model.groups,
        "head_width": model.head,
        "qkv_bias": model.bias if model.qkv_bias is None else model.qkv_bias,
        "attention_scalar": float(model.attention_scalar or model.head),
        "windows": tuple(min(model.window(i), model.context) for i in range(model.layers)),
        "rope_theta": tuple(_wavelengths(model)) if model.position == "rope" else None,
    }
    if model.moe:
        moe = dataclasses.replace(model.moe, width=model.moe.width or model.hidden)
        fields |= {"moe": moe, "mlp_width": None}
    return _without(fields, "dropout", "rope_scaling", "rope_local_theta")


def _without(fields: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in names}


def _wavelengths(model: GPT) -> Iterator[tuple[Any, ...]]:
    """What decides each layer's rotary wavelengths."""
    for layer in range(model.layers):
        theta, scaling = model.frequency(layer)
        if scaling is not None and scaling.form == "linear":
            yield theta, scaling.form, scaling.factor
        else:
            yield theta, scaling


def misfits(family: Family, model: Model) -> list[str]:
    """Fields of a model that the family's config.json cannot say, none where it is one of its models."""
    try:
        fields = Fields(family.defaults, family.write(model))
        back = family.read(fields)
    except UserError as error:  # a combination that is no model at all once a field is lost
        return [str(error)]
    if fields.problems:
        return fields.problems
    ours, theirs = canonical(model), canonical(back)
    return [name for name in ours if ours[name] != theirs[name]]
