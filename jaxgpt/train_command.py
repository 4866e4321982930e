"""`jaxgpt train`: the loop, what it scores tasks by, and what looks at its steps."""

from __future__ import annotations

from typing import Any

from jaxgpt.profile.profiler import take_steps
from jaxgpt.train import command


def train(args: list[str]) -> int:
    """Train a config, or resume it; see `train.command.train`."""

    def scores(*parts: Any) -> Any:
        from jaxgpt.evals.during import (
            task_scores,  # imported late: a mistake in a config is answered at once
        )

        return task_scores(*parts)

    rest, profile = take_steps(args)
    return command.train(rest, scores, profile)
