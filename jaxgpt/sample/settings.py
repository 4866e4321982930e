"""Settings of sampling, checked. Without jax, so that the `--help` of a command is quick."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import tyro

from jaxgpt.config.decoding import GREEDY_BELOW, MBR, Beam, BestOf, Contrastive, Decoding, Sampling
from jaxgpt.errors import UserError, require

__all__ = ["CHAT_DEFAULT", "GREEDY_BELOW", "SAMPLE_DEFAULT", "Asked", "Sampling", "Verify", "Way"]

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
    presence_penalty: float | None = None
    """Taken from the logit of a token that was made before (-2 to 2); 0 is off."""
    frequency_penalty: float | None = None
    """The same for each time that it was made."""
    logit_bias: tuple[tuple[int, float], ...] | None = None
    """Token ids, each followed by what is added to its logit (-100 to 100)."""

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


@dataclass(frozen=True, kw_only=True)
class Way:
    """Another way of decoding than drawing one sample: at most one of `beams`, `contrastive`, `best_of` and
    `mbr`, with what belongs to it. 0 or None is off.
    """

    beams: int = 0
    """Search for the likeliest text with so many beams; --n shows several, the best first."""
    length_penalty: float | None = None
    """Of --beams: 0 compares log-probabilities, 1 (default) their means; more favours long texts."""
    groups: int | None = None
    """Of --beams: groups that choose after each other, so that texts differ."""
    diversity: float | None = None
    """Of --groups: what a token costs for each beam of an earlier group that has it, in nats (0.5)."""
    contrastive: float | None = None
    """Contrastive search among the --top-k (4) likeliest tokens: weight (0.6) of being unlike the text."""
    best_of: int = 0
    """Draw so many samples per prompt and show the one with the highest reward; --n shows several."""
    reward: str = ""
    """Of --best-of: mean_logprob (default), logprob, a reward model's run, or a function FILE.py:NAME."""
    mbr: int = 0
    """Minimum Bayes risk: draw so many samples per prompt and show the one most like the others (chrF)."""

    def __post_init__(self) -> None:
        self.settle(Asked(), {}, SAMPLE_DEFAULT)

    def settle(self, asked: Asked, model: Mapping[str, float], default: Sampling) -> Decoding:
        """The decoding: this way, with the settings of sampling where there is chance in it.

        Raises:
          UserError: two ways at once, or a setting that the way has no use for.
        """
        given = [name for name in ("beams", "contrastive", "best_of", "mbr") if getattr(self, name)]
        given += ["contrastive"] if self.contrastive == 0 else []
        require(len(given) < 2, f"{_flags(given)} exclude each other; drop one.")
        way = given[0] if given else ""
        for name, owner in _OWNERS.items():
            left_out = getattr(self, name) in (None, "")
            require(
                owner == way or left_out, f"{_flags([name])} is given without {_flags([owner])}; add that."
            )
        if way == "beams":
            own = {name: getattr(self, name) for name in ("length_penalty", "groups", "diversity")}
            taken = _taken(asked, way, "no_repeat_ngram")
            return Beam(beams=self.beams, **{k: v for k, v in own.items() if v is not None}, **taken)
        if way == "contrastive":
            k = _taken(asked, way, "top_k").get("top_k") or Contrastive().k
            return Contrastive(k=k, alpha=self.contrastive or 0.0)
        sampling = asked.settle(model, default)
        if way == "best_of":
            return BestOf(n=self.best_of, sampling=sampling, scorer=self.reward or BestOf().scorer)
        return MBR(n=self.mbr, sampling=sampling) if way == "mbr" else sampling


_OWNERS = {"length_penalty": "beams", "groups": "beams", "diversity": "beams", "reward": "best_of"}
"""Settings that belong to one way."""


def _taken(asked: Asked, way: str, name: str) -> dict[str, Any]:
    """The one setting of sampling that a way without chance has a use for."""
    others = [other for other in asked.given if other != name]
    require(not others, f"{_flags(others[:1])} means nothing under {_flags([way])}; drop it.")
    return asked.given


def _flags(names: Sequence[str]) -> str:
    return " and ".join(f"--{name.replace('_', '-')}" for name in names)
