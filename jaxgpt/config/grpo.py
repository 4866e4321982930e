"""Reinforcement learning from rewards: what a run of GRPO says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from jaxgpt.config import code
from jaxgpt.config.bounds import Bounds, Steps, StepsOr0, Tokens, Weight
from jaxgpt.config.check import check_types
from jaxgpt.config.data import Prompts
from jaxgpt.config.models import TransformerXL
from jaxgpt.errors import require


@dataclass(frozen=True, kw_only=True)
class GRPO:
    """Group-relative policy optimisation (Shao et al. 2024, section 4.1): several completions per prompt,
    and those that earn more reward than their group's mean become more likely.

    The defaults are the paper's without a reference model. Dr. GRPO: scale=False, per="constant". DAPO:
    per="token", clip_high=0.28, redraws=3.
    """

    rewards: tuple[str, ...]
    """What judges a completion, added up: each a function `FILE.py:NAME`, called with the prompt's text, the
    completion's text and the prompt's record, or the folder of a reward model's run. A config file may give
    the function itself."""
    reward_weights: tuple[Annotated[float, Bounds(-1e6, 1e6)], ...] = ()
    """Weight of each reward in the sum; empty means 1 for all."""
    group: Annotated[int, Bounds(2, 4096)] = 8
    """Completions per prompt: train.batch_size is this times the prompts per step."""
    max_new_tokens: Tokens = 64
    """Maximum number of tokens in a completion; fewer where data.length leaves less room."""
    temperature: Annotated[float, Bounds(1e-2, 100)] = 1.0
    """Temperature of the rollouts. Probabilities in the loss are of the distribution drawn from: under this
    temperature, and truncated as below."""
    top_k: StepsOr0 = 0
    """Rollouts draw among the k most likely tokens; 0 keeps all."""
    top_p: Annotated[float, Bounds(1e-6, 1)] = 1.0
    """Rollouts draw among the fewest likeliest tokens that hold this mass; 1 keeps all."""
    updates: Steps = 1
    """Steps per rollout; from the second on, probabilities are not the sampler's any more, and clipping
    counts."""
    clip_low: Annotated[float, Bounds(0, 1)] = 0.2
    """How far below 1 the ratio of new to old probability still counts."""
    clip_high: Annotated[float, Bounds(0, 1e6)] = 0.2
    """How far above 1 it does; more than clip_low leaves unlikely tokens room to grow (DAPO, section 3.1)."""
    scale: bool = True
    """Divide a group's advantages by the standard deviation of its rewards; Dr. GRPO does not."""
    per: Literal["completion", "token", "constant"] = "completion"
    """What the loss is a mean over: completions of the mean over their tokens (GRPO), all tokens of the step
    (DAPO, section 3.3), or completions of the sum over their tokens divided by max_new_tokens (Dr. GRPO)."""
    redraws: StepsOr0 = 0
    """Dynamic sampling (DAPO, section 3.2): how often prompts whose completions all earn the same reward are
    replaced with the next ones, per rollout."""
    kl: Weight | None = None
    """Weight of the KL divergence from the model that init_from names, in the loss; 0 measures it alone. None
    keeps no such model."""
    eval_samples: Annotated[int, Bounds(0, 4096)] = 0
    """Completions per validation prompt, drawn as rollouts are, with the same seeds at each evaluation; 0
    makes one, of the most likely tokens."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "rewards", code.references(self.rewards, "objective.rewards"))
        check_types(self, "objective")
        require(len(self.rewards) > 0, "objective.rewards is empty; name a function as FILE.py:NAME.")
        given = len(self.reward_weights)
        require(
            given in (0, len(self.rewards)),
            f"objective.reward_weights has {given} entries for {len(self.rewards)} rewards; give one for "
            "each, or none.",
        )

    @property
    def truncates(self) -> bool:
        """Whether rollouts leave tokens out."""
        return self.top_k > 0 or self.top_p < 1


def check_rewarded(run: Any) -> None:
    """Refuse prompts without rewards, rewards without prompts, and models that rollouts do not suit."""
    data, objective, model = run.data, run.objective, run.model
    require(
        isinstance(data, Prompts) == isinstance(objective, GRPO),
        f"objective is {type(objective).__name__}() and data {type(data).__name__}(...); GRPO learns "
        "from Prompts, and nothing else does: set both.",
    )
    if not isinstance(objective, GRPO):
        return
    require(
        not isinstance(model, TransformerXL),
        "objective is GRPO() but model is TransformerXL; use GPT(...) or an Architecture of your own.",
    )
    rate = max(getattr(part, "dropout", 0.0) for part in (model, run.tune))
    require(
        rate == 0,
        f"dropout is {rate} but GRPO compares probabilities of one model, sampling and training; set "
        "model.dropout (and tune.dropout) to 0.",
    )
    require(
        objective.kl is None or bool(run.init_from),
        f"objective.kl is {objective.kl} but init_from is empty; name the run to stay close to, or set "
        "it to None.",
    )
    require(
        objective.max_new_tokens < run.length,
        f"objective.max_new_tokens {objective.max_new_tokens} leaves no room for a prompt in data.length "
        f"{run.length}; lower it or lengthen the rows.",
    )
