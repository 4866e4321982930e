"""The gradient noise scale: how large a batch is worth its data (McCandlish et al. 2018)."""

from __future__ import annotations

import math
from collections.abc import Sequence

SQUARE = "microbatch_square"
"""Metric of a step: the mean squared norm of its microbatches' gradients."""
DECAY = 0.95
"""Of the averages over steps: an estimate of one step is mostly noise itself."""


class NoiseScale:
    """Averages over steps of the two estimates of appendix A.1, and their ratio, the simple noise scale.

    From the squared norms of the gradient of microbatches of b rows and of the whole batch of B rows:
    |G|^2 = (B |G_B|^2 - b |G_b|^2) / (B - b) and S = (|G_b|^2 - |G_B|^2) / (1 / b - 1 / B), both
    unbiased; their ratio is biased, so each is averaged by itself first.

    Args:
      rows: B, rows per step.
      parts: microbatches per step, at least 2.
      averages: of an earlier process, from a checkpoint.
    """

    def __init__(self, rows: int, parts: int, averages: Sequence[float] = (0.0, 0.0)) -> None:
        self.rows, self.micro = rows, rows / parts
        self.averages = list(averages)

    def update(self, micro_square: float, square: float) -> None:
        """Take in the squared norms of a step's gradients: of microbatches (their mean), and of all."""
        B, b = self.rows, self.micro
        found = (B * square - b * micro_square) / (B - b), (micro_square - square) / (1 / b - 1 / B)
        if all(map(math.isfinite, found)):
            pairs = zip(self.averages, found, strict=True)
            self.averages = [DECAY * old + (1 - DECAY) * new for old, new in pairs]

    @property
    def rows_of_noise(self) -> float:
        """The noise scale in rows; NaN while the gradient cannot be told from its noise."""
        signal, noise = self.averages
        return noise / signal if signal > 0 and noise > 0 else math.nan
