"""What is minimised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from jaxgpt.config.bounds import Bounds, Part, Positive, Share, Weight
from jaxgpt.config.check import check_types
from jaxgpt.config.data import Pairs, Rated
from jaxgpt.config.grpo import GRPO
from jaxgpt.errors import require


@dataclass(frozen=True, kw_only=True)
class _Objective:
    def __post_init__(self) -> None:
        check_types(self, "objective")


@dataclass(frozen=True, kw_only=True)
class CausalLM(_Objective):
    """Next-token prediction; on Chat data the weights make it the instruction objective."""

    z_loss: Weight = 0.0
    """Weight of the squared log-partition (PaLM, section 5), which keeps logits near zero."""


@dataclass(frozen=True, kw_only=True)
class Distillation(_Objective):
    """Next-token prediction with a teacher: a run of a larger model, of whose whole distribution the student
    learns (Hinton et al. 2015); of the same tokenizer. Its validation loss is that of CausalLM.
    """

    teacher: str = ""
    """Run folder of the teacher."""
    softening: Positive = 1.0
    """Divides the logits of teacher and student; above 1, unlikely tokens count for more."""
    hard_weight: Share = 0.0
    """Weight of the next token's own loss; the divergence from the teacher has the rest."""


@dataclass(frozen=True, kw_only=True)
class MaskedLM(_Objective):
    """Predict masked tokens from both sides (BERT; Devlin et al. 2019, section 3.1), new ones each step."""

    rate: Part = 0.15
    """Share of the tokens that are predicted."""
    mask: Share = 0.8
    """Share of these that become the mask token."""
    random: Share = 0.1
    """Share of these that become a random token; the rest stay as they are."""
    whole_words: bool = False
    """Mask whole words instead of single tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.mask + self.random <= 1,
            f"objective.mask {self.mask} and objective.random {self.random} make more than 1; lower one.",
        )


@dataclass(frozen=True, kw_only=True)
class Classification:
    """Cross-entropy of labels: of words on Tagged data, of texts on Labelled data."""


# --------------------------------------------------------------------------------------- preferences


@dataclass(frozen=True, kw_only=True)
class _Referred(_Objective):
    reference: Literal["stored", "frozen"] = "stored"
    """Where log-probabilities of the model that the run starts from come from: `stored` computes them once,
    before training, and keeps them in the run's folder; `frozen` computes them in every step from the frozen
    base without its adapter, so that nothing is computed before (tune=LoRA(...) and the like)."""


@dataclass(frozen=True, kw_only=True)
class DPO(_Referred):
    """Direct preference optimization on Pairs data (Rafailov et al. 2023, equation 7)."""

    beta: Positive = 0.1
    """Weight of staying near the model that the run starts from; the reward is beta times the difference of
    log-probabilities."""
    label_smoothing: Annotated[float, Bounds(0, 0.5)] = 0.0
    """Share of pairs that are taken to be the wrong way round (conservative DPO)."""
    nll_weight: Weight = 0.0
    """Weight of the negative log-likelihood of the chosen side, a mean over its tokens (Pang et al. 2024)."""


@dataclass(frozen=True, kw_only=True)
class IPO(_Referred):
    """Identity preference optimization on Pairs data (Azar et al. 2023, equation 17), of means over the
    tokens of each side.
    """

    beta: Positive = 0.1
    """The difference of the log-probability ratios of both sides is to be 1 / (2 beta)."""
    nll_weight: Weight = 0.0
    """As of DPO."""


@dataclass(frozen=True, kw_only=True)
class SimPO(_Objective):
    """DPO without a reference (Meng et al. 2024, equation 6): rewards are mean log-probabilities."""

    beta: Positive = 2.0
    """Scale of the rewards."""
    margin: Annotated[float, Bounds(0, 1e3)] = 1.0
    """How much more the chosen side's reward is to be (gamma)."""
    nll_weight: Weight = 0.0
    """As of DPO."""


@dataclass(frozen=True, kw_only=True)
class ORPO(_Objective):
    """Instruction tuning on the chosen side and an odds ratio in one (Hong et al. 2024, equation 6), without
    a reference.
    """

    beta: Positive = 0.1
    """Weight of the odds ratio (lambda)."""
    nll_weight: Weight = 1.0
    """As of DPO; here it is most of the loss."""


@dataclass(frozen=True, kw_only=True)
class KTO(_Referred):
    """Kahneman-Tversky optimization on Rated data (Ethayarajh et al. 2024, equation 8). The reference point
    is estimated over each step, from completions of other prompts.
    """

    beta: Positive = 0.1
    """As of DPO."""
    good_weight: Weight = 1.0
    """Weight of good completions; where they are rarer, raise it until good and bad weigh about the same."""
    bad_weight: Weight = 1.0
    """Weight of bad completions."""


@dataclass(frozen=True, kw_only=True)
class BradleyTerry(_Objective):
    """Rewards of a RewardModel on Pairs data, whose difference is the log-odds of being preferred (Bradley
    and Terry 1952; Ouyang et al. 2022, equation 1).
    """

    center: Weight = 0.0
    """Weight of the squared sum of both rewards, which keeps them around 0 (Eisenstein et al. 2023)."""


Objective = (
    CausalLM | MaskedLM | Classification | Distillation | GRPO | DPO | IPO | SimPO | ORPO | KTO | BradleyTerry
)
"""The registry of objectives; `jaxgpt.objectives.OBJECTIVES` has the function of each."""

PREFERENCES: dict[type, type] = {
    **dict.fromkeys((DPO, IPO, SimPO, ORPO, BradleyTerry), Pairs),
    KTO: Rated,
}
"""Objectives over preferences, and the data that each reads."""
