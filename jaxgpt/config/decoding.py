"""How text is made from a model's predictions: drawn, searched for, or chosen among several.

`Decoding` is any of these; `jaxgpt.sample.generate.Generator.generate` takes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import index
from typing import Annotated, Any, Literal

from jaxgpt.config import code
from jaxgpt.config.bounds import Bounds, Share
from jaxgpt.config.check import check_types
from jaxgpt.errors import require, shown

GREEDY_BELOW = 1e-6
"""Temperatures under this are taken as 0: dividing by them would overflow float32."""
LONGEST_NGRAM = 64
MOST_BIAS = 100
"""Of a token's logit, either way: as good as never, or always (OpenAI's)."""
_RANGES = {
    "temperature": (0, 1000, "0 (greedy) and 1000"),
    "top_k": (0, 2**30, f"0 (off) and {2**30}"),
    "top_p": (1e-9, 1, "1e-9 and 1 (off)"),
    "min_p": (0, 1, "0 (off) and 1"),
    "typical_p": (1e-9, 1, "1e-9 and 1 (off)"),
    "repetition_penalty": (1e-3, 1000, "0.001 and 1000 (1 is off)"),
    "presence_penalty": (-2, 2, "-2 and 2 (0 is off)"),
    "frequency_penalty": (-2, 2, "-2 and 2 (0 is off)"),
    "no_repeat_ngram": (0, LONGEST_NGRAM, f"0 (off) and {LONGEST_NGRAM}"),
}
"""Of each setting the least, the most, and both in words."""
Ngram = Annotated[int, Bounds(0, LONGEST_NGRAM)]
Count = Annotated[int, Bounds(1, 4096)]
Weights = Literal["own", "by_output", "int8"]
"""What decoding reads: the weights as they are; laid out as one CPU reads them fastest with few rows, which
takes longer to compile; or so and rounded to int8."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How one row is sampled. The defaults draw from the model's own distribution.

    Applied in this order: repetition penalty, presence and frequency penalties, bias, n-grams, temperature,
    top-k, top-p, min-p, typical-p. Top-k, top-p and min-p each keep an upper set of the logits, so tokens
    that tie with the last one kept are kept too, and the most likely token always is.
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
    typical_p: float = 1.0
    """Keep the tokens whose surprisal is nearest the distribution's entropy, as few as hold this mass
    (Meister et al. 2022, section 5); 1 keeps all."""
    repetition_penalty: float = 1.0
    """Of tokens in the prompt or made before (CTRL, section 4.1); above 1 discourages them."""
    no_repeat_ngram: int = 0
    """No n tokens in a row come twice, the prompt included (Paulus et al. 2018, section 2.5); 0 is off. Where
    every token would repeat some, the row ends."""
    presence_penalty: float = 0.0
    """Taken from the logit of a token that was made before, the prompt's not counted (OpenAI's; -2 to 2)."""
    frequency_penalty: float = 0.0
    """The same for each time that it was made."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Token ids, each with what is added to its logit (-100 to 100)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "logit_bias", _pairs(self.logit_bias))
        for name, (least, most, words) in _RANGES.items():
            value = getattr(self, name)
            # NaN lies in no range; of a number of 400 digits the first are enough.
            require(least <= value <= most, f"{name} is {value!s:.24}; it must be between {words}.")

    @property
    def rows(self) -> int:
        """Rows of a batch that a prompt takes."""
        return 1

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken without chance."""
        return self.temperature < GREEDY_BELOW


def _pairs(given: Any) -> tuple[tuple[int, float], ...]:
    """A bias as pairs in the order of ids, of such pairs or of a mapping.

    Raises:
      UserError: it is none.
    """
    pairs, once = list[tuple[int, float]](), False
    try:
        pairs = sorted((index(token), float(bias)) for token, bias in dict(given).items())
        once = len(pairs) == len(given)
    except (TypeError, ValueError, OverflowError):
        pass  # it is refused below
    require(once, f"logit_bias is {shown(given)}; give token ids, each once and with its bias.")
    for token, bias in pairs:
        require(token >= 0, f"logit_bias has the id {token!s:.24}; ids are 0 or more.")
        require(
            -MOST_BIAS <= bias <= MOST_BIAS,
            f"logit_bias of {token} is {bias!s:.24}; it must be between -{MOST_BIAS} and {MOST_BIAS}.",
        )
    return tuple(pairs)


@dataclass(frozen=True, kw_only=True)
class Beam:
    """Beam search for the likeliest text, all beams of a prompt at once.

    A finished text's score is its log-probability over its number of tokens (a stop token included) to the
    power of `length_penalty`, and the best one is taken. With `groups`, diverse beam search (Vijayakumar et
    al. 2018, section 3): each group of beams chooses after the groups before it, and what these have chosen
    for the same place costs it `diversity` each time. That cost counts in the search, not in the score.
    """

    beams: Annotated[int, Bounds(1, 256)] = 4
    """Texts that are followed at the same time; 1 is greedy decoding."""
    length_penalty: Annotated[float, Bounds(-10, 10)] = 1.0
    """0 scores by log-probability, 1 by its mean over tokens; above 1 favours longer texts."""
    no_repeat_ngram: Ngram = 0
    """No n tokens in a row come twice, the prompt included; 0 is off."""
    groups: Annotated[int, Bounds(1, 256)] = 1
    """Groups of beams, which divide `beams`."""
    diversity: Annotated[float, Bounds(0, 1e6)] = 0.5
    """What choosing a token costs a group, in nats, for each beam of an earlier group that has it; without
    several groups nothing."""
    early_stopping: Literal["full", "heuristic", "never"] = "heuristic"
    """When a search with as many finished texts as beams ends (transformers' True, False and "never"): at
    once; where the best open beam, scored as if it ended now, is worse than all of them; or where no
    continuation of it could be better."""

    def __post_init__(self) -> None:
        check_types(self, "")
        require(
            self.beams % self.groups == 0,
            f"beams is {self.beams} and groups {self.groups}; make beams a multiple of groups.",
        )

    @property
    def rows(self) -> int:
        """Rows of a batch that a prompt takes."""
        return self.beams


@dataclass(frozen=True, kw_only=True)
class Contrastive:
    """Contrastive search (Su et al. 2022, section 3.2): of the likeliest tokens the one that is probable and
    unlike what came before. No chance is involved.
    """

    k: Annotated[int, Bounds(1, 256)] = 4
    """Tokens among which it chooses."""
    alpha: Share = 0.6
    """Weight of the largest cosine similarity between a token's last hidden state and those before it;
    that of its probability is 1 - alpha. 0 is greedy decoding."""

    def __post_init__(self) -> None:
        check_types(self, "")

    @property
    def rows(self) -> int:
        """Rows of a batch that a prompt takes."""
        return self.k


OWN = Sampling()
"""The model's own distribution."""


@dataclass(frozen=True, kw_only=True)
class BestOf:
    """Several samples of each prompt, of which that with the highest score is taken (the first of a tie)."""

    n: Count = 8
    """Samples per prompt."""
    sampling: Sampling = OWN
    """How they are drawn."""
    scorer: str = "mean_logprob"
    """What scores: `logprob`, the sample's log-probability under the model itself; `mean_logprob`, that over
    its number of tokens; a function `FILE.py:NAME` of the prompt's text and the sample's to a number; or the
    folder of a reward model's run. Python may give the function itself."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "scorer", code.references((self.scorer,), "scorer")[0])
        check_types(self, "")

    @property
    def rows(self) -> int:
        """Rows of a batch that a prompt takes."""
        return self.n


@dataclass(frozen=True, kw_only=True)
class MBR:
    """Minimum Bayes risk over samples (Eikema & Aziz 2020, section 6): of several samples of a prompt the one
    that is on average most similar to the others.
    """

    n: Annotated[int, Bounds(2, 4096)] = 16
    """Samples per prompt."""
    sampling: Sampling = OWN
    """How they are drawn."""
    metric: str = "chrf"
    """What measures similarity: `chrf` (Popović 2015) or `bleu` of one sentence, both by sacrebleu, or a
    function `FILE.py:NAME` of a sample and another, taken as the reference, to a number."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "metric", code.references((self.metric,), "metric")[0])
        check_types(self, "")

    @property
    def rows(self) -> int:
        """Rows of a batch that a prompt takes."""
        return self.n


def draws(decoding: object) -> int:
    """Samples of a prompt, each with a seed of its own."""
    return decoding.n if isinstance(decoding, BestOf | MBR) else 1


Decoding = Sampling | Beam | Contrastive | BestOf | MBR
"""Any way of decoding."""
