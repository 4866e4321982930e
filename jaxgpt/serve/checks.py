"""Checks of prompts and answers: each finds places in a text, and its action says what becomes of them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from jaxgpt.config.checks import Action, Check, PersonalData, Repetition, SystemPrompt, Toxicity, Words
from jaxgpt.evals.safety_prompts import RUDE_ZH
from jaxgpt.text.filters import Found, apart, personal_data, read_patterns, read_words, toxicity
from jaxgpt.text.words import placed_words, words_of

Find = Callable[[str], Sequence[Found]]
"""Places in a text, in any order; they may overlap."""
RUDE_EN = (
    *("fuck", "fucker", "fucking", "motherfucker", "shit", "bullshit", "bitch", "bastard", "asshole"),
    *("cunt", "dickhead", "whore", "slut", "wanker"),
)
LONGEST_PERIOD = 40
"""Words that may be repeated as one."""
SHORTEST = 3
"""Words of a system prompt that is worth hiding."""
CHARACTERS = 8
"""Of a word, about."""
SENTENCE = re.compile(r"[^.!?。！？\n]*[.!?。！？\n]*")
"""A sentence with what ends it."""


class Finder(NamedTuple):
    """A check, ready to be used.

    Attributes:
      name: of the check's class.
      action: what becomes of the places.
      find: the places.
      before: characters before a part of a text that it must see to judge that part.
      sentences: whether it judges sentences, so that a stream is not cut within one.
    """

    name: str
    action: Action
    find: Find
    before: int = 0
    sentences: bool = False


class Hit(NamedTuple):
    """A place that a check found, and what becomes of it."""

    start: int
    end: int
    kind: str
    check: str
    action: Action


def make_finder(check: Check, system: str = "") -> Finder:
    """The finder of a check.

    Args:
      check: its settings.
      system: the prompt that must not stand in an answer.

    Raises:
      UserError: a file cannot be read, or a package is not installed.
    """
    return _MAKERS[type(check)](check, system)


def find_hits(text: str, finder: Finder) -> list[Hit]:
    """What a check finds in a text.

    It sees the text without invisible characters, and full-width letters and digits as plain ones.
    """
    plain, places = folded(text)
    return [
        Hit(places[one.start], places[one.end - 1] + 1, one.kind, finder.name, finder.action)
        for one in finder.find(plain)
        if one.end > one.start
    ]


def folded(text: str) -> tuple[str, Sequence[int]]:
    """A text as checks see it, and where each of its characters stood."""
    if text.isascii():
        return text, range(len(text))
    kept = [(_plain(c), i) for i, c in enumerate(text) if unicodedata.category(c) != "Cf"]
    return "".join(c for c, _ in kept), [i for _, i in kept]


def _plain(char: str) -> str:
    """Itself, or the one character that it is a form of: `１` is 1, while `½` stays."""
    form = unicodedata.normalize("NFKC", char)
    return form if len(form) == 1 else char


# ------------------------------------------------------------------------------------------- finders


def _personal(check: PersonalData, system: str) -> Finder:
    own = read_patterns(check.patterns) if check.patterns else []
    personal_data("")  # a missing package is told at once
    return Finder("PersonalData", check.action, lambda text: personal_data(text, own))


def _toxic(check: Toxicity, system: str) -> Finder:
    toxicity([""])

    def find(text: str) -> list[Found]:
        places = [m.span() for m in SENTENCE.finditer(text) if m[0].strip()]
        judged = zip(places, toxicity([text[a:b] for a, b in places]), strict=True)
        return [Found(a, b, "TOXIC") for (a, b), p in judged if p >= check.above]

    return Finder("Toxicity", check.action, find, sentences=True)


def _words(check: Words, system: str) -> Finder:
    words = read_words(check.file) if check.file else (*RUDE_EN, *RUDE_ZH)
    bounded = [rf"(?<!\w){re.escape(w)}(?!\w)" if w[0].isascii() else re.escape(w) for w in words]
    listed = re.compile("|".join(sorted(bounded, key=len, reverse=True)), re.IGNORECASE)

    def find(text: str) -> list[Found]:
        return [Found(m.start(), m.end(), "WORD") for m in listed.finditer(text)]

    return Finder("Words", check.action, find)


def _repetition(check: Repetition, system: str) -> Finder:
    def find(text: str) -> list[Found]:
        words = placed_words(text)
        plain = [word.text for word in words]
        if len(plain) - len(set(plain)) <= check.most:  # too few stand there twice
            return []
        return apart(
            Found(words[start].start, words[end - 1].end, "REPETITION")
            for period in range(1, min(LONGEST_PERIOD, len(words) // 2) + 1)
            for start, end in _runs(plain, period)
            if end - start > check.most
        )

    before = CHARACTERS * (2 * LONGEST_PERIOD + check.most)
    return Finder("Repetition", check.action, find, before)


def _runs(words: Sequence[str], period: int) -> Iterator[tuple[int, int]]:
    """Where words are those `period` before, for at least a period: beginnings and ends."""
    start = period
    for i in range(period, len(words) + 1):
        if i == len(words) or words[i] != words[i - period]:
            if i - start >= period:
                yield start, i
            start = i + 1


def _leakage(check: SystemPrompt, system: str) -> Finder:
    secret = words_of(system)
    chinese = sum(len(word) == 1 and not word.isascii() for word in secret)
    size = min(check.words * (2 if 2 * chinese > len(secret) else 1), len(secret))
    grams = set(zip(*(secret[i:] for i in range(size)), strict=False)) if size >= SHORTEST else set()

    def find(text: str) -> list[Found]:
        words = placed_words(text) if grams else []
        rows = (words[i : i + size] for i in range(len(words) - size + 1))
        return [
            Found(row[0].start, row[-1].end, "SYSTEM_PROMPT")
            for row in rows
            if tuple(word.text for word in row) in grams
        ]

    return Finder("SystemPrompt", check.action, find, CHARACTERS * size)


_MAKERS: dict[type[Any], Callable[[Any, str], Finder]] = {
    PersonalData: _personal,
    Toxicity: _toxic,
    Words: _words,
    Repetition: _repetition,
    SystemPrompt: _leakage,
}
