"""Passages of documents that are near to a query: by BM25 over words, or by the vectors of an encoder.

Nothing here reads documents: `jaxgpt.data.knowledge` does. Shapes: N passages, D width of a vector.
"""

from __future__ import annotations

import io
import json
import logging
import math
import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import msgspec
import numpy as np

from jaxgpt.errors import UserError, library_errors, require
from jaxgpt.files import parse_json, read_small, write_bytes

VERSION = 2
"""Of what an index file holds."""
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_RUNS = re.compile(rf"[{_CJK}]+|[^\W_{_CJK}]+")
IS_CJK = re.compile(f"[{_CJK}]")
"""A character of a script that is written without spaces between words."""
_PARAGRAPH = re.compile(r"\S(?:.|\n(?![^\S\n]*\n))*")


MARK = re.compile(r"\[(\d{1,3})\]")
"""How an answer names a passage: by its number."""
HALF = 0.5
"""Part of an answer's words that a passage must have to support it."""


class Passage(NamedTuple):
    """A part of a document, where it stands (FILE:LINE), how near it is to a query, and what it is called."""

    text: str
    source: str
    score: float = 0.0
    title: str = ""


class Encoder(Protocol):
    """Texts to vectors, such as `jaxgpt.sample.encode.load_encoder(RUN)`."""

    @property
    def identity(self) -> str:
        """What changes when the vectors do."""
        ...

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """One vector for each text [N, D]."""
        ...


def terms(text: str) -> list[str]:
    """What BM25 counts: words without case; of scripts without spaces each character and each pair of
    neighbours.
    """
    found: list[str] = []
    for run in _RUNS.findall(unicodedata.normalize("NFKC", text).casefold()):
        if IS_CJK.match(run):
            found += [*run, *(run[i : i + 2] for i in range(len(run) - 1))]
        else:
            found.append(run)
    return found


def best_support(answer: str, texts: Sequence[str]) -> int:
    """The number, from 1, of the text that has most of an answer's words (of a tie the first); 0 where none
    has half of them.
    """
    words = terms(answer)
    shares = [sum(w in held for w in words) / len(words) for held in map(set, map(terms, texts)) if words]
    return 1 + shares.index(max(shares)) if max(shares, default=0.0) >= HALF else 0


def cut(text: str, size: int) -> Iterator[tuple[int, str]]:
    """(character where it begins, passage): the text's paragraphs; those above `size` characters by whole
    sentences, a longer sentence between words, and a longer word by size alone.
    """
    for paragraph in _PARAGRAPH.finditer(text):
        begin, end = paragraph.start(), paragraph.start() + len(paragraph[0].rstrip())
        while begin < end:
            ends = range(begin + size, begin, -1) if end - begin > size else ()
            last = next((e for e in ends if _ends_sentence(text, e)), None)
            last = last or next((e for e in ends if text[e].isspace()), min(end, begin + size))
            yield begin, text[begin:last].rstrip()
            begin = last + len(text[last:end]) - len(text[last:end].lstrip())


def _ends_sentence(text: str, at: int) -> bool:
    return text[at - 1] in "。！？；" or (text[at - 1] in ".!?" and text[at : at + 1].isspace())


class Retriever:
    """Passages and an index over them; make one with `build` or `load`.

    BM25 is that of bm25s in Lucene's form (k1 1.5, b 0.75). Vectors are compared by their cosine.
    """

    def __init__(
        self,
        passages: Sequence[Passage],
        arrays: dict[str, np.ndarray],
        words: Sequence[str] = (),
        encode: Encoder | None = None,
    ) -> None:
        self.passages, self._arrays, self._words, self._encode = passages, arrays, words, encode
        self._ids = {word: i for i, word in enumerate(words)}

    @classmethod
    def build(cls, passages: Sequence[Passage], encode: Encoder | None = None) -> Retriever:
        """Index passages, of equal ones the first: by an encoder's vectors, or without one for BM25.

        Raises:
          UserError: no passage has a word, or bm25s is not installed.
        """
        passages = list({p.text: p for p in reversed(passages)}.values())[::-1]
        require(bool(passages), "the documents hold no passage; name files with text in them.")
        if encode is not None:
            return cls(passages, {"vectors": _units(encode([p.text for p in passages]))}, (), encode)
        words = [terms(p.text) for p in passages]
        require(any(words), "the documents hold no word, so nothing in them can be found; name others.")
        bm25 = _bm25()
        bm25.index(words, show_progress=False)
        arrays = {name: np.asarray(bm25.scores[name]) for name in ("data", "indices", "indptr")}
        return cls(passages, arrays, sorted(bm25.vocab_dict, key=bm25.vocab_dict.__getitem__))

    def search(self, query: str, k: int) -> list[Passage]:
        """The `k` passages nearest to a query, best first (of a tie the first); BM25 gives those alone that
        share a word with it.
        """
        if self._encode is not None:
            scores_N, least = self._arrays["vectors"] @ _units(self._encode([query]))[0], -np.inf
        else:
            scores_N, least = self._bm25(query), 0.0
        best = np.argsort(-scores_N, kind="stable")[:k]
        return [self.passages[i]._replace(score=float(scores_N[i])) for i in best if scores_N[i] > least]

    def _bm25(self, query: str) -> np.ndarray:
        """The score of each passage [N]: the sum over the query's words of what bm25s made of them."""
        data, indices, indptr = (self._arrays[name] for name in ("data", "indices", "indptr"))
        scores_N = np.zeros(len(self.passages), np.float32)
        for i in (self._ids[word] for word in terms(query) if word in self._ids):
            here = slice(indptr[i], indptr[i + 1])
            scores_N[indices[here]] += data[here]
        return scores_N

    def share(self, query: str, score: float) -> float:
        """What part a score is of the most that a passage could have for a query, between 0 and 1.

        BM25's is bounded by the sum of its terms' inverse document frequencies, those of words that no
        passage has included: a question about something else has a low share. Of an encoder it is the cosine.
        """
        if self._encode is not None:
            return min(max(score, 0.0), 1.0)
        indptr, most, count = self._arrays["indptr"], 0.0, len(self.passages)
        for i in (self._ids.get(word) for word in terms(query)):
            held = 0 if i is None else int(indptr[i + 1] - indptr[i])
            most += math.log1p((count - held + 0.5) / (held + 0.5))
        return score / most if most else 0.0

    def save(self, path: Path, digest: str) -> None:
        """Write the index as one file, whole or not at all.

        Args:
          path: of the file.
          digest: of all that it is made of; `load` compares it.
        """
        passages = [(p.text, p.source, p.title) for p in self.passages]
        about = {"version": VERSION, "digest": digest, "passages": passages, "words": [*self._words]}
        text = np.frombuffer(json.dumps(about, ensure_ascii=False).encode(), np.uint8)
        arrays: dict[str, Any] = {"about": text, **self._arrays}
        np.savez(buffer := io.BytesIO(), **arrays)
        write_bytes(path, buffer.getvalue())

    @classmethod
    def load(cls, path: Path, digest: str, encode: Encoder | None = None) -> Retriever | None:
        """The index of a file; None where it is of other documents, settings or another encoder.

        Raises:
          UserError: the file is no index, or is damaged.
        """
        fix = "remove it to have it made again"
        try:
            data = read_small(path, fix)
        except OSError as error:
            raise UserError(f"index {path} cannot be read ({error.strerror}); {fix}.") from None
        with library_errors(f"{path} is no index of documents", fix):
            arrays = dict(np.load(io.BytesIO(data), allow_pickle=False))
            about = arrays.pop("about").tobytes()
        held = parse_json(about, _About, path, fix)
        if (held.version, held.digest) != (VERSION, digest):
            return None
        passages = [Passage(text, source, title=title) for text, source, title in held.passages]
        return cls(passages, arrays, held.words, encode)


class _About(msgspec.Struct):
    version: int
    digest: str
    passages: list[list[str]]
    words: list[str]


def _bm25() -> Any:
    try:
        from bm25s import BM25
    except ImportError:
        raise UserError(
            "retrieval by BM25 needs bm25s, which is not installed; run `pip install 'jaxgpt[eval]'`, or "
            "name an encoder."
        ) from None
    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it sets its own to say all
    return BM25(method="lucene", k1=1.5, b=0.75)


def _units(vectors_ND: np.ndarray) -> np.ndarray:
    """Vectors of length 1, float32."""
    vectors_ND = np.asarray(vectors_ND, np.float32)
    return vectors_ND / np.maximum(np.linalg.norm(vectors_ND, axis=-1, keepdims=True), 1e-12)
