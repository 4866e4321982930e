"""What is known about a question: passages of documents, and facts about what it names."""

from __future__ import annotations

import hashlib
import logging
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxgpt.config import Knowledge, code
from jaxgpt.data.lines import as_object, check_text, field_of, parse_line, read_lines
from jaxgpt.data.sources import Report, endings, expand, kind_of, open_raw, read_all
from jaxgpt.data.tables import TABLES, parquet_rows, table_rows
from jaxgpt.errors import UserError, require
from jaxgpt.files import require_writable
from jaxgpt.text.facts import Facts
from jaxgpt.text.retrieve import Encoder, Passage, Retriever, cut

log = logging.getLogger(__name__)

SUFFIXES = endings(".txt", ".md", ".jsonl", ".ndjson", ".parquet")
"""Of documents that are searched."""
MAX_BAD = 0.01
_HEADING = re.compile(r"#+[^\S\n]+(.*\S)")
HEADER = ("subject", "relation", "object")


class Found(NamedTuple):
    """What is known about a question.

    Attributes:
      text: what stands before the question: a line for each fact, a paragraph for each passage, and an empty
        line at the end; empty where nothing was found.
      sources: where each of the passages stands.
      facts: the facts.
      passages: those that the sources name, as they stand in their documents.
    """

    text: str = ""
    sources: tuple[str, ...] = ()
    facts: tuple[str, ...] = ()
    passages: tuple[Passage, ...] = ()


class Library:
    """What `config.Knowledge` names, read.

    Args:
      retriever: finds passages; None for none.
      known: says how many passages are found, and how they are written.
      facts: a triple store; None for none.
    """

    def __init__(self, retriever: Retriever | None, known: Knowledge, facts: Facts | None) -> None:
        self.retriever, self.known, self.facts = retriever, known, facts

    def near(self, question: str) -> list[Passage]:
        """The passages for a question, the nearest first; none where the best one says too little."""
        if self.retriever is None:
            return []
        near = self.retriever.search(question, self.known.passages)
        return near if near and self.retriever.share(question, near[0].score) >= self.known.least else []

    def about(self, question: str) -> Found:
        """What is put before a question."""
        facts = self.facts.about(question) if self.facts else ()
        near = self.near(question)
        texts = [p.text for p in near]
        if self.known.cited:
            texts = [f"[{i}] {p.title}: {p.text}" for i, p in enumerate(near, 1)]
        parts = ["\n".join(facts)] * bool(facts) + texts
        return Found("".join(f"{part}\n\n" for part in parts), tuple(p.source for p in near), facts, (*near,))


class FunctionEncoder:
    """A function of texts to vectors, of a file of its user's."""

    def __init__(self, reference: str) -> None:
        self._function: Callable[[Sequence[str]], Any] = code.function_of(reference, "encoder")
        self.identity = hashlib.sha256(Path(reference.rpartition(":")[0]).read_bytes()).hexdigest()

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        return np.asarray(self._function(texts), np.float32)


@lru_cache(maxsize=8)
def open_library(knowledge: Knowledge, encode: Encoder | None = None) -> Library:
    """Read and index what is known; once in a process.

    Args:
      knowledge: names the files.
      encode: the encoder, where `knowledge.encoder` names a run.

    Raises:
      UserError: files that cannot be read, or hold nothing to find.
    """
    if knowledge.encoder and encode is None:
        require(
            code.is_reference(knowledge.encoder),
            f"encoder is {knowledge.encoder!r}; name a function as FILE.py:NAME, see docs/knowledge.md.",
        )
        encode = FunctionEncoder(knowledge.encoder)
    retriever = _retriever(knowledge, encode) if knowledge.documents else None
    return Library(retriever, knowledge, read_facts(knowledge.facts) if knowledge.facts else None)


def _retriever(knowledge: Knowledge, encode: Encoder | None) -> Retriever:
    files = expand(knowledge.documents, SUFFIXES)
    cut_by = (knowledge.passage_size, knowledge.text_field)
    if not knowledge.index:
        return Retriever.build(list(read_passages(files, *cut_by)), encode)
    path = Path(knowledge.index)
    digest = _digest(files, f"{cut_by} {encode.identity if encode else 'bm25'}")
    if path.exists():
        if (held := Retriever.load(path, digest, encode)) is not None:
            return held
        log.warning("the documents, or how they are read, changed since %s was made: it is made anew", path)
    require_writable(path.parent)
    made = Retriever.build(list(read_passages(files, *cut_by)), encode)
    made.save(path, digest)
    return made


def known_files(knowledge: Knowledge) -> list[str]:
    """The files that are read."""
    found = expand(knowledge.documents, SUFFIXES) if knowledge.documents else []
    return found + [knowledge.facts] * bool(knowledge.facts)


def _digest(files: Sequence[str], how: str) -> str:
    """SHA-256 (hex) of the files' names and bytes, and of how they are read."""
    whole = hashlib.sha256(how.encode())
    for name in files:
        with open_raw(name) as stream:
            whole.update(f"\0{name}\0".encode() + hashlib.sha256(stream.read()).digest())
    return whole.hexdigest()


def read_passages(files: Sequence[str], size: int = 500, field: str = "text") -> Iterator[Passage]:
    """The passages of files, each with FILE:LINE; of one that begins inside of a line or record the character
    follows.

    Raises:
      UserError: a file that cannot be read, or too many bad records.
    """
    report = Report()
    for path in files:
        if kind_of(path, SUFFIXES) in (".txt", ".md"):
            yield from _of_text(path, size)
            continue
        for where, text, title in _records(path, field, report):
            for at, passage in cut(text, size):
                source = f"{where}, character {at + 1}" if at else where
                yield Passage(passage, source, title=title or stem_of(path))
    report.check(MAX_BAD, "fix them or leave the file out")


def stem_of(path: str) -> str:
    """A file's name without its endings."""
    return Path(path).name.split(".")[0]


def _of_text(path: str, size: int) -> Iterator[Passage]:
    try:
        text = read_all(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (offset {error.start}); convert it with iconv.") from None
    title, headed = stem_of(path), kind_of(path, SUFFIXES) == ".md"
    starts = [0, *(i + 1 for i, c in enumerate(text) if c == "\n")]
    for at, passage in cut(text, size):
        if headed and (heading := _HEADING.match(passage)):
            title = heading[1]
            if heading.end() == len(passage):
                continue  # a heading alone says nothing
        line = bisect_right(starts, at)
        column = at - starts[line - 1]
        source = f"{path}:{line}" + (f":{column + 1}" if column else "")
        yield Passage(passage, source, title=title)


def _records(path: str, field: str, report: Report) -> Iterator[tuple[str, str, str]]:
    """Where a record stands, its text and its title."""

    def text_of(record: Any) -> tuple[str, str]:
        title = as_object(record).get("title", "")
        return check_text(field_of(record, field), field), title if isinstance(title, str) else ""

    if kind_of(path, SUFFIXES) == ".jsonl":
        for where, (text, title) in read_lines(path, report, lambda line: text_of(parse_line(line))):
            yield where, text, title
        return
    for where, row in parquet_rows(path, report, field):
        try:
            yield where, *text_of(row)
        except ValueError as error:
            report.add_bad(where, str(error))


def read_facts(path: str) -> Facts:
    """The triples of a table of three columns; a first line `subject, relation, object` names them.

    Raises:
      UserError: it cannot be read, or has rows of other than three cells.
    """
    (path,), report, triples = expand([path], TABLES), Report(), list[tuple[str, str, str]]()
    for where, cells in table_rows(path, report):
        cells = [cell.strip() for cell in cells]
        if len(cells) != 3 or not all(cells):
            report.add_bad(where, f"{len(cells)} cells, not a subject, a relation and an object")
        elif triples or tuple(cell.casefold() for cell in cells) != HEADER:
            triples.append((cells[0], cells[1], cells[2]))
    report.check(MAX_BAD, "fix them or leave the file out")
    require(bool(triples), f"{path} holds no fact; write a subject, a relation and an object per line.")
    return Facts(triples)
