"""Perplexities of text as the literature reports them, each under its own name.

The probability of a text is the product over its tokens, each given those before it, and the first given
`<|bos|>`, or the end of another text where the model was trained without `<|bos|>`.
Its negative logarithm in nats, divided by the text's tokens, words, bytes or characters, makes the
figures: `token_perplexity` (of one tokenizer alone), `word_perplexity` (whitespace-separated words of
the raw text, as subword models are compared on WikiText-103), `bits_per_byte` and
`bits_per_character` (Unicode code points).

How much of the text stands before a token decides what it costs: see `windows` and `recurrent`.

Shapes: N tokens of a document, V vocabulary.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from jaxgpt.config import TransformerXL
from jaxgpt.data.corpus import Corpus
from jaxgpt.data.documents import read_documents
from jaxgpt.data.sources import kind_of, read_all
from jaxgpt.errors import UserError, require
from jaxgpt.evals.loss import fetch_behind
from jaxgpt.evals.scoring import Row, Scored, Scorer, progress, require_finite
from jaxgpt.models import init_memory
from jaxgpt.text.tokenizer import Tokenizer, before_text

T = TypeVar("T")
AT_ONCE = 64
"""Batches whose rows or documents are sorted by length together."""


@dataclass(frozen=True)
class Document:
    """A text and what it is measured by.

    Attributes:
      ids_N: its tokens after the one that is given (`text.tokenizer.before_text`).
      words: separated by whitespace; line ends count for none.
      bytes: of UTF-8.
      characters: Unicode code points.
    """

    ids_N: np.ndarray
    words: int
    bytes: int
    characters: int


class Total(NamedTuple):
    """Sums over documents."""

    nats: float = 0.0
    correct: int = 0
    """Tokens that were the likeliest."""
    tokens: int = 0
    words: int = 0
    bytes: int = 0
    characters: int = 0

    def plus(self, document: Document) -> Total:
        """With what a document is measured by; not yet its nats."""
        return self._replace(
            tokens=self.tokens + len(document.ids_N) - 1,
            words=self.words + document.words,
            bytes=self.bytes + document.bytes,
            characters=self.characters + document.characters,
        )

    def figures(self) -> dict[str, float]:
        """The measures of this module's head, `loss` (nats per token), `accuracy` and what was counted.

        A figure that says nothing, as word perplexity where nothing separates words, is left out.
        """
        nats, bits = self.nats, self.nats / math.log(2)
        found = {
            "loss": _ratio(nats, self.tokens),
            "accuracy": _ratio(self.correct, self.tokens),
            "token_perplexity": exponential(_ratio(nats, self.tokens)),
            "word_perplexity": exponential(_ratio(nats, self.words)),
            "bits_per_byte": _ratio(bits, self.bytes),
            "bits_per_character": _ratio(bits, self.characters),
        }
        counts = {name: getattr(self, name) for name in ("tokens", "words", "bytes", "characters")}
        return {name: value for name, value in found.items() if value is not None} | counts


def _ratio(value: float, count: int) -> float | None:
    return value / count if count else None


def exponential(nats: float | None) -> float | None:
    """The exponential; None where it is beyond what a figure can be."""
    return math.exp(nats) if nats is not None and nats < 100 else None


# ---------------------------------------------------------------------------------------- the texts


def read_texts(files: Iterable[str], tokenizer: Tokenizer, bos: bool | None = None) -> Iterator[Document]:
    """Documents of raw text files, one after another: of .jsonl[.gz] and .parquet; any other file is one.

    Args:
      files: their paths.
      tokenizer: of the model.
      bos: whether the model knows texts that begin with `<|bos|>`; None means as the tokenizer does.

    Raises:
      UserError: a file that cannot be read, is not UTF-8 or holds no text.
    """
    before = before_text(tokenizer, tokenizer.adds_bos if bos is None else bos)
    for path in files:
        texts = read_documents([path]) if kind_of(path) not in ("", ".txt") else [_read(path)]
        empty = True
        for text in filter(None, texts):
            empty = False
            yield _document(text, tokenizer, before)
        require(not empty, f"{path} holds no text; name a file that does.")


def _read(path: str) -> str:
    data = read_all(path)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 (offset {error.start}); convert it, as with `iconv -f ENCODING -t UTF-8`."
        ) from None


def _document(text: str, tokenizer: Tokenizer, before: int) -> Document:
    ids_N = np.asarray([before, *tokenizer.encode(text)], np.int32)
    return Document(ids_N, len(text.split()), len(text.encode()), len(text))


def read_split(folder: str | Path, split: str, tokenizer: Tokenizer) -> Iterator[Document]:
    """Documents of prepared text, their last token `<|eos|>` being predicted too, as in training.

    Raises:
      UserError: text that was prepared with another tokenizer.
    """
    corpus = Corpus(folder, split)
    require(
        corpus.manifest["tokenizer"]["digest"] == tokenizer.digest,
        f"{folder} was prepared with another tokenizer than the run's; prepare it again with "
        "--tokenizer set to the run's.",
    )
    bytes_V = tokenizer.token_bytes()
    for number, length in enumerate(corpus.lengths_D):
        ids_N = corpus.read(number, 0, int(length)).astype(np.int32)
        text = tokenizer.decode(ids_N.tolist())
        yield Document(ids_N, len(text.split()), int(bytes_V[ids_N].sum()), len(text))


# ------------------------------------------------------------------------------------- the methods


def windows(document: Document, context: int, stride: int) -> Iterator[Row]:
    """A document as rows that score each of its tokens once.

    The first window scores up to `context` tokens; each later one moves on by `stride`, scores its
    last `stride` tokens and gives them the `context - stride` before. So a stride of the context cuts
    the text into windows that know nothing of each other, and a stride of 1 gives every token the
    full context before it, at the price of a forward pass each.
    """
    ids_N, last, scored = document.ids_N, len(document.ids_N) - 1, 0
    for begin in range(0, max(1, last), stride):
        end = min(begin + context, last)
        if end > scored:
            yield Row(ids_N[begin : end + 1], scored + 1 - begin)
        scored = end
        if end == last:
            return


def sliding(scorer: Scorer, documents: Iterable[Document], stride: int = 0, batch_size: int = 32) -> Total:
    """Sums over documents read in windows of the model's context.

    Args:
      scorer: the model.
      documents: each by itself.
      stride: see `windows`; 0 means the context (disjoint windows).
      batch_size: rows at a time.

    Raises:
      UserError: the stride is not between 1 and the context.
    """
    context = scorer.context
    stride = stride or context
    require(
        1 <= stride <= context,
        f"stride is {stride}; it must be between 1 and the model's context of {context} tokens.",
    )
    total = Total()

    def rows() -> Iterator[Row]:
        nonlocal total
        for document in documents:
            total = total.plus(document)
            yield from windows(document, context, stride)

    nats, correct = 0.0, 0
    for part in parts(rows(), AT_ONCE * batch_size):
        for logprobs_K, greedy_K in scorer.score_rows(part, batch_size, "perplexity"):
            nats -= float(logprobs_K.sum(dtype=np.float64))
            correct += int(greedy_K.sum())
    return total._replace(nats=nats, correct=correct)


def recurrent(scorer: Scorer, documents: Iterable[Document], segment: int = 0, batch_size: int = 32) -> Total:
    """Sums over documents read segment by segment with the memory carried on (Dai et al. 2019, 3.2).

    The memory has the model's `eval_memory` and is empty at a document's beginning. Documents are
    read side by side, but each strictly in order.

    Args:
      scorer: of a Transformer-XL.
      documents: each by itself.
      segment: tokens read at a time; 0 means the model's.
      batch_size: documents at a time.

    Raises:
      UserError: the model has no memory.
    """
    model = scorer.model
    require(
        isinstance(model, TransformerXL),
        f"a {type(model).__name__} carries no memory; leave memory out, or use stride.",
    )
    segment, total = segment or model.row, Total()
    for part in parts(documents, AT_ONCE * batch_size):
        nats, correct = _carried(scorer, part, segment, batch_size)
        total = total._replace(nats=total.nats + nats, correct=total.correct + correct)
        for document in part:
            total = total.plus(document)
    return total


def _carried(
    scorer: Scorer, documents: Sequence[Document], segment: int, batch_size: int
) -> tuple[float, int]:
    """Nats of these documents, and how many of their tokens were the likeliest."""
    model, nats, correct = scorer.model, 0.0, 0
    order = sorted(documents, key=lambda document: len(document.ids_N), reverse=True)
    steps = []
    for i in range(0, len(order), batch_size):
        part = order[i : i + batch_size]
        steps += [(part, at) for at in range(0, max(1, len(part[0].ids_N) - 1), segment)]
    rows = scorer.batch_rows(len(order), batch_size)

    def dispatch() -> Iterator[Scored]:
        memory = None
        for part, at in progress(steps, "perplexity"):
            if at == 0:
                memory = init_memory(model, scorer.compute, scorer.target, rows, evaluation=True)
            pieces = [Row(document.ids_N[at : at + segment + 1], 1) for document in part]
            found, memory = scorer.score_batch(pieces, segment, rows, memory)
            yield found

    for found in fetch_behind(dispatch()):
        for logprobs_K, _ in found.rows():
            require_finite(logprobs_K)
            nats -= float(logprobs_K.sum(dtype=np.float64))
        correct += sum(int(greedy_K.sum()) for _, greedy_K in found.rows())
    return nats, correct


def parts(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of up to `size` items: what is held at a time does not grow with the file."""
    items = iter(items)
    while part := list(itertools.islice(items, size)):
        yield part
