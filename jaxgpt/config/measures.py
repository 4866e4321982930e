"""Measures against overfitting and forgetting, none of which a run has unless it says so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxgpt.config.bounds import Limit, Weight
from jaxgpt.config.check import check_types
from jaxgpt.config.tune import BitFit, Full, LastLayers
from jaxgpt.errors import require


@dataclass(frozen=True, kw_only=True)
class _Measure:
    def __post_init__(self) -> None:
        check_types(self, "measures")


@dataclass(frozen=True, kw_only=True)
class L2SP(_Measure):
    """Pull parameters towards those that the run starts from (Li et al. 2018, equation 2): half the weight
    times their squared distance is added to the loss. A new head is left alone.
    """

    weight: Weight = 0.01
    """Weight of the penalty."""


@dataclass(frozen=True, kw_only=True)
class EWC(_Measure):
    """Elastic weight consolidation (Kirkpatrick et al. 2017, equation 3): L2SP with each parameter weighted
    by how much earlier data depend on it, the diagonal of the Fisher information.
    """

    weight: Weight = 100.0
    """Weight of the penalty. The Fisher information is that of one target of the earlier data, as the loss is
    a mean over targets."""
    runs: tuple[str, ...] = ()
    """Folders of the runs whose training data are not to be forgotten; empty means that of init_from."""
    rows: Limit = 256
    """Rows of each run's data that the Fisher information is estimated from, by the squared gradient of each;
    it is done once, before the first step."""


Measure = L2SP | EWC
"""The registry of measures; `jaxgpt.objectives.measures.MEASURES` has the hooks of each."""

STARTED = (L2SP, EWC)
"""Measures that refer to the parameters that a run starts from."""


def check_measures(run: Any) -> None:
    """Refuse measures that do not fit the rest of a run, or stand there twice."""
    kinds = [type(measure) for measure in run.measures]
    for kind in kinds:
        name = kind.__name__
        require(kinds.count(kind) == 1, f"measures has {name} twice; keep one.")
        if kind in STARTED:
            require(
                bool(run.init_from),
                f"measures has {name}, which refers to the parameters that a run starts from, but init_from "
                "is empty; name a run, or drop the measure.",
            )
            require(
                isinstance(run.tune, Full | BitFit | LastLayers),
                f"measures has {name}, but tune is {type(run.tune).__name__}, which leaves the parameters of "
                "the model that it starts from as they are; drop the measure, or set tune to Full(), "
                "BitFit() or LastLayers().",
            )
