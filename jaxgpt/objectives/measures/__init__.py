"""Measures against overfitting and forgetting: one file each, and the config's class is its entry here.

Evaluation is without them: they change what training does with a batch, a loss or a gradient.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import jax
import optax
from flax import nnx

from jaxgpt.batch import Batch
from jaxgpt.config import (
    EMA,
    EWC,
    FGM,
    L2SP,
    PGD,
    FreeLB,
    LabelSmoothing,
    LayerDecay,
    NEFTune,
    RDrop,
    TokenDropout,
    TokenSwaps,
)
from jaxgpt.objectives.measures.adversarial import fgm, freelb, pgd
from jaxgpt.objectives.measures.augment import token_dropout, token_swaps
from jaxgpt.objectives.measures.base import Change, Hooks
from jaxgpt.objectives.measures.ema import ema
from jaxgpt.objectives.measures.layer_decay import layer_decay
from jaxgpt.objectives.measures.neftune import neftune
from jaxgpt.objectives.measures.penalty import ewc, l2sp
from jaxgpt.objectives.measures.rdrop import rdrop
from jaxgpt.objectives.measures.smoothing import label_smoothing
from jaxgpt.objectives.sums import Objective, Sums
from jaxgpt.text.vocabulary import Vocabulary

__all__ = ["MEASURES", "measured", "measured_optimizer"]

MEASURES: dict[type, Hooks] = {
    LayerDecay: Hooks(update=layer_decay),
    L2SP: Hooks(update=l2sp),
    EWC: Hooks(update=ewc),
    EMA: Hooks(update=ema),
    LabelSmoothing: Hooks(objective=label_smoothing),
    NEFTune: Hooks(objective=neftune),
    FGM: Hooks(objective=fgm),
    PGD: Hooks(objective=pgd),
    FreeLB: Hooks(objective=freelb),
    TokenDropout: Hooks(batch=token_dropout),
    TokenSwaps: Hooks(batch=token_swaps),
    RDrop: Hooks(objective=rdrop),
}
"""From a measure's config class to its hooks, from the innermost to the outermost: in this order they are
put around an objective and an optimizer, whatever order a run names them in."""


def measured(measures: Iterable[Any], objective: Objective, vocabulary: Vocabulary) -> Objective:
    """The objective of training under a run's measures; the same one where none changes it."""
    for config, hooks in _ordered(measures):
        if hooks.objective is not None:
            objective = hooks.objective(config, vocabulary)(objective)
    for number, (config, hooks) in enumerate(_ordered(measures)):
        if hooks.batch is not None:
            objective = _changing(objective, hooks.batch(config, vocabulary), number)
    return objective


def _changing(objective: Objective, change: Change, number: int) -> Objective:
    def changed(model: Any, batch: Batch, key: jax.Array | None) -> Sums:
        own = batch if key is None else change(batch, jax.random.fold_in(key, 1000 + number))
        return objective(model, own, key)

    return changed


def measured_optimizer(
    measures: Iterable[Any], optimizer: optax.GradientTransformation, model: nnx.State
) -> optax.GradientTransformation:
    """The optimizer under a run's measures.

    Args:
      measures: of the run.
      optimizer: the one without them.
      model: abstract state of what is trained.
    """
    for config, hooks in _ordered(measures):
        if hooks.update is not None:
            optimizer = hooks.update(config, model)(optimizer)
    return optimizer


def _ordered(measures: Iterable[Any]) -> Iterator[tuple[Any, Hooks]]:
    given = {type(config): config for config in measures}
    return ((given[kind], hooks) for kind, hooks in MEASURES.items() if kind in given)
