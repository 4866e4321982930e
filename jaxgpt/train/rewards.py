"""What judges completions: functions of the user's, each called with a prompt, a completion and a record."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxgpt.config import GRPO, code
from jaxgpt.data.readers.prompts import Prompt
from jaxgpt.errors import UserError, require, shown

Reward = Callable[[str, str, dict[str, Any]], float]
"""A function of the prompt's text, the completion's text and the prompt's record."""


@dataclass(frozen=True)
class Rewards:
    """The rewards of a run, added up with their weights.

    Attributes:
      names: as the config has them.
      functions: in the same order.
      weights: of each in the sum.
    """

    names: tuple[str, ...]
    functions: tuple[Reward, ...]
    weights: tuple[float, ...]

    @classmethod
    def of(cls, config: GRPO) -> Rewards:
        """Those that a config names.

        Raises:
          UserError: a file or function is not there, or its code is not trusted.
        """
        functions = tuple(_function(name) for name in config.rewards)
        return cls(config.rewards, functions, config.reward_weights or (1.0,) * len(functions))

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> np.ndarray:
        """The reward of each completion of its prompt [N]; the same in every process.

        Raises:
          UserError: a function raises an error, or returns what is no finite number.
        """
        found_N = np.zeros(len(prompts), np.float64)
        if jax.process_index() == 0:
            for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
                found_N[i] = sum(
                    weight * _judged(name, function, prompt, completion)
                    for name, function, weight in zip(self.names, self.functions, self.weights, strict=True)
                )
        return multihost_utils.broadcast_one_to_all(found_N) if jax.process_count() > 1 else found_N


def _function(name: str) -> Reward:
    require(
        code.is_reference(name),
        f"objective.rewards has {shown(name)}; write a function as FILE.py:NAME.",
    )
    return code.function_of(name, "objective.rewards")


def _judged(name: str, function: Reward, prompt: Prompt, completion: str) -> float:
    """What one function gives for one completion."""
    where = f"objective.rewards: {name.rpartition(':')[2]}() of {name.rpartition(':')[0]}"
    at = f"for the prompt at {prompt.place} and the completion {shown(completion)}"
    try:
        value = function(prompt.text, completion, prompt.record)
    except Exception as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split()):.200}"
        raise UserError(f"{where} raised {why} {at}; return a number for every completion.") from error
    number = value.item() if isinstance(value, np.generic | np.ndarray) and np.size(value) == 1 else value
    if not isinstance(number, int | float) or not math.isfinite(number):
        raise UserError(f"{where} returned {shown(value)} {at}; it must return a finite number.")
    return float(number)
