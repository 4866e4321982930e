"""Texts as checks let them through: whole ones, and streams with a look-behind.

A stream is judged part by part. Where a part ends depends on the text alone, never on how it arrived, and a
part is judged once the `look_behind` characters after it are known. So any chunks give the same text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from jaxgpt.config.checks import Checks, SystemPrompt
from jaxgpt.serve.checks import SENTENCE, Finder, Hit, find_hits, make_finder

PART = 24
"""Characters of a stream that are judged at once."""
LONGEST_SENTENCE = 240
"""Characters of a sentence that is judged as one."""


class Screened(NamedTuple):
    """What is left of a text.

    Attributes:
      text: as it may be seen; of a refused one, what stands before the place.
      refused: whether a check refused it.
      hits: what the checks found, in order of place.
    """

    text: str
    refused: bool
    hits: tuple[Hit, ...]


@dataclass
class Screen:
    """One text that passes the checks: `feed` its chunks, then `finish`.

    Attributes:
      finders: the checks.
      look_behind: characters that are kept back.
      refused: whether a check refused the text; nothing more comes then.
      hits: what the checks found so far.
    """

    finders: Sequence[Finder]
    look_behind: int
    refused: bool = False
    hits: list[Hit] = field(default_factory=list)
    _text: str = ""
    _done: int = 0
    """Characters that were judged."""
    _masked: int = 0
    """Up to where they stand behind a mask that was given already."""
    _latest: dict[str, int] = field(default_factory=dict)
    """Of each check, the last hit."""

    def feed(self, chunk: str) -> str:
        """What may be seen of the text by now, that was not given before."""
        if not self.finders:
            return chunk
        self._text += chunk
        given = []
        while (end := self._end()) + self.look_behind <= len(self._text) and not self.refused:
            given.append(self._judge(end, len(self._text)))
        return "".join(given)

    def finish(self) -> str:
        """The rest, once the text has ended."""
        given = []
        while self._done < len(self._text) and not self.refused:
            given.append(self._judge(self._end(), len(self._text)))
        return "".join(given)

    def whole(self, text: str) -> str:
        """What may be seen of a text that is known as a whole."""
        self._text = text
        return self._judge(len(text), len(text))

    def _end(self) -> int:
        """Where the next part ends, as far as the text is known."""
        if not self._by_sentences:
            return min(self._done + PART, len(self._text))
        sentence = SENTENCE.match(self._text, self._done, self._done + LONGEST_SENTENCE)
        return sentence.end() if sentence else self._done

    @cached_property
    def _by_sentences(self) -> bool:
        return any(finder.sentences for finder in self.finders)

    def _judge(self, end: int, known: int) -> str:
        """The part from where the last one ended, after its checks."""
        found = []
        for finder in self.finders:
            first = max(0, self._done - max(finder.before, self.look_behind))
            window = self._text[first : min(end + self.look_behind, known)]
            placed = (
                hit._replace(start=hit.start + first, end=hit.end + first)
                for hit in find_hits(window, finder)
            )
            found += [hit for hit in placed if hit.start < end and hit.end > self._done]
        found.sort()
        stops = [max(hit.start, self._done) for hit in found if hit.action == "refuse"]
        self.refused = bool(stops)
        self._note(found)
        given = self._masked_part(found, min(stops, default=end))
        self._done = end
        return given

    def _note(self, found: Sequence[Hit]) -> None:
        """Keep the hits; what goes on from one part into the next is one."""
        for hit in found:
            place = self._latest.get(hit.check)
            if place is None or self.hits[place].end <= hit.start:
                self._latest[hit.check] = len(self.hits)
                self.hits.append(hit)
            else:
                self.hits[place] = self.hits[place]._replace(end=max(hit.end, self.hits[place].end))

    def _masked_part(self, found: Sequence[Hit], end: int) -> str:
        """The text from where the last part ended to `end`, with kinds in the place of what is masked."""
        given, at = [], max(self._done, self._masked)
        for hit in found:
            if hit.action != "mask" or hit.end <= at or hit.start >= end:
                continue
            if hit.start >= self._masked:
                given += [self._text[at : hit.start], f"<{hit.kind}>"]
            at = self._masked = hit.end
        return "".join([*given, self._text[at:end]])


class Screens:
    """The checks of a service, made once for all requests.

    Args:
      checks: their settings.

    Raises:
      UserError: a file cannot be read, or a package is not installed.
    """

    def __init__(self, checks: Checks) -> None:
        self._checks = checks
        self._input = [make_finder(check) for check in checks.input]
        self._output = [
            None if type(check) is SystemPrompt else make_finder(check) for check in checks.output
        ]

    @property
    def changes_answers(self) -> bool:
        """Whether an answer may be seen otherwise than the model wrote it: its tokens must not be shown."""
        return any(check.action != "flag" for check in self._checks.output)

    def prompt(self, text: str) -> Screened:
        """A message of a prompt."""
        screen = Screen(self._input, 0)
        left = screen.whole(text)
        return Screened(left, screen.refused, tuple(screen.hits))

    def answer(self, system: str = "") -> Screen:
        """For one answer, which must not hold this system prompt."""
        pairs = zip(self._checks.output, self._output, strict=True)
        finders = [made or make_finder(check, system) for check, made in pairs]
        return Screen(finders, self._checks.look_behind)
