"""What judges completions: functions of the user's, and reward models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxgpt.config import GRPO, code
from jaxgpt.data.readers.prompts import Prompt
from jaxgpt.errors import require, shown
from jaxgpt.sample.judge import Judge, judged

Reward = Callable[[Sequence[Prompt], Sequence[str]], Any]
"""From prompts and a completion of each to its reward [N]."""


@dataclass(frozen=True)
class Rewards:
    """The rewards of a run, added up with their weights.

    Attributes:
      parts: in the order of the config.
      weights: of each in the sum.
    """

    parts: tuple[Reward, ...]
    weights: tuple[float, ...]

    @classmethod
    def of(cls, config: GRPO) -> Rewards:
        """Those that a config names.

        Raises:
          UserError: a file, function or run is not there, or code is not trusted.
        """
        parts = tuple(_part(name) for name in config.rewards)
        return cls(parts, config.reward_weights or (1.0,) * len(parts))

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> np.ndarray:
        """The reward of each completion of its prompt [N]; the same in every process.

        Raises:
          UserError: a function raises an error, or returns what is no finite number.
        """
        total_N = np.zeros(len(prompts), np.float64)
        if jax.process_index() == 0:
            for part, weight in zip(self.parts, self.weights, strict=True):
                total_N += weight * np.asarray(part(prompts, completions), np.float64)
        return multihost_utils.broadcast_one_to_all(total_N) if jax.process_count() > 1 else total_N


def _part(name: str) -> Reward:
    if code.is_reference(name):
        function = code.function_of(name, "objective.rewards")
        return lambda prompts, completions: [
            _judged(name, function, *pair) for pair in zip(prompts, completions, strict=True)
        ]
    require(
        Path(name).is_dir(),
        f"objective.rewards has {shown(name)}; write a function as FILE.py:NAME, or the folder of a reward "
        "model's run.",
    )
    judge = Judge.load(name)

    def by_model(prompts: Sequence[Prompt], completions: Sequence[str]) -> np.ndarray:
        answers = [{"role": "assistant", "content": text} for text in completions]
        return judge([[*p.turns, answer] for p, answer in zip(prompts, answers, strict=True)])

    return by_model


def _judged(name: str, function: Callable[..., Any], prompt: Prompt, completion: str) -> float:
    """What one function gives for one completion."""
    at = f"for the prompt at {prompt.place} and the completion {shown(completion)}"
    return judged("objective.rewards", name, function, (prompt.text, completion, prompt.record), at)
