"""Batches for training and validation, from prepared text or from dialogues, read by Grain.

The stream is one sequence of rows, the same for any number of processes: step s of n processes
with B rows each holds the rows [s n B, (s + 1) n B), and process i the i-th B of them. So the
state is the number of the next row, it fits any number of processes, and resuming is exact.
"""

from __future__ import annotations

import hashlib
import logging
import weakref
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import absl.flags
import grain
import numpy as np

from jaxgpt.batch import Batch
from jaxgpt.config import Chat, Classifier, Labelled, Run, Tagged, Text, UserError, load, require
from jaxgpt.config.data import Data
from jaxgpt.data.corpus import Corpus, read_manifest
from jaxgpt.data.packing import ConcatRows, Item, PackedExamples, Row, Rows, StreamRows
from jaxgpt.data.readers import labelled, tagging
from jaxgpt.data.readers.chat import SUFFIXES, read_dialogues
from jaxgpt.data.readers.labelled import encode_labelled, read_labelled
from jaxgpt.data.readers.tagging import align, read_conll
from jaxgpt.data.sources import expand
from jaxgpt.text.chat import Dialogue, Example, render, truncate
from jaxgpt.text.load import load_tokenizer
from jaxgpt.text.tokenizer import ByteTokenizer, Tokenizer

log = logging.getLogger(__name__)

_AHEAD = 4  # batches ready at a time: hides a slow one, costs little memory
_CHECKED = 4  # first batches whose loss mask is looked at


def run_tokenizer(run: Run) -> Tokenizer:
    """The tokenizer a run reads its data with.

    Raises:
      UserError: when there is none where the config says.
    """
    if isinstance(run.data, Text):
        read_manifest(run.data.path)  # says what is missing where nothing was prepared
        return load_tokenizer(Path(run.data.path) / "tokenizer")
    if run.data.tokenizer:
        return ByteTokenizer() if run.data.tokenizer == "byte" else load_tokenizer(run.data.tokenizer)
    require(
        bool(run.init_from),
        "data.tokenizer and init_from are empty; name a tokenizer folder or a run to start from.",
    )
    require(
        Path(run.init_from).is_dir(),
        f"init_from {run.init_from!r} does not exist; name the folder of a trained run.",
    )
    return load_tokenizer(Path(run.init_from) / "tokenizer")


def train_iterator(
    data: Data,
    tokenizer: Tokenizer,
    *,
    model_length: int,
    batch_size: int,
    seed: int,
    task: Classifier | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> TrainIterator:
    """Endless batches of this process (numpy arrays, [batch_size, T]), shuffled anew every epoch.

    Args:
      data: what to read.
      tokenizer: the one the data were or are to be tokenized with.
      model_length: T where `data.length` is None.
      batch_size: rows of this process.
      seed: of the order of documents or examples and of the cuts.
      task: what labels mean, on Tagged and Labelled data.

    Raises:
      UserError: no data, data of another tokenizer, less data than one batch of all processes.
    """
    total = batch_size * process_count
    rows = packed_rows(data, tokenizer, model_length, seed, total, task)
    have = rows.epoch_rows
    require(
        have >= total,
        f"the training data fill {have} rows of {rows.length} tokens, fewer than one batch of "
        f"{total}; add data, or lower train.batch_size or data.length.",
    )
    return TrainIterator(rows, batch_size, process_index, process_count, data.workers, isinstance(data, Chat))


def validation_batches(
    data: Data,
    tokenizer: Tokenizer,
    *,
    model_length: int,
    batch_size: int,
    task: Classifier | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> ValidationBatches:
    """The validation data once, in order, as often as it is iterated; as for `train_iterator`.

    Every token is predicted exactly once. The last batch is filled with rows of padding (weights
    and segments 0), so that every process has the same number of batches.
    """
    rows = packed_rows(data, tokenizer, model_length, None, batch_size * process_count, task)
    return ValidationBatches(rows, batch_size, process_index, process_count)


def packed_rows(
    data: Data,
    tokenizer: Tokenizer,
    model_length: int,
    seed: int | None,
    batch_size: int,
    task: Classifier | None = None,
) -> ConcatRows | PackedExamples:
    """Packed rows by number, without batches: training's, or without a seed validation's, in order.

    Args:
      data, tokenizer, model_length, seed: as for `train_iterator`.
      batch_size: rows of the global batch, the streams of contiguous text.
      task: as for `train_iterator`.
    """
    length, pad = data.length or model_length, tokenizer.control["<|pad|>"]
    split = "validation" if seed is None else "train"
    if isinstance(data, Text):
        corpus = _corpus(data, split, tokenizer)
        if data.contiguous:
            return StreamRows(corpus, length, batch_size, seed, pad)
        return ConcatRows(corpus, length, seed, pad)
    if isinstance(data, Chat):
        items = [Item.of(example) for example in _chat_examples(data, tokenizer, length, split)]
    else:
        items = labelled_items(data, tokenizer, length, split, task)
    return PackedExamples(items, length, data.bins, seed, pad)


def _corpus(data: Text, split: str, tokenizer: Tokenizer) -> Corpus:
    corpus = Corpus(data.path, split)
    held = corpus.manifest["tokenizer"]["digest"]
    require(
        held == tokenizer.digest,
        f"{data.path} was prepared with another tokenizer (digest {held[:12]}, the run's is "
        f"{tokenizer.digest[:12]}); prepare it again with --tokenizer set to the run's.",
    )
    return corpus


# ------------------------------------------------------------------------------------- labels


def labelled_items(
    data: Tagged | Labelled, tokenizer: Tokenizer, length: int, split: str, task: Classifier | None
) -> list[Item]:
    """Encoded sentences or texts of a split (`train`, `validation`, `test`), in the order of its files.

    Raises:
      UserError: the split names no files; a label that the model does not know.
    """
    if task is None:
        raise UserError("labels need a model that knows them; set model to Classifier(...).")
    return [item for items in encode_split(data, tokenizer, length, split, task)[1] for item in items]


def encode_split(
    data: Tagged | Labelled, tokenizer: Tokenizer, length: int, split: str, task: Classifier
) -> tuple[list[Any], list[list[Item]]]:
    """The sentences or texts of a split, and the items that each was encoded to."""
    files: tuple[str, ...] = getattr(data, split)
    require(bool(files), f"data.{split} names no files; name some, such as --data.{split} FILE.")
    if isinstance(data, Tagged):
        sentences = read_conll(files)
        used = {tag for sentence in sentences for tag in sentence.tags}
        _check_labels(split, used, tagging.label_set(sentences), task)
        return sentences, [align(s, tokenizer, task.labels, length, data.joiner) for s in sentences]
    assert task.pool != "token", "Run pairs Tagged data with it"
    texts = read_labelled(files, data.text, data.pair, data.label)
    _check_labels(split, {text.label for text in texts}, labelled.label_set(texts), task)
    return texts, [[encode_labelled(t, tokenizer, task.labels, length, task.pool)] for t in texts]


def _check_labels(split: str, used: set[str], whole: tuple[str, ...], task: Classifier) -> None:
    """Refuse data with labels that the model does not have, naming all of them."""
    missing = sorted(used.difference(task.labels))
    require(
        not missing,
        f"data.{split} has labels that are not in model.labels {task.labels}: {', '.join(missing)}"
        f"{' (tags are read as BIO)' if task.pool == 'token' else ''}; set model.labels to {whole}, "
        "or mend the files.",
    )


# ---------------------------------------------------------------------------------- dialogues


def _chat_examples(data: Chat, tokenizer: Tokenizer, length: int, split: str) -> list[Example]:
    """The examples of a split; remembered while the files stay as they are."""
    apart = bool(data.validation)  # validation has files of its own: the others need no reading
    files = expand(data.validation if apart and split == "validation" else data.train, SUFFIXES)
    stats = [(f, Path(f).stat()) for f in files]
    stamp = tuple((f, s.st_size, s.st_mtime_ns) for f, s in stats)
    return _read_examples(stamp, split if apart else "", data.validation_fraction, tokenizer, length)[split]


@lru_cache(maxsize=2)  # the files of training, and those of validation where they are others
def _read_examples(
    stamp: tuple[tuple[str, int, int], ...], only: str, share: float, tokenizer: Tokenizer, length: int
) -> dict[str, list[Example]]:
    """Examples by split: all for the split `only`, or where it is empty, a share held out of them."""
    dialogues, _ = read_dialogues(path for path, _, _ in stamp)
    if only:
        parts = {only: dialogues}
    else:
        parts = dict(zip(("train", "validation"), hold_out(dialogues, share), strict=True))
    return {name: _fit(part, tokenizer, length, name) for name, part in parts.items()}


def hold_out(dialogues: list[Dialogue], share: float) -> tuple[list[Dialogue], list[Dialogue]]:
    """(kept, held out): the held-out dialogues are chosen by a hash, and copies stay together."""
    keys = [hashlib.sha256(repr(d).encode("utf-8")).digest() for d in dialogues]
    order = sorted(set(keys))
    require(
        len(order) >= 2,
        "the instruction files hold a single distinct dialogue, so none can be held out; add more "
        "or set data.validation.",
    )
    count = min(max(1, round(share * len(order))), len(order) - 1)
    chosen = set(order[:count])
    kept = [d for d, key in zip(dialogues, keys, strict=True) if key not in chosen]
    return kept, [d for d, key in zip(dialogues, keys, strict=True) if key in chosen]


def _fit(dialogues: list[Dialogue], tokenizer: Tokenizer, length: int, name: str) -> list[Example]:
    """Rendered and cut to the row; those left without a trained token are counted and dropped."""
    examples, cut = list[Example](), 0
    for dialogue in dialogues:
        rendered = render(dialogue, tokenizer)
        if (example := truncate(rendered, length)) is not None:
            examples.append(example)
            cut += sum(example.weights) < sum(rendered.weights)
    dropped = len(dialogues) - len(examples)
    if dropped:
        log.warning(
            "%d of %d dialogues (%s) have no answer within %d tokens and were dropped",
            dropped, len(dialogues), name, length,
        )  # fmt: skip
    if cut:
        log.warning(
            "%d of %d dialogues (%s) lose the end of an answer beyond %d tokens; lengthen data.length",
            cut, len(dialogues), name, length,
        )  # fmt: skip
    require(
        bool(examples),
        f"none of the {len(dialogues)} dialogues ({name}) has an answer within {length} tokens; "
        "lengthen data.length.",
    )
    return examples


# ------------------------------------------------------------------------------------ iterators


class _Share:
    """The batches of one process by number, from row `first` on (a Grain source).

    Whole batches, since what Grain does for an element takes several times what a short row does.
    """

    def __init__(self, rows: Rows, batch: int, index: int, count: int, first: int = 0) -> None:
        require(
            0 <= index < count and batch >= 1,
            f"process {index} of {count} with {batch} rows cannot be; check train.batch_size.",
        )
        self.rows, self.batch, self.index, self.count, self.first = rows, batch, index, count, first

    def __len__(self) -> int:
        return -(-(len(self.rows) - self.first) // (self.batch * self.count))

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        start = self.first + (int(step) * self.count + self.index) * self.batch
        rows = [self._row(number) for number in range(start, start + self.batch)]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def _row(self, number: int) -> Row:
        if number < len(self.rows):
            return self.rows[number]
        length = self.rows.length
        row: Row = {name: np.zeros_like(column) for name, column in self.rows[0].items()}
        return row | {"tokens": np.full(length, self.rows.pad, np.int32)}

    def __repr__(self) -> str:
        return f"_Share({self.rows.fingerprint}, {self.index}/{self.count}, {self.first})"


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
    return Batch(
        tokens_BT=arrays["tokens"],
        targets_BT=arrays["targets"],
        weights_BT=arrays["weights"],
        segments_BT=arrays["segments"],
        positions_BT=arrays["positions"],
        types_BT=arrays.get("types"),
    )


class TrainIterator(Iterator[Batch]):
    """Endless training batches; made by `train_iterator`."""

    def __init__(self, rows: Rows, batch_size: int, index: int, count: int, workers: int, chat: bool) -> None:
        self._rows, self._batch, self._index, self._count = rows, batch_size, index, count
        self._workers, self._chat = workers, chat
        self._at = 0
        self._stream: Any = None
        self._closing: weakref.finalize | None = None
        self._check = MaskCheck(chat)

    def __iter__(self) -> TrainIterator:
        return self

    def __next__(self) -> Batch:
        if self._stream is None:  # late, so that a state set at once costs no reading ahead
            share = _Share(self._rows, self._batch, self._index, self._count, self._at)
            self._stream = _batches(share, self._workers)
            # Worker processes and their shared memory are to be let go before the interpreter is.
            self._closing = weakref.finalize(self, self._stream.close)
        batch = _to_batch(next(self._stream), copy=self._workers > 0)
        self._at += self._batch * self._count
        self._check(batch)
        return batch

    def get_state(self) -> dict[str, Any]:
        """Where the stream stands, as JSON: the same in every process."""
        return {"row": self._at, "data": self._rows.fingerprint}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to a state of `get_state`; `UserError` when it belongs to other data."""
        require(
            state["data"] == self._rows.fingerprint,
            f"the checkpoint stopped in the data {state['data']}, but the config reads "
            f"{self._rows.fingerprint}; restore data, data.length, train.seed and, of contiguous text, "
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

    def __init__(self, rows: Rows, batch_size: int, index: int = 0, count: int = 1) -> None:
        self._share = _Share(rows, batch_size, index, count)

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

    Raises:
      UserError: no target has weight (nothing would be learned), or in dialogues every target
        has (the questions would be learned too).
    """

    def __init__(self, chat: bool) -> None:
        self._chat, self._seen, self._targets, self._weight = chat, 0, 0, 0.0

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
            not self._chat or self._weight < self._targets,
            f"loss mask is all one: every one of the {self._targets} targets of the first "
            f"{_CHECKED} batches is trained, the users' words too; look at them with "
            "`jaxgpt data show CONFIG`.",
        )


def open_run(config: str | Path) -> tuple[Run, Tokenizer]:
    """A run's config and the tokenizer of its data."""
    run = load(config)
    return run, run_tokenizer(run)
