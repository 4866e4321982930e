"""Objectives: functions of (model, batch, key) to sums of loss, weight and metrics.

Sums, never means: the caller divides the total over all devices and microbatches by the total
weight, so that gradient accumulation equals the full batch. One term is not a sum: the load-balancing
loss of experts is a product of means. It is computed per microbatch and multiplied by the microbatch's
weight (`layers.moe.Experts`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxgpt.config import (
    DPO,
    GRPO,
    IPO,
    KTO,
    ORPO,
    PREFERENCES,
    BradleyTerry,
    CausalLM,
    Classification,
    Distillation,
    MaskedLM,
    Run,
    SimPO,
)
from jaxgpt.objectives.causal import causal_lm
from jaxgpt.objectives.classification import classification
from jaxgpt.objectives.distillation import distillation
from jaxgpt.objectives.grpo import drawn_by, grpo, grpo_columns
from jaxgpt.objectives.kto import kto
from jaxgpt.objectives.masked import masked_lm
from jaxgpt.objectives.preferences import bradley_terry, dpo, ipo, orpo, simpo
from jaxgpt.objectives.sums import Largest, Mean, Metrics, Objective, Sums, TwoPass, add, before, means, score
from jaxgpt.text.vocabulary import Vocabulary

__all__ = [
    "OBJECTIVES",
    "Largest",
    "Mean",
    "Metrics",
    "Objective",
    "Sums",
    "TwoPass",
    "add",
    "before",
    "causal_lm",
    "classification",
    "drawn_by",
    "extra_columns",
    "grpo",
    "make_objective",
    "masked_lm",
    "means",
    "score",
]

OBJECTIVES: dict[type, Callable[[Any, Vocabulary], Objective]] = {
    CausalLM: causal_lm,
    MaskedLM: masked_lm,
    Classification: classification,
    Distillation: distillation,
    GRPO: grpo,
    DPO: dpo,
    IPO: ipo,
    SimPO: simpo,
    ORPO: orpo,
    KTO: kto,
    BradleyTerry: bradley_terry,
}
"""From an objective's config class to its function."""


def extra_columns(run: Run, *, computed: bool = False) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and types of one row's columns that the run's objective finds in `Batch.extra`.

    Args:
      run: the config.
      computed: also those that the step computes itself.
    """
    if isinstance(run.objective, GRPO):
        return grpo_columns(run.objective, run.length)
    columns: dict[str, Any] = {"side": jnp.int32} if type(run.objective) in PREFERENCES else {}
    if getattr(run.objective, "reference", "") in ("stored", "frozen" if computed else "stored"):
        columns["reference"] = jnp.float32
    return {name: jax.ShapeDtypeStruct((run.length,), dtype) for name, dtype in columns.items()}


def make_objective(objective: Any, vocabulary: Vocabulary) -> Objective:
    """The function that an objective's config describes."""
    return OBJECTIVES[type(objective)](objective, vocabulary)
