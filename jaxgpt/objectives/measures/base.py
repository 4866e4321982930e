"""What a measure gives: up to three hooks, each a function of its config."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import optax
from flax import nnx

from jaxgpt.batch import Batch
from jaxgpt.objectives.sums import Objective
from jaxgpt.text.vocabulary import Vocabulary

Change = Callable[[Batch, jax.Array], Batch]
"""Of (batch, key), in the jitted step: another batch."""
Wrap = Callable[[Objective], Objective]
"""What is minimised in the place of an objective; it may call the model several times."""
Update = Callable[[optax.GradientTransformation], optax.GradientTransformation]
"""An optimizer around another one. Its state is saved with the rest; copies of parameters in it are dicts as
theirs, and so are sharded like them."""


@dataclass(frozen=True)
class Hooks:
    """Where a measure enters a step; all are absent unless it says so.

    Attributes:
      batch: (config, vocabulary) -> a change of the batches of training.
      objective: (config, vocabulary) -> another objective of training.
      update: (config, the abstract state of what is trained) -> another optimizer.
    """

    batch: Callable[[Any, Vocabulary], Change] | None = None
    objective: Callable[[Any, Vocabulary], Wrap] | None = None
    update: Callable[[Any, nnx.State], Update] | None = None


class Averaged(NamedTuple):
    """The state of an optimizer whose parameters are averaged.

    Attributes:
      inner: of the optimizer itself.
      live: the parameters that it trains, at which gradients are taken.
      count: steps so far.
    """

    inner: Any
    live: Any
    count: jax.Array


def live_parameters(opt: Any, params: Any) -> Any:
    """Where the gradient is taken: the parameters that an `Averaged` state trains, else the model's."""
    found = [leaf for leaf in jax.tree.leaves(opt, is_leaf=_averaged) if _averaged(leaf)]
    return found[0].live if found else params


def _averaged(leaf: Any) -> bool:
    return isinstance(leaf, Averaged)
