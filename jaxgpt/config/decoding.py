"""How text is made from a model's predictions."""

from __future__ import annotations

from dataclasses import dataclass

from jaxgpt.errors import require

GREEDY_BELOW = 1e-6
"""Temperatures under this are taken as 0: dividing by them would overflow float32."""
_RANGES = {
    "temperature": (0, 1000, "0 (greedy) and 1000"),
    "top_k": (0, 2**30, f"0 (off) and {2**30}"),
    "top_p": (1e-9, 1, "1e-9 and 1 (off)"),
    "min_p": (0, 1, "0 (off) and 1"),
    "repetition_penalty": (1e-3, 1000, "0.001 and 1000 (1 is off)"),
}
"""Of each setting the least, the most, and both in words."""


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
        for name, (least, most, words) in _RANGES.items():
            value = getattr(self, name)
            # NaN lies in no range; of a number of 400 digits the first are enough.
            require(least <= value <= most, f"{name} is {value!s:.24}; it must be between {words}.")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken without chance."""
        return self.temperature < GREEDY_BELOW


Decoding = Sampling
"""Any way of decoding."""
