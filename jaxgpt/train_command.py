"""`jaxgpt train`: the loop, and what it scores tasks by."""

from __future__ import annotations

from typing import Any

from jaxgpt.train import command


def train(args: list[str]) -> int:
    """Train a config, or resume it; see `train.command.train`."""

    def scores(*parts: Any) -> Any:
        from jaxgpt.evals.during import (
            task_scores,  # imported late: a mistake in a config is answered at once
        )

        return task_scores(*parts)

    return command.train(args, scores)
