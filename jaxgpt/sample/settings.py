"""Settings of sampling, checked. Without jax, so that the `--help` of a command is quick."""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxgpt.errors import require

GREEDY_BELOW = 1e-6
"""Temperatures under this are taken as 0: dividing by them would overflow float32."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How one row is sampled. The defaults draw from the model's own distribution.

    Applied in this order: repetition penalty, temperature, top-k, top-p, min-p. Each of the last
    three keeps an upper set of the logits, so tokens that tie with the last one kept are kept too,
    and the most likely token always is.
    """

    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token (the lowest id of a tie)."""
    top_k: int = 0
    """Keep the k most likely tokens (Fan et al. 2018); 0 keeps all."""
    top_p: float = 1.0
    """Keep the fewest likeliest tokens that hold this mass of what top-k left (Holtzman et al.
    2020, section 3.1)."""
    min_p: float = 0.0
    """Keep tokens at least this share as likely as the likeliest (Nguyen et al. 2024)."""
    repetition_penalty: float = 1.0
    """Of tokens in the prompt or made before (CTRL, section 4.1); above 1 discourages them."""

    def __post_init__(self) -> None:
        require(
            0 <= self.temperature < math.inf,
            f"temperature is {self.temperature}; it must be 0 (greedy) or a positive number.",
        )
        require(self.top_k >= 0, f"top_k is {self.top_k}; it must be 0 (off) or a positive number.")
        require(
            0 < self.top_p <= 1,
            f"top_p is {self.top_p}; it must be above 0 and at most 1 (off).",
        )
        require(0 <= self.min_p <= 1, f"min_p is {self.min_p}; it must be between 0 (off) and 1.")
        require(
            0 < self.repetition_penalty < math.inf,
            f"repetition_penalty is {self.repetition_penalty}; it must be above 0 (1 is off).",
        )

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken without chance."""
        return self.temperature < GREEDY_BELOW
