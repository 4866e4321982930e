"""Which family a config.json belongs to, and which one a config of ours does."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from jaxgpt.config import GPT, Bert
from jaxgpt.convert.bert import BERT
from jaxgpt.convert.family import Family, Fields, Model, misfits
from jaxgpt.convert.fields import Config
from jaxgpt.convert.gemma import GEMMA2, GEMMA3
from jaxgpt.convert.gpt2 import GPT2
from jaxgpt.convert.llama import LLAMA, MISTRAL, MIXTRAL
from jaxgpt.convert.qwen import QWEN2, QWEN2_MOE, QWEN3, QWEN3_MOE
from jaxgpt.errors import UserError, require, require_known
from jaxgpt.files import check_json

_ALL = (GPT2, LLAMA, MISTRAL, MIXTRAL, QWEN2, QWEN3, QWEN2_MOE, QWEN3_MOE, GEMMA2, GEMMA3, BERT)
FAMILIES: Mapping[str, Family] = {family.model_type: family for family in _ALL}
"""By `model_type`; a config of ours is exported as the first one that fits."""

FIX = "take the model's original file"
"""What to do about a damaged config.json."""

KINDS: Mapping[str, type] = {name: Bert if name == "bert" else GPT for name in FAMILIES}
"""The class of our config of each family."""


def text_part(config: Mapping[str, Any], where: str = "config.json") -> dict[str, Any]:
    """A config.json's fields, of the text model alone where it is one of several (Gemma 3).

    Raises:
      UserError: fields of a wrong type.
    """
    if config.get("model_type") != "gemma3":
        return dict(config)
    check_json(config, Config, where, FIX)
    dtype = {name: config[name] for name in ("torch_dtype", "dtype") if config.get(name)}
    architecture = {"architectures": [GEMMA3.architecture], "model_type": GEMMA3.model_type}
    return dtype | config.get("text_config", {}) | architecture


def read_config(config: Mapping[str, Any], where: str) -> tuple[Family, Model]:
    """The family and our config of a config.json's fields.

    Raises:
      UserError: an unknown family, a field of a wrong type or size, or all fields whose values have no
        counterpart here.
    """
    name = config.get("model_type")
    require_known(str(name), FAMILIES, f"{where}: model_type is {name!r:.60}")
    typed = check_json(config, Config, where, FIX)
    family = FAMILIES[str(name)]
    fields = Fields(family.defaults, {**config, **typed})
    fields.note(not config.get("quantization_config"), "quantization_config", "set", "plain weights")
    try:
        model = family.read(fields)
    except UserError as error:
        raise UserError(f"{where}: {'; '.join([*fields.problems, str(error)])}") from None
    except KeyError as error:
        raise UserError(f"{where} has no field {error}; take the folder's original file.") from None
    require(not fields.problems, f"{where}: {'; '.join(fields.problems)}.")
    return family, model


def family_of(model: Any, among: Collection[str] = tuple(FAMILIES), kind: str = "of Hugging Face") -> Family:
    """The first family that has this model among its own.

    Args:
      model: the architecture.
      among: the families that are possible.
      kind: what they are, for the message.

    Raises:
      UserError: there is none; it names the fields in the way of the nearest.
    """
    require(
        isinstance(model, GPT | Bert),
        f"a {type(model).__name__} cannot be exported; GPT and Bert models can.",
    )
    found = {
        name: misfits(family, model)
        for name, family in FAMILIES.items()
        if name in among and isinstance(model, KINDS[name])
    }
    require(bool(found), f"a {type(model).__name__} is of no family {kind}.")
    nearest = min(found, key=lambda name: len(found[name]))
    wrong = [f"{name} {getattr(model, name, '')!r}" for name in found[nearest]]
    require(
        not wrong,
        f"this model is of no family {kind}: the nearest, {nearest}, has no place for "
        f"{', '.join(wrong)}; train one whose fields are those of {', '.join(found)}.",
    )
    return FAMILIES[nearest]
