"""Completions of prompts: what they earned, as rows of a batch, and as a checkpoint holds them.

Shapes: B rows, S slots, T tokens per row, P prompts, G completions per prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict, cast

import numpy as np

from jaxgpt.batch import Batch
from jaxgpt.data.readers.prompts import Prompt
from jaxgpt.files import Count

TINY = 1e-6
"""Added to the deviation that advantages are divided by."""


class HeldRow(TypedDict):
    """One completion, as a checkpoint holds it: all its tokens, and facts of each one drawn."""

    ids: list[int]
    prompt: Count
    logprobs: list[float]
    advantage: float
    kept: NotRequired[list[int]]
    reference: NotRequired[list[float]]


class Held(TypedDict):
    """A rollout that has steps left."""

    left: Count
    rows: list[HeldRow]
    figures: dict[str, float]


@dataclass(frozen=True)
class Completions:
    """What was drawn for some prompts, G rows each.

    Attributes:
      prompts: of each row.
      tokens_BS, logprobs_BS, kept_BS: see `sample.program.Made`.
      length_B: tokens of each row, prompt included.
      stopped_B: whether a row ends with a stop token.
      rewards_B: of each completion.
    """

    prompts: list[Prompt]
    tokens_BS: np.ndarray
    logprobs_BS: np.ndarray
    kept_BS: np.ndarray | None
    length_B: np.ndarray
    stopped_B: np.ndarray
    rewards_B: np.ndarray

    @property
    def new_B(self) -> np.ndarray:
        """Tokens of each completion."""
        return self.length_B - np.array([len(prompt.ids) for prompt in self.prompts])

    def rows(self, at: Sequence[int], advantages: np.ndarray) -> list[HeldRow]:
        """These rows with their advantages."""
        return [self._row(i, float(a)) for i, a in zip(at, advantages, strict=True)]

    def _row(self, i: int, advantage: float) -> HeldRow:
        start, end = len(self.prompts[i].ids), int(self.length_B[i])
        row: HeldRow = {
            "ids": self.tokens_BS[i, :end].tolist(),
            "prompt": start,
            "logprobs": self.logprobs_BS[i, start:end].tolist(),
            "advantage": advantage,
        }
        if self.kept_BS is not None:
            row["kept"] = self.kept_BS[i, start:end].tolist()
        return row


def advantages(rewards_B: np.ndarray, group: int, scale: bool) -> np.ndarray:
    """How much more than its group's mean each completion earned [B], in float32.

    Args:
      rewards_B: groups one after another.
      group: their size.
      scale: divide by the sample standard deviation of the group's rewards.
    """
    rewards_PG = np.asarray(rewards_B, np.float64).reshape(-1, group)
    found_PG = rewards_PG - rewards_PG.mean(axis=1, keepdims=True)
    if scale:
        found_PG /= rewards_PG.std(axis=1, ddof=1, keepdims=True) + TINY
    return found_PG.reshape(-1).astype(np.float32)


def to_batch(rows: Sequence[HeldRow], length: int, pad: int) -> Batch:
    """Completions as a batch (numpy), one document per row; columns as the objective `grpo` reads them."""
    shape = (len(rows), length)
    tokens_BT, targets_BT = np.full(shape, pad, np.int32), np.zeros(shape, np.int32)
    weights_BT, segments_BT = np.zeros(shape, np.float32), np.zeros(shape, np.int32)
    names = [name for name in ("kept", "reference") if rows and name in rows[0]]
    columns = {name: np.zeros(shape, np.int32 if name == "kept" else np.float32) for name in names}
    columns["logprob"] = np.zeros(shape, np.float32)
    for i, row in enumerate(cast(list[Any], rows)):
        n, new = len(row["ids"]) - 1, slice(row["prompt"] - 1, len(row["ids"]) - 1)
        tokens_BT[i, :n], targets_BT[i, :n] = row["ids"][:-1], row["ids"][1:]
        weights_BT[i, new], segments_BT[i, :n] = 1, 1
        columns["logprob"][i, new] = row["logprobs"]
        for name in names:
            columns[name][i, new] = row[name]
    positions_BT = np.arange(length, dtype=np.int32) * (segments_BT > 0)
    columns["advantage"] = np.array([row["advantage"] for row in rows], np.float32)
    own: Any = (tokens_BT, targets_BT, weights_BT, segments_BT, positions_BT)
    return Batch(*own, extra=cast(Any, columns))
