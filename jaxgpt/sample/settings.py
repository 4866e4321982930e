"""Settings of sampling, checked. Without jax, so that the `--help` of a command is quick."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

import tyro

from jaxgpt.config.decoding import GREEDY_BELOW, Sampling
from jaxgpt.errors import UserError

__all__ = ["CHAT_DEFAULT", "GREEDY_BELOW", "SAMPLE_DEFAULT", "Asked", "Sampling", "Verify"]

log = logging.getLogger(__name__)

Verify = Annotated[
    bool,
    tyro.conf.FlagCreatePairsOff,
    tyro.conf.arg(
        help="load without comparing the checkpoint's checksums or looking for NaN in it",
        help_behavior_hint="",
    ),
]
"""The option --no-verify of every command that loads a checkpoint."""

SAMPLE_DEFAULT = Sampling(temperature=0.8)
"""What goes on with a text, unless the model or the call says otherwise."""
CHAT_DEFAULT = Sampling(temperature=0.6)
"""What answers a dialogue."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The settings that a call gives. What it leaves out (None) is as the model's generation_config.json
    says, else as the command does by default.
    """

    temperature: float | None = None
    """Divides the logits; 0 takes the most likely token."""
    top_k: int | None = None
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float | None = None
    """Keep the fewest likeliest tokens that hold this mass of what top-k left; 1 keeps all."""
    min_p: float | None = None
    """Keep tokens at least this share as likely as the likeliest; 0 keeps all."""
    typical_p: float | None = None
    """Keep the tokens whose surprisal is nearest the distribution's entropy, with this mass; 1 keeps all."""
    repetition_penalty: float | None = None
    """Of tokens in the prompt or made before; above 1 discourages them, 1 is off."""
    no_repeat_ngram: int | None = None
    """No so many tokens in a row come twice, the prompt included; 0 is off."""

    def __post_init__(self) -> None:
        Sampling(**self.given)

    @property
    def given(self) -> dict[str, Any]:
        """The settings that are not left out."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def settle(self, model: Mapping[str, float], default: Sampling) -> Sampling:
        """All settings: those asked for, then the model's, then the default ones.

        The model's that count are said, and of these what cannot be is said and left out.
        """
        taken: dict[str, Any] = {}
        for name in model.keys() & vars(default).keys() - self.given.keys():
            try:
                one: dict[str, Any] = {name: model[name]}
                Sampling(**one)
                taken |= one
            except UserError as error:
                log.warning("the model's generation_config.json is not followed: %s", error)
        if taken:
            words = ", ".join(f"{name} {taken[name]:g}" for name in vars(default) if name in taken)
            log.info("from the model's generation_config.json: %s", words)
        return replace(default, **taken, **self.given)
