"""Chats answered from documents: passages before the newest turn, and what the answer cites of them.

The question is the newest turn. Its passages stand before it as they do in training (`config.Knowledge`, with
`cited` a number and a title each). An answer cites `[1]`; to one that does not, the mark of the passage that
has most of its words is added.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from jaxgpt.config import Knowledge as Known
from jaxgpt.data.knowledge import Library
from jaxgpt.sample.options import library_of
from jaxgpt.serve.desk import Desk
from jaxgpt.serve.seams import Cited, Documents, Exchange, Knowledge, NoDocuments
from jaxgpt.text.retrieve import MARK, Passage, best_support


def make_documents(known: Known, desk: Desk, verify: bool = True) -> Documents:
    """What a service answers from.

    Args:
      known: names the files; nothing for none.
      desk: answers where these say nothing.
      verify: compare the checksums of an encoder.

    Raises:
      UserError: the files cannot be read, or hold nothing.
    """
    library = library_of(replace(known, cited=True) if known.documents else known, verify)
    return NoDocuments() if library is None else Shelf(library, desk, root_of(known.documents))


def root_of(documents: Sequence[str]) -> str:
    """The folder that all of them are in, with a slash: clients see no path of this machine above it."""
    paths = [os.path.realpath(one) for one in documents]
    if not paths:
        return ""
    root = Path(os.path.commonpath(paths))
    return f"{root if root.is_dir() else root.parent}/"


class Shelf:
    """Documents, and a desk before them.

    Args:
      library: what is known.
      desk: answers where that says nothing.
      root: of the documents; what sources are named without.
    """

    def __init__(self, library: Library, desk: Desk, root: str = "") -> None:
        self._library, self._desk, self._root = library, desk, root

    def find(self, exchange: Exchange, messages: list[dict[str, Any]]) -> Knowledge:
        """What is known about the last turn of a chat."""
        last = messages[-1]
        if last["role"] != "user" or not last["content"].strip():
            return Knowledge(messages)
        question = last["content"]
        if self._desk.asks_person(question):
            taken = self._desk.hand_over({"id": exchange.id, "messages": messages})
            about = {"handover": {"taken": taken}}
            return Knowledge(messages, answer=self._desk.say_handover(question), about=about)
        found = self._library.about(question)
        if not found.text and self._desk.beyond == "unknown":
            answer = self._desk.say_unknown(question)
            return Knowledge(messages, answer=answer, about={"unknown": True})
        turns = [*messages[:-1], {**last, "content": found.text + question}]
        passages = [p._replace(source=self._named(p.source)) for p in found.passages]
        sources = [
            {"number": i, "title": p.title, "source": p.source, "text": p.text, "score": round(p.score, 4)}
            for i, p in enumerate(passages, 1)
        ]
        sources += [{"source": "facts", "text": fact} for fact in found.facts]
        return Knowledge(turns, sources, cite=partial(cite, passages))

    def _named(self, source: str) -> str:
        """A source as clients see it: a place within the documents."""
        place = os.path.realpath(source)
        return place.removeprefix(self._root) if self._root and place.startswith(self._root) else source


def cite(passages: Sequence[Passage], text: str) -> Cited:
    """What an answer rests on.

    Args:
      passages: those before the question, in their order.
      text: the answer.
    """
    named = [int(m[1]) for m in MARK.finditer(text)]
    numbers = [n for n in dict.fromkeys(named) if 1 <= n <= len(passages)]
    more = ""
    if not numbers and (best := best_support(text, [passage.text for passage in passages])):
        numbers, more = [best], f" [{best}]"
    cited = [{"number": n, "title": passages[n - 1].title, "source": passages[n - 1].source} for n in numbers]
    return Cited(more, cited)
