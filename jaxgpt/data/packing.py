"""Documents and dialogues as rows of fixed length, each row reachable by its number.

A row is a dict of arrays of length T: `tokens`, `targets` (the next token), `weights` (of each
target), `segments` (1, 2, ... along the row; 0 is padding) and `positions` (restart with each
segment). A target that lies in another document than its input has weight 0. Other columns, of
length T or one number per row, become `Batch.extra`.

Rows are functions of (seed, number), so that a stream's whole state is the number of the next row,
whatever the processes and threads that read it. Shapes: T tokens per row, D documents, E examples.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import threading
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from jaxgpt.data.corpus import Corpus, Sendable
from jaxgpt.errors import require
from jaxgpt.text.chat import Example

log = logging.getLogger(__name__)

Row = dict[str, np.ndarray]


class Item(NamedTuple):
    """One example as rows hold it: lists of one length.

    `weights[i]` is above 0 where `targets[i]`, an id or the number of a label, is to be predicted from
    token i; `types` tells kinds of text apart, where a model asks, and `side` the documents of an
    example that has several (`readers.pairs`).
    """

    tokens: Sequence[int]
    targets: Sequence[int]
    weights: Sequence[float]
    types: Sequence[int] | None = None
    side: Sequence[int] | None = None

    @classmethod
    def of(cls, example: Example) -> Item:
        """A rendered dialogue: each token with the one that follows."""
        return cls(example.tokens[:-1], example.tokens[1:], example.weights[1:])

    @classmethod
    def whole(cls, example: Example, side: int | None = None) -> Item:
        """A rendered dialogue whose last token is an input too, which nothing follows."""
        tokens, weights = example.tokens, example.weights
        sides = None if side is None else [side] * len(tokens)
        return cls(tokens, [*tokens[1:], 0], [*weights[1:], 0.0], side=sides)


ENDLESS = 1 << 48
"""Rows of a training stream: more than any run reads."""
_NUMBERS = (1 << 31) - 1  # positive int32


class Rows(Protocol):
    """Rows by number."""

    length: int
    """Tokens per row."""
    pad: int
    """The id that fills what is not used."""
    fingerprint: str
    """Changes with anything that changes a row."""
    masked: bool
    """Whether some of every row's targets are only to be read, as the questions of dialogues."""

    @property
    def epoch_rows(self) -> int:
        """Rows of the (first) epoch."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row: ...


# -------------------------------------------------------------------------------- concat then split


class _Epoch(NamedTuple):
    order_D: np.ndarray | None
    ends_D: np.ndarray
    offset: int
    rows: np.ndarray | None


class _Piece(NamedTuple):
    place: int
    begin: int
    tokens: np.ndarray


class ConcatRows(Sendable):
    """Documents laid end to end and cut into rows of T (Megatron-LM's and GPT-2's packing).

    With a seed, the stream is endless: every epoch orders the documents anew, shifts the cuts by a
    random offset, wraps the end around to the beginning, and visits its rows in random order, so
    that even one huge document comes well mixed. An epoch has floor(S / T) rows for S tokens, so
    each token is an input at most once and fewer than T of them are left out, others every time.
    Without a seed the rows are in order and hold every token's prediction exactly once; the last
    one is padded.
    """

    _fresh = ("_plans", "_lock")
    masked = False

    def __init__(self, corpus: Corpus, length: int, seed: int | None, pad: int = 0) -> None:
        self.corpus, self.length, self.seed, self.pad = corpus, length, seed, pad
        self._count = np.arange(length + 1, dtype=np.int32)
        self.tokens = int(corpus.lengths_D.sum(dtype=np.int64))
        self.epoch_rows = self.tokens // length if seed is not None else -(-(self.tokens - 1) // length)
        require(
            self.epoch_rows >= 1,
            f"{corpus.folder}/{corpus.split} holds {self.tokens} tokens, fewer than one row of "
            f"{length}; add text or shorten data.length.",
        )
        self.fingerprint = f"text-{corpus.digest[:16]}-{corpus.split}-{length}-{seed}"
        self._reset()

    def _reset(self) -> None:
        self._plans: dict[int, _Epoch] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self.epoch_rows if self.seed is None else ENDLESS

    def _plan(self, epoch: int) -> _Epoch:
        plan = self._plans.get(epoch)
        if plan is not None:
            return plan
        with self._lock:
            if epoch not in self._plans:
                # Reading ahead straddles two epochs at most; older plans are dropped.
                self._plans = {e: p for e, p in self._plans.items() if e == epoch - 1}
                self._plans[epoch] = self._make_plan(epoch)
            return self._plans[epoch]

    def _make_plan(self, epoch: int) -> _Epoch:
        lengths_D = self.corpus.lengths_D
        if self.seed is None:
            return _Epoch(None, np.cumsum(lengths_D, dtype=np.int64), 0, None)
        rng = np.random.default_rng([self.seed, epoch])
        order_D = rng.permutation(len(lengths_D)).astype(np.uint32)
        offset = int(rng.integers(self.length))
        rows = rng.permutation(self.epoch_rows)
        rows = rows.astype(np.uint32) if self.epoch_rows < 2**32 else rows
        return _Epoch(order_D, np.cumsum(lengths_D[order_D], dtype=np.int64), offset, rows)

    def __getitem__(self, index: int) -> Row:
        epoch, row = divmod(int(index), self.epoch_rows)
        plan = self._plan(epoch)
        row = int(plan.rows[row]) if plan.rows is not None else row
        pieces = self._read(plan, plan.offset + row * self.length, self.length + 1)
        return self._row([(number, 0, piece) for number, (_, _, piece) in enumerate(pieces, 1)])

    def _read(self, plan: _Epoch, start: int, count: int) -> Iterator[_Piece]:
        """Tokens [start, start + count) of an epoch's order, which a seed makes a circle."""
        turn, start = divmod(start, self.tokens)
        place = int(np.searchsorted(plan.ends_D, start, side="right"))
        while count > 0 and place < len(plan.ends_D):
            document = int(plan.order_D[place]) if plan.order_D is not None else place
            size = int(self.corpus.lengths_D[document])
            begin = start - (int(plan.ends_D[place]) - size)
            tokens = self.corpus.read(document, begin, min(size, begin + count))
            yield _Piece(turn * len(plan.ends_D) + place, begin, tokens)
            count, start, place = count - len(tokens), start + len(tokens), place + 1
            if place == len(plan.ends_D) and self.seed is not None:
                turn, place, start = turn + 1, 0, 0

    def _row(self, pieces: list[tuple[int, int, np.ndarray]]) -> Row:
        """A row of (document number, position of its first token, tokens)."""
        segments, positions = (np.zeros(self.length + 1, np.int32) for _ in range(2))
        tokens, used = np.full(self.length + 1, self.pad, np.int32), 0
        for number, first, piece in pieces:
            here, used = slice(used, used + len(piece)), used + len(piece)
            tokens[here], segments[here] = piece, number
            positions[here] = self._count[: len(piece)] + first
        same = (segments[1:] == segments[:-1]) & (segments[1:] > 0)
        # In the padded last row the final token has no target, so as an input it is padding too.
        last = max(used - 1, 0)
        inputs = tokens[:-1].copy()
        inputs[last:], segments[last:], positions[last:] = self.pad, 0, 0
        return {
            "tokens": inputs,
            "targets": tokens[1:],
            "weights": same.astype(np.float32),
            "segments": segments[:-1],
            "positions": positions[:-1],
        }


# ------------------------------------------------------------------------------------------ streams


class StreamRows(ConcatRows):
    """Documents laid end to end and cut into N streams, for a model with a memory.

    Row r is step r // N of stream r % N, so that in batches of N rows, row b of a batch goes on where
    row b of the batch before ended. With a seed, an epoch orders the documents anew, makes a circle
    of them and cuts it at a random place into streams of equal length, whole rows each: fewer than
    N T tokens are left out, others every time. Without one, the streams hold every token's
    prediction exactly once in order, and end in padding.

    Segments number the documents, uniquely along a stream (up to 2^31 of them), and positions count
    from each document's beginning.

    Args:
      corpus, length, seed, pad: as for `ConcatRows`.
      streams: N, rows of the global batch.
    """

    def __init__(self, corpus: Corpus, length: int, streams: int, seed: int | None, pad: int = 0) -> None:
        super().__init__(corpus, length, seed, pad)
        predictions = self.tokens - 1
        self.streams = streams
        self.span = self.tokens // streams if seed is not None else -(-predictions // streams)
        steps = self.span // length if seed is not None else -(-self.span // length)
        require(
            steps >= 1,
            f"{corpus.folder}/{corpus.split} holds {self.tokens} tokens, fewer than one row of "
            f"{length} for each of {streams} streams; add text, or lower train.batch_size or data.length.",
        )
        self.epoch_rows = steps * streams
        self.fingerprint += f"-streams-{streams}"

    def _make_plan(self, epoch: int) -> _Epoch:
        plan = super()._make_plan(epoch)
        if self.seed is None:
            return plan
        offset = int(np.random.default_rng([self.seed, epoch, 1]).integers(self.tokens))
        return plan._replace(offset=offset, rows=None)

    def __getitem__(self, index: int) -> Row:
        epoch, row = divmod(int(index), self.epoch_rows)
        step, stream = divmod(row, self.streams)
        plan, start = self._plan(epoch), stream * self.span + step * self.length
        end = (stream + 1) * self.span  # of training data beyond it, as rows are whole
        end = end if self.seed is not None else min(end, self.tokens - 1)
        count = max(0, min(self.length, end - start))
        if count == 0:
            return self._row([])
        # An epoch's circle is gone round less than twice.
        before = 2 * epoch * len(plan.ends_D) + 1
        pieces = self._read(plan, plan.offset + start, count + 1)
        return self._row([((before + p.place - 1) % _NUMBERS + 1, p.begin, p.tokens) for p in pieces])


# ---------------------------------------------------------------------------------------- first fit


def first_fit(sizes: Sequence[int], length: int, bins: int) -> list[list[int]]:
    """Rows (lists of item numbers) of at most `length`; an item goes to the first open row it fits.

    At most `bins` rows are open; where an item fits none, the fullest is closed. Grain's packer
    closes all of them then, which leaves more of each row empty (measured in the tests).

    Raises:
      ValueError: an item longer than a row.
    """
    free = np.full(bins, length, np.int64)
    open_rows: list[list[int]] = [[] for _ in range(bins)]
    closed = []
    for item, size in enumerate(sizes):
        if size > length:
            raise ValueError(f"item {item} of size {size} is longer than a row of {length}")
        place = int((free >= size).argmax())
        if free[place] < size:
            place = int(free.argmin())
            closed.append(open_rows[place])
            open_rows[place], free[place] = [], length
        open_rows[place].append(item)
        free[place] -= size
    return closed + [row for row in open_rows if row]


class PackedExamples(Sendable):
    """Whole examples packed first-fit into rows of T, none cut, none seen by another.

    With a seed the stream is endless, and every epoch holds each example exactly once, in a new
    order. Without one the rows are those of the examples in order.

    Args:
      items: each of 1 to T tokens.
      bins: rows open at a time.
      group: how many consecutive items are one example, whose documents follow each other in one row.
    """

    _fresh = ("_plans", "_lock", "_starts")
    masked = True

    def __init__(
        self,
        items: Sequence[Item],
        length: int,
        bins: int,
        seed: int | None,
        pad: int = 0,
        group: int = 1,
    ) -> None:
        require(bins >= 1, f"data.bins is {bins}; it must be at least 1.")
        require(len(items) > 0, "no example is left to pack; add data or lengthen the rows.")
        self.length, self.bins, self.seed, self.pad, self.group = length, bins, seed, pad, group
        self.sizes_E = np.array([len(item.tokens) for item in items], np.int64)
        self.starts_E = np.cumsum(self.sizes_E) - self.sizes_E
        dtypes: dict[str, Any] = {"tokens": np.int32, "targets": np.int32, "weights": np.float32}
        more = [name for name in ("types", "side") if getattr(items[0], name) is not None]
        dtypes |= dict.fromkeys(more, np.int32)
        self.columns = {
            name: np.concatenate([np.asarray(getattr(item, name), dtype) for item in items])
            for name, dtype in dtypes.items()
        }
        digest = hashlib.sha256(self.sizes_E.tobytes())
        for column in self.columns.values():
            digest.update(column.tobytes())
        self.digest = digest.hexdigest()
        self.fingerprint = f"chat-{self.digest[:16]}-{length}-{bins}-{seed}"
        self._reset()
        used, rows = int(self.sizes_E.sum()), len(self._plan(0))
        self.efficiency = used / (rows * length)
        log.info(
            "packed %d examples into %d rows of %d: %.1f %% of the tokens are used",
            len(items) // group, rows, length, 100 * self.efficiency,
        )  # fmt: skip

    def _reset(self) -> None:
        self._plans: dict[int, list[list[int]]] = {}
        self._starts = [0]  # first row of each epoch known so far
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._plan(0)) if self.seed is None else ENDLESS

    def _plan(self, epoch: int) -> list[list[int]]:
        with self._lock:
            if epoch not in self._plans:
                self._plans = {e: p for e, p in self._plans.items() if e == epoch - 1}
                self._plans[epoch] = self._make_plan(epoch)
            return self._plans[epoch]

    @property
    def order(self) -> list[list[int]]:
        """The numbers of the items in each row of the first epoch, as they lie in it."""
        return self._plan(0)

    @property
    def epoch_rows(self) -> int:
        """Rows of the first epoch; the others differ by a few."""
        return len(self._plan(0))

    def _make_plan(self, epoch: int) -> list[list[int]]:
        rng = None if self.seed is None else np.random.default_rng([self.seed, epoch])
        sizes = self.sizes_E.reshape(-1, self.group).sum(1)
        order = np.arange(len(sizes)) if rng is None else rng.permutation(len(sizes))
        rows = first_fit(sizes[order].tolist(), self.length, self.bins)
        turn = range(len(rows)) if rng is None else rng.permutation(len(rows))
        return [[int(order[i]) * self.group + k for i in rows[j] for k in range(self.group)] for j in turn]

    def __getitem__(self, index: int) -> Row:
        index = int(index)
        with self._lock:
            # Epochs differ in rows, so a row far ahead costs the plans before it, once.
            while self.seed is not None and index >= self._starts[-1]:
                epoch = len(self._starts) - 1
                self._starts.append(self._starts[-1] + len(self._plan(epoch)))
            epoch = bisect_right(self._starts, index) - 1 if self.seed is not None else 0
            items = self._plan(epoch)[index - (self._starts[epoch])]
        return self._row(items)

    def in_order(self, **columns: np.ndarray) -> PackedExamples:
        """Every example once, in rows of their order, with further columns of all tokens of all examples."""
        rows = copy.copy(self)
        rows.seed, rows.columns = None, self.columns | columns
        return rows

    def _row(self, items: list[int]) -> Row:
        row: Row = {name: np.zeros(self.length, np.int32) for name in ("segments", "positions")}
        for name, column in self.columns.items():
            # Not the targets: they may be labels, of which there can be fewer than the padding's id.
            fill = self.pad if name == "tokens" else 0
            row[name] = np.full(self.length, fill, column.dtype)
        at = 0
        for segment, item in enumerate(items, 1):
            start, size = int(self.starts_E[item]), int(self.sizes_E[item])
            here = slice(at, at + size)
            for name, column in self.columns.items():
                row[name][here] = column[start : start + size]
            row["segments"][here] = segment
            row["positions"][here] = np.arange(size)
            at += size
        return row
