"""Small changes of a text that should not change what is right to say about it.

A text is a list of words, each with the white space behind it; where no spaces stand between words, as in
Chinese, each character is a word. A change returns words with the place of the word that each comes from, so
that what belongs to a word, as its tag, goes with it.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

Rng = np.random.Generator
Change = Callable[[Sequence[str], Sequence[bool], Rng], list[tuple[str, int]]]
"""Of words, whether each may go or move, and random numbers; to words and the places that they come from,
-1 for one that is put in."""

SHARE = 0.1
"""Share of the words that are changed; at least one, where there is any to change."""
_IDEOGRAPH = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"(?:[{_IDEOGRAPH}]|[^\s{_IDEOGRAPH}]+)\s*")
_KEYS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
DISTRACTORS = {
    "en": (
        "The meeting was moved to a quarter past three .",
        "There are two hundred steps in the old lighthouse .",
        "It rained for an hour and then it stopped .",
        "The bus stops in front of the library .",
    ),
    "zh": (
        "会议改到三点一刻。",
        "那座旧灯塔有二百级台阶。",
        "雨下了一个小时就停了。",
        "公交车停在图书馆前面。",
    ),
}
"""Sentences that say nothing of what they are put before."""


class Perturbation(NamedTuple):
    """One kind of change.

    Attributes:
      about: what it does, in words.
      change: see `Change`.
      keeps_words: whether every word stays one, in its place.
    """

    about: str
    change: Change
    keeps_words: bool = False


def words_of(text: str) -> list[str]:
    """The words of a text, each with the white space behind it; joined they are the text but for white space
    that it begins with.
    """
    return _WORD.findall(text)


def perturb(text: str, name: str, seed: int = 0) -> str:
    """The text under the perturbation of this name, always the same for one text and seed."""
    words = words_of(text)
    changed = perturb_words(words, name, seed=seed)
    return "".join(word for word, _ in changed).rstrip() or text


def perturb_words(
    words: Sequence[str], name: str, movable: Sequence[bool] | None = None, seed: int = 0
) -> list[tuple[str, int]]:
    """Words under a perturbation, and where each comes from (-1 for one that was put in).

    Args:
      words: with or without white space behind them.
      name: of `PERTURBATIONS`.
      movable: which of them may be dropped or change places; None means all.
      seed: with the words it decides every choice.
    """
    rng = np.random.default_rng([seed, zlib.crc32(name.encode()), zlib.crc32("\0".join(words).encode())])
    free = [True] * len(words) if movable is None else list(movable)
    return PERTURBATIONS[name].change(words, free, rng)


def _chosen(places: Sequence[int], of: int, rng: Rng) -> list[int]:
    """About `SHARE` of all words, of these places."""
    count = min(len(places), max(1, round(SHARE * of)))
    return sorted(rng.choice(np.asarray(places), count, replace=False).tolist()) if count else []


def _typo(word: str, rng: Rng) -> str:
    """A word with one slip of the fingers: two letters exchanged, one left out, doubled, or a neighbour's."""
    core, space = word.rstrip(), word[len(word.rstrip()) :]
    i = int(rng.integers(len(core) - 1))
    kind = rng.integers(4)
    if kind == 0 and core[i] != core[i + 1]:
        core = core[:i] + core[i + 1] + core[i] + core[i + 2 :]
    elif kind == 1:
        core = core[:i] + core[i + 1 :]
    elif kind == 2:
        core = core[: i + 1] + core[i:]
    else:
        core = core[:i] + _neighbour(core[i], rng) + core[i + 1 :]
    return core + space


def _neighbour(letter: str, rng: Rng) -> str:
    for row in _KEYS:
        if (at := row.find(letter.lower())) >= 0:
            beside = row[max(0, at - 1) : at] + row[at + 1 : at + 2]
            found = beside[int(rng.integers(len(beside)))]
            return found.upper() if letter.isupper() else found
    return letter * 2


def _typos(words: Sequence[str], movable: Sequence[bool], rng: Rng) -> list[tuple[str, int]]:
    long = [i for i, word in enumerate(words) if len(word.rstrip()) > 1 and word.rstrip().isalpha()]
    changed = set(_chosen(long, len(words), rng))
    return [(_typo(word, rng) if i in changed else word, i) for i, word in enumerate(words)]


def _lower(words: Sequence[str], movable: Sequence[bool], rng: Rng) -> list[tuple[str, int]]:
    return [(word.lower(), i) for i, word in enumerate(words)]


def _upper(words: Sequence[str], movable: Sequence[bool], rng: Rng) -> list[tuple[str, int]]:
    return [(word.upper(), i) for i, word in enumerate(words)]


def _drop(words: Sequence[str], movable: Sequence[bool], rng: Rng) -> list[tuple[str, int]]:
    free = [i for i, may in enumerate(movable) if may] if len(words) > 1 else []
    gone = set(_chosen(free, len(words), rng))
    return [(word, i) for i, word in enumerate(words) if i not in gone]


def _swap(words: Sequence[str], movable: Sequence[bool], rng: Rng) -> list[tuple[str, int]]:
    """Neighbours exchanged; white space stays where it is."""
    order, last = list(range(len(words))), -1
    free = [i for i in range(len(words) - 1) if movable[i] and movable[i + 1]]
    for i in _chosen(free, len(words), rng):
        if i > last:
            order[i], order[i + 1], last = i + 1, i, i + 1
    spaces = [word[len(word.rstrip()) :] for word in words]
    return [(words[i].rstrip() + space, i) for i, space in zip(order, spaces, strict=True)]


def _distract(words: Sequence[str], movable: Sequence[bool], rng: Rng) -> list[tuple[str, int]]:
    """A sentence about something else before the text."""
    chinese = any(re.match(f"[{_IDEOGRAPH}]", word) for word in words)
    sentences = DISTRACTORS["zh" if chinese else "en"]
    spaced = any(word != word.rstrip() for word in words)
    said = words_of(sentences[int(rng.integers(len(sentences)))])
    said = [*said[:-1], said[-1] + " "] if spaced else [word.rstrip() for word in said]
    return [*((word, -1) for word in said), *((word, i) for i, word in enumerate(words))]


PERTURBATIONS: dict[str, Perturbation] = {
    "typos": Perturbation("one slip of the fingers in a tenth of the words", _typos, keeps_words=True),
    "lower case": Perturbation("no capitals", _lower, keeps_words=True),
    "upper case": Perturbation("capitals alone", _upper, keeps_words=True),
    "dropped words": Perturbation("a tenth of the words left out", _drop),
    "swapped words": Perturbation("neighbours exchanged, at a tenth of the words", _swap),
    "distractor": Perturbation("a sentence about something else put before the text", _distract),
}
"""Perturbations of texts by name."""
