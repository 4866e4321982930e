"""Facts of a triple store (subject, relation, object) about what a question names."""

from __future__ import annotations

from collections.abc import Iterable

from jaxgpt.text.retrieve import IS_CJK

MOST_FACTS = 16
"""Facts about one question; those about its subjects come before those that end in one of its names."""


class Facts:
    """A triple store, looked up by the names in a question.

    Args:
      triples: subject, relation and object of each fact.
    """

    def __init__(self, triples: Iterable[tuple[str, str, str]]) -> None:
        self._about: dict[str, list[str]] = {}
        self._ending: dict[str, list[str]] = {}
        for subject, relation, value in dict.fromkeys(triples):
            fact = as_text(subject, relation, value)
            self._about.setdefault(subject.casefold(), []).append(fact)
            self._ending.setdefault(value.casefold(), []).append(fact)
        self._names = self._about.keys() | self._ending.keys()
        self._longest = max(map(len, self._names), default=0)

    def entities(self, question: str) -> list[str]:
        """The names in a question, without case: from left to right the longest known one at each place.

        A name begins and ends at a border of a word, but for scripts without spaces.
        """
        text, found, at = question.casefold(), list[str](), 0
        while at < len(text):
            sizes = range(min(self._longest, len(text) - at), 0, -1) if _border(text, at) else ()
            ends = (at + n for n in sizes if text[at : at + n] in self._names and _border(text, at + n))
            end = next(ends, None)
            if end is None:
                at += 1
            else:
                found.append(text[at:end])
                at = end
        return list(dict.fromkeys(found))

    def about(self, question: str) -> tuple[str, ...]:
        """What is known of the names in a question, as sentences, `MOST_FACTS` at most; none of another."""
        names = self.entities(question)
        facts = [fact for table in (self._about, self._ending) for n in names for fact in table.get(n, ())]
        return tuple(dict.fromkeys(facts))[:MOST_FACTS]


def as_text(subject: str, relation: str, value: str) -> str:
    """A fact as a sentence, such as `France, capital: Paris.`."""
    if IS_CJK.search(subject):
        return f"{subject}，{relation}：{value}。"
    return f"{subject}, {relation}: {value}."


def _border(text: str, at: int) -> bool:
    """Whether a name may begin or end at this place: not inside of a word of letters with spaces between."""
    around = text[max(0, at - 1) : at + 1]
    return at == 0 or len(around) < 2 or not all(c.isalnum() and not IS_CJK.match(c) for c in around)
