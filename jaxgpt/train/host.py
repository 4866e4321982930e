"""What a checkpoint holds beside arrays: schemas of its JSON."""

from __future__ import annotations

from typing import NotRequired, TypedDict

from jaxgpt.files import Count
from jaxgpt.train.completions import Held


class Position(TypedDict):
    """Where the data stopped, see `TrainIterator.get_state` and `Rollouts.get_state`."""

    row: Count
    data: str
    rollout: NotRequired[Held]


class Memory(TypedDict):
    """What the loop remembers: see `Patience` and `NoiseScale`, and the updates skipped so far."""

    waited: Count
    skipped: Count
    best: NotRequired[float]
    noise: NotRequired[tuple[float, float]]


class Host(TypedDict):
    """What a checkpoint holds beside arrays."""

    data: Position
    loop: Memory
