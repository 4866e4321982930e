"""Measures against overfitting and forgetting, none of which a run has unless it says so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from jaxgpt.config.bounds import Bounds, Decay, Limit, Weight
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


@dataclass(frozen=True, kw_only=True)
class LabelSmoothing(_Measure):
    """A share of each target's weight is spread over all ids alike (Szegedy et al. 2016, section 7)."""

    rate: Annotated[float, Bounds(0, 0.999)] = 0.1
    """That share."""


@dataclass(frozen=True, kw_only=True)
class NEFTune(_Measure):
    """Uniform noise on the embeddings of tokens in training (Jain et al. 2023)."""

    alpha: Weight = 5.0
    """Noise is within alpha / sqrt(tokens per row x hidden size)."""


@dataclass(frozen=True, kw_only=True)
class RDrop(_Measure):
    """Two passes with different dropout shall predict alike (Liang et al. 2021): the loss is the mean of
    both, plus the symmetric KL divergence between them. It costs two passes; dropout must be on.
    """

    weight: Weight = 1.0
    """Weight of the divergence."""


@dataclass(frozen=True, kw_only=True)
class FGM(_Measure):
    """Adversarial training (Miyato et al. 2017, section 3): the loss is also that of embeddings moved along
    its gradient. It costs three passes.
    """

    epsilon: Weight = 1.0
    """Length of the move, of all embeddings of a row together."""
    weight: Weight = 1.0
    """Weight of the adversarial loss against the plain one."""


@dataclass(frozen=True, kw_only=True)
class PGD(_Measure):
    """FGM in several steps (Madry et al. 2018): the loss is also that of embeddings moved uphill `steps`
    times, never further than epsilon. It costs steps + 2 passes.
    """

    epsilon: Weight = 1.0
    """Most length of the move, of all embeddings of a row together."""
    step_size: Weight = 0.5
    """Length of one step."""
    steps: Annotated[int, Bounds(1, 32)] = 3
    """Number of steps."""
    weight: Weight = 1.0
    """Weight of the adversarial loss against the plain one."""


@dataclass(frozen=True, kw_only=True)
class FreeLB(_Measure):
    """PGD whose way counts (Zhu et al. 2020): the loss is the mean over the plain one and those after each
    step. It costs 2 steps - 1 passes.
    """

    epsilon: Weight = 1.0
    """Most length of the move, of all embeddings of a row together."""
    step_size: Weight = 0.5
    """Length of one step."""
    steps: Annotated[int, Bounds(2, 32)] = 3
    """Number of losses in the mean."""


@dataclass(frozen=True, kw_only=True)
class TokenDropout(_Measure):
    """Given tokens become random ones in training; tokens of answers, and control tokens, never do. Of plain
    text every token is learned, so nothing changes.
    """

    rate: Annotated[float, Bounds(0, 1)] = 0.1
    """Share of the given tokens."""


@dataclass(frozen=True, kw_only=True)
class TokenSwaps(_Measure):
    """Neighbouring given tokens are exchanged in training; tokens of answers and control tokens never are."""

    rate: Annotated[float, Bounds(0, 1)] = 0.1
    """Share of the pairs of neighbours that may be exchanged."""


@dataclass(frozen=True, kw_only=True)
class EMA(_Measure):
    """The model is an exponential moving average of the parameters that are trained (Polyak and Juditsky
    1992): it is what is evaluated, saved, sampled and tuned on; the optimizer keeps the others.
    """

    decay: Decay = 0.999
    """Share of the average that stays per step; less at the start, (1 + step) / (10 + step)."""


@dataclass(frozen=True, kw_only=True)
class LayerDecay(_Measure):
    """Lower layers learn more slowly (ULMFiT: Howard and Ruder 2018, section 3.2): each layer's updates are
    this factor of those of the layer above; embeddings are below the first layer.
    """

    rate: Annotated[float, Bounds(1e-3, 1)] = 0.9
    """The factor."""


Measure = (
    L2SP
    | EWC
    | LabelSmoothing
    | NEFTune
    | RDrop
    | FGM
    | PGD
    | FreeLB
    | TokenDropout
    | TokenSwaps
    | EMA
    | LayerDecay
)
"""The registry of measures; `jaxgpt.objectives.measures.MEASURES` has the hooks of each."""

STARTED = (L2SP, EWC)
"""Measures that refer to the parameters that a run starts from."""


PLAIN = (LabelSmoothing, NEFTune, RDrop, FGM, PGD, FreeLB, TokenDropout, TokenSwaps)
"""Measures of objectives that score one prediction per target."""


def _linear(model: Any) -> bool:
    inner = getattr(model, "backbone", None)
    return inner is not None or (model.logit_softcap is None and not getattr(model, "cutoffs", ()))


def _drops(model: Any) -> bool:
    parts = (model, getattr(model, "backbone", None))
    return any(getattr(part, name, 0.0) > 0 for part in parts for name in ("dropout", "head_dropout"))


def check_measures(run: Any) -> None:
    """Refuse measures that do not fit the rest of a run, or stand there twice."""
    kinds = [type(measure) for measure in run.measures]
    for kind in kinds:
        name = kind.__name__
        require(kinds.count(kind) == 1, f"measures has {name} twice; keep one.")
        objective = type(run.objective).__name__
        require(
            kind not in PLAIN or objective in ("CausalLM", "MaskedLM", "Classification"),
            f"measures has {name}, which is of predicted ids, but objective is {objective}(); drop it, or "
            "use "
            "CausalLM(), MaskedLM() or Classification().",
        )
        require(
            kind is not LabelSmoothing or _linear(run.model),
            "measures has LabelSmoothing, which needs logits that are linear in the features, but the model "
            "caps "
            "them or has an adaptive softmax; drop one of them.",
        )
        require(
            kind is not RDrop or _drops(run.model),
            "measures has RDrop, which compares passes with different dropout, but dropout is 0; set "
            "model.dropout, such as 0.1.",
        )
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
