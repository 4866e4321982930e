"""What a trained run is scored on: a file with `def config() -> Suite`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

from jaxgpt.config.bounds import Bounds, Seed, StepsOr0
from jaxgpt.config.check import check_types
from jaxgpt.config.tasks import Task
from jaxgpt.errors import require


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Tasks that a run is scored on, each by its own metrics."""

    name: str
    """Name of the suite's results."""
    tasks: tuple[Task, ...]
    """The tasks; each reads its test files, else its validation data."""
    names: tuple[str, ...] = ()
    """Names of the tasks in results; empty means their own."""
    limit: StepsOr0 = 0
    """Samples per task, the first ones; 0 means all."""
    resamples: Annotated[int, Bounds(0, 100_000)] = 1000
    """Resamples of an interval and of a paired test; 0 makes none."""
    seed: Seed = 0
    """Of sampling and of resamples."""

    def __post_init__(self) -> None:
        check_types(self, "suite")
        require(
            re.fullmatch(r"[\w.-]+", self.name) is not None,
            f"suite.name is {self.name!r}; use letters and digits.",
        )
        require(len(self.tasks) > 0, "suite.tasks is empty; name at least one task.")
        require(
            len(self.names) in (0, len(self.tasks)) and len(set(self.names)) == len(self.names),
            f"suite.names is {self.names} for {len(self.tasks)} tasks; give each one of its own, or none.",
        )
        files = [name.replace("/", "-").casefold() for name in self.task_names]
        require(
            len(set(files)) == len(files) and all(files),
            f"suite.names is {self.task_names}, which are not all different in names of files; rename one.",
        )

    @property
    def task_names(self) -> tuple[str, ...]:
        """The name of each task, all different."""
        if self.names:
            return self.names
        own = [task.name for task in self.tasks]
        return tuple(n if own.count(n) == 1 else f"{n}-{own[: i + 1].count(n)}" for i, n in enumerate(own))
