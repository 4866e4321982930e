"""The rewards that a trained run's completions of its validation prompts earn."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from jaxgpt.config import GRPO, Full
from jaxgpt.errors import require
from jaxgpt.sample.load import Trained
from jaxgpt.train.rollout import Rollouts
from jaxgpt.train.state import make_program


def rewards_of(trained: Trained, batches: int = 0) -> dict[str, float]:
    """Figures as training logs them at an evaluation, over all prompts or those of some batches.

    Raises:
      UserError: the run learns from no rewards.
    """
    config: Any = trained.run.objective
    require(isinstance(config, GRPO), f"{trained.folder} learns from no rewards; evaluate a run of GRPO.")
    # Its parameters are those of the whole model, whatever of it was trained.
    run = replace(trained.run, tune=Full(), objective=replace(config, kl=None))
    rollouts = Rollouts(run, trained.tokenizer)
    rollouts.begin(make_program(run, trained.mesh))
    rollouts.use(trained.step, trained.params)
    return rollouts.evaluate(batches)
