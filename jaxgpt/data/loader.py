"""Batches for training and validation, made of the rows of any reader, read by Grain.

The stream is one sequence of rows, the same for any number of processes: step s of a batch of B
rows holds the rows [s B, (s + 1) B), and a process reads those of them that its devices hold
(`sharding.process_rows`). So the state is the number of the next row, it fits any number of
processes and any mesh, and resuming is exact.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import Any, cast

import absl.flags
import grain
import jax
import numpy as np

from jaxgpt.batch import Batch
from jaxgpt.config import Classifier
from jaxgpt.config.data import Data, Mix
from jaxgpt.data.mixing import MixedRows
from jaxgpt.data.packing import Row, Rows
from jaxgpt.data.readers import rows_of
from jaxgpt.errors import require
from jaxgpt.text.tokenizer import Tokenizer

_AHEAD = 4  # batches ready at a time: hides a slow one, costs little memory
_CHECKED = 4  # first batches whose loss mask is looked at
COLUMNS = ("tokens", "targets", "weights", "segments", "positions", "types")
"""Columns of a row that are fields of `Batch`; all others are extra ones."""


def train_iterator(
    data: Data,
    tokenizer: Tokenizer,
    *,
    model_length: int,
    batch_size: int,
    seed: int,
    task: Classifier | None = None,
    part: Sequence[int] | None = None,
) -> TrainIterator:
    """Endless batches of this process (numpy arrays, [rows, T]), shuffled anew every epoch.

    Args:
      data: what to read.
      tokenizer: the one the data were or are to be tokenized with.
      model_length: T where `data.length` is None.
      batch_size: rows of all processes.
      seed: of the order of documents or examples and of the cuts.
      task: what labels mean, on Tagged and Labelled data.
      part: places in the batch of the rows that this process reads; None means all.

    Raises:
      UserError: no data, data of another tokenizer, less data than one batch of all processes.
    """
    rows = rows_of(data, tokenizer, model_length, seed, batch_size, task)
    have = rows.epoch_rows
    require(
        have >= batch_size,
        f"the training data fill {have} rows of {rows.length} tokens, fewer than one batch of "
        f"{batch_size}; add data, or lower train.batch_size or data.length.",
    )
    names = data.source_names if isinstance(data, Mix) else ()
    return TrainIterator(rows, batch_size, part, getattr(data, "workers", 0), names)


def validation_parts(
    data: Data,
    tokenizer: Tokenizer,
    *,
    model_length: int,
    batch_size: int,
    task: Classifier | None = None,
    part: Sequence[int] | None = None,
) -> dict[str, ValidationBatches]:
    """The validation data of each source of a mixture, by its name; of other data one part, named ""."""
    shape: dict[str, Any] = {"batch_size": batch_size, "task": task, "part": part}
    if not isinstance(data, Mix):
        return {"": validation_batches(data, tokenizer, model_length=model_length, **shape)}
    shape["model_length"] = data.length or model_length
    pairs = zip(data.source_names, data.sources, strict=True)
    return {name: validation_batches(source, tokenizer, **shape) for name, source in pairs}


def validation_batches(
    data: Data,
    tokenizer: Tokenizer,
    *,
    model_length: int,
    batch_size: int,
    task: Classifier | None = None,
    part: Sequence[int] | None = None,
) -> ValidationBatches:
    """The validation data once, in order, as often as it is iterated; as for `train_iterator`.

    Every token is predicted exactly once. The last batch is filled with rows of padding (weights
    and segments 0), so that every process has the same number of batches.
    """
    rows = rows_of(data, tokenizer, model_length, None, batch_size, task)
    return ValidationBatches(rows, batch_size, part)


# ------------------------------------------------------------------------------------ iterators


class _Share:
    """The batches of one process by number, from row `first` on (a Grain source).

    Whole batches, since what Grain does for an element takes several times what a short row does.
    """

    def __init__(self, rows: Rows, batch: int, part: Sequence[int] | None, first: int = 0) -> None:
        self.rows, self.batch, self.first = rows, batch, first
        self.part = range(batch) if part is None else part

    def __len__(self) -> int:
        return -(-(len(self.rows) - self.first) // self.batch)

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        start = self.first + int(step) * self.batch
        rows = [self._row(start + place) for place in self.part]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def _row(self, number: int) -> Row:
        if number < len(self.rows):
            return self.rows[number]
        length = self.rows.length
        row: Row = {name: np.zeros_like(column) for name, column in self.rows[0].items()}
        return row | {"tokens": np.full(length, self.rows.pad, np.int32)}

    def __repr__(self) -> str:
        return f"_Share({self.rows.fingerprint}, {self.part} of {self.batch}, {self.first})"


def _batches(share: _Share, workers: int) -> Any:
    """A Grain iterator over dicts of [B, T] arrays."""
    # One thread: a second one would mostly wait for Python's lock. `workers` are for slow disks.
    ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_AHEAD)
    stream = grain.MapDataset.source(cast(Any, share)).to_iter_dataset(ahead)
    if workers == 0:
        return iter(stream)
    if not absl.flags.FLAGS.is_parsed():  # Grain's worker processes read absl flags, which need it
        absl.flags.FLAGS.mark_as_parsed()
    processes = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
    return iter(stream.mp_prefetch(processes))


def _to_batch(arrays: dict[str, Any], copy: bool = False) -> Batch:
    if copy:  # out of shared memory, which a worker process wants back
        arrays = {name: np.array(value) for name, value in arrays.items()}
    own = {f"{name}_BT": arrays[name] for name in COLUMNS if name in arrays}
    return Batch(**own, extra={name: value for name, value in arrays.items() if name not in COLUMNS})


class TrainIterator(Iterator[Batch]):
    """Endless training batches of `rows`; made by `train_iterator`."""

    def __init__(
        self,
        rows: Rows,
        batch_size: int,
        part: Sequence[int] | None,
        workers: int,
        names: Sequence[str] = (),
    ) -> None:
        self.rows, self._batch, self._part = rows, batch_size, part
        self._names = names
        self._workers = workers
        self._at = 0
        self._stream: Any = None
        self._closing: weakref.finalize | None = None
        self._check = MaskCheck(rows.masked)

    def __iter__(self) -> TrainIterator:
        return self

    def __next__(self) -> Batch:
        if self._stream is None:  # late, so that a state set at once costs no reading ahead
            share = _Share(self.rows, self._batch, self._part, self._at)
            self._stream = _batches(share, self._workers)
            # Worker processes and their shared memory are to be let go before the interpreter is.
            self._closing = weakref.finalize(self, self._stream.close)
        batch = _to_batch(next(self._stream), copy=self._workers > 0)
        self._at += self._batch
        self._check(batch)
        return batch

    @property
    def epoch_rows(self) -> int:
        """Rows of the (first) epoch; of a mixture, until every source has given its own once."""
        return self.rows.epoch_rows

    def progress(self, step: int) -> dict[str, float]:
        """What was read up to a step: `epoch`, and of a mixture's sources `tokens/NAME` and `epoch/NAME`.

        Tokens are those of whole rows, padding included. All follows from the number of the step, so it is
        the same in every process and after every resume.
        """
        count, rows = step * self._batch, self.rows
        found = {"epoch": count / rows.epoch_rows}
        if isinstance(rows, MixedRows):
            for name, source, given in zip(self._names, rows.sources, rows.given(count), strict=True):
                found |= {f"tokens/{name}": given * rows.length, f"epoch/{name}": given / source.epoch_rows}
        return found

    @property
    def extra(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and types of the extra columns of one row."""
        row = {name: column for name, column in self.rows[0].items() if name not in COLUMNS}
        return {name: jax.ShapeDtypeStruct(np.shape(c), np.asarray(c).dtype) for name, c in row.items()}

    def get_state(self) -> dict[str, Any]:
        """Where the stream stands, as JSON: the same in every process."""
        return {"row": self._at, "data": self.rows.fingerprint}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to a state of `get_state`; `UserError` when it belongs to other data."""
        require(
            state["data"] == self.rows.fingerprint,
            f"the checkpoint stopped in the data {state['data']}, but the config reads "
            f"{self.rows.fingerprint}; restore data, data.length, train.seed and, of contiguous text, "
            "train.batch_size, or start anew.",
        )
        self.close()
        self._at = int(state["row"])

    def close(self) -> None:
        """Stop reading ahead; the next batch starts it again."""
        if self._closing is not None:
            self._closing()
        self._stream = self._closing = None


class ValidationBatches:
    """The validation batches, in order, as often as they are iterated; see `validation_batches`."""

    def __init__(self, rows: Rows, batch_size: int, part: Sequence[int] | None = None) -> None:
        self.rows, self._share = rows, _Share(rows, batch_size, part)

    def __len__(self) -> int:
        return len(self._share)

    def __iter__(self) -> Iterator[Batch]:
        stream = _batches(self._share, workers=0)
        try:
            yield from map(_to_batch, stream)
        finally:
            stream.close()


class MaskCheck:
    """Looks at the loss mask of the first batches and stops a run that could learn nothing right.

    Args:
      masked: whether some of every row's targets are only to be read.

    Raises:
      UserError: no target has weight (nothing would be learned), or of masked rows every target
        has (of dialogues the questions would be learned too).
    """

    def __init__(self, masked: bool) -> None:
        self._masked, self._seen, self._targets, self._weight = masked, 0, 0, 0.0

    def __call__(self, batch: Batch) -> None:
        if self._seen >= _CHECKED:
            return
        self._seen += 1
        self._targets += int(np.count_nonzero(batch.segments_BT))
        self._weight += float(np.sum(batch.weights_BT))
        if self._seen < _CHECKED:
            return
        require(
            self._weight > 0,
            f"loss mask is all zero: none of the {self._targets} targets of the first {_CHECKED} "
            "batches is trained; look at them with `jaxgpt data show CONFIG`.",
        )
        require(
            not self._masked or self._weight < self._targets,
            f"loss mask is all one: every one of the {self._targets} targets of the first "
            f"{_CHECKED} batches is trained, the users' words too; look at them with "
            "`jaxgpt data show CONFIG`.",
        )
