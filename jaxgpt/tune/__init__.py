"""Methods of tuning: what of a model is trained, and how that enters the model.

One file per method; the config's class is its entry in `METHODS`. A method gives a `Tuning` (`tune.base`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx

from jaxgpt.config import (
    IA3,
    BitFit,
    BottleneckAdapters,
    Compute,
    DoRA,
    Full,
    LastLayers,
    LoRA,
    Model,
    PrefixTuning,
    PromptTuning,
    Quantization,
    QuantizationAware,
)
from jaxgpt.config.tune import Tune
from jaxgpt.models import abstract_model
from jaxgpt.target import Target
from jaxgpt.tune.adapters import bottleneck_adapters
from jaxgpt.tune.base import About, Tuning
from jaxgpt.tune.few_bits import quantization, quantization_aware
from jaxgpt.tune.ia3 import ia3
from jaxgpt.tune.lora import lora
from jaxgpt.tune.partial import bitfit, last_layers
from jaxgpt.tune.prompts import prefix_tuning, prompt_tuning

__all__ = ["METHODS", "Tuning", "make_tuning"]


def full(tune: Full, about: About) -> Tuning:
    """All parameters."""

    def enter(learned: dict, frozen: dict, key: jax.Array | None) -> dict:
        return learned

    return Tuning(about.state, lambda key, params: params, lambda params: {}, enter, lambda own, _: own)


METHODS: dict[type, Callable[..., Tuning]] = {
    Full: full,
    LoRA: lora,
    DoRA: lora,
    PromptTuning: prompt_tuning,
    PrefixTuning: prefix_tuning,
    BottleneckAdapters: bottleneck_adapters,
    IA3: ia3,
    BitFit: bitfit,
    LastLayers: last_layers,
    QuantizationAware: quantization_aware,
    Quantization: quantization,
}
"""From a method's config class to its function."""


def make_tuning(
    tune: Tune, model: Model, compute: Compute, target: Target, *, text: Sequence[int] = ()
) -> Tuning:
    """The method that a config describes, over a model.

    Args:
      tune: the config.
      model, compute, target: of the program.
      text: token ids that virtual tokens begin with, where the config asks for a text.

    Raises:
      UserError: the method does not fit the model.
    """
    state: nnx.State = abstract_model(model, compute, target)[1]
    about = About(model, compute, target, state)
    more: dict[str, Any] = {"text": text} if isinstance(tune, PromptTuning) else {}
    return METHODS[type(tune)](tune, about, **more)
