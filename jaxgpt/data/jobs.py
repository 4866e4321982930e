"""The jobs of `jaxgpt data prepare`: each tokenizes its spans into shards of its own.

A job works in a folder named after its process and renames it when it is done, so that a finished
job is whole and an interrupted one leaves nothing that counts.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Generator, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

import numpy as np

from jaxgpt.alive import alive
from jaxgpt.config.filters import NO_FILTERS, Filters
from jaxgpt.data.documents import Span, read_span
from jaxgpt.data.duplicates import key_function
from jaxgpt.data.sources import Report
from jaxgpt.errors import UserError
from jaxgpt.files import Count, read_json, write_bytes, write_json
from jaxgpt.text.filters import Filter, Pipeline, Tally, make_filters, note_drop
from jaxgpt.text.load import load_tokenizer
from jaxgpt.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

RECORD_TOKENS = 4096
"""Maximum number of tokens per record: what a random read of one row has to fetch."""
_PIECE = 1 << 20  # characters tokenized at a time: bounds the lists of Python integers
_WRITER = "group_size:1,uncompressed"  # one record a chunk, for random reads; ids hardly compress
_WORTH_A_PROCESS = 4 << 20  # bytes of source: less takes no longer than starting another process
_STOP = -(1 << 60)
_SPLITS = ("train", "validation")


class Counts(TypedDict):
    """What a job wrote of one split."""

    records: Count
    documents: Count
    tokens: Count
    bytes: Count


class JobReport(TypedDict):
    """What a job found and wrote."""

    train: Counts
    validation: Counts
    report: Report
    filters: NotRequired[dict[str, Tally]]


Stage = Literal["job", "keys"]


@dataclass(frozen=True)
class Job:
    """What a job needs to know besides its spans."""

    out: str
    validation: float
    split: str
    field: str
    filters: Filters = NO_FILTERS
    canaries: tuple[str, ...] = ()
    """Documents of the last job, which has no spans."""
    stage: Stage = "job"
    """Whether it writes shards, or before that the keys that duplicates are told by."""


def name_of(index: int, stage: Stage = "job") -> str:
    """The folder of a finished job under `.work`."""
    return f"{stage}-{index:05d}"


def keys_of(work: Path, index: int) -> Path:
    """The file of the keys of a job's documents [D, ...]."""
    return work / name_of(index, "keys") / "keys.npy"


def repeated_of(work: Path, index: int) -> Path:
    """The file that says which of a job's documents stood there before [D]."""
    return work / name_of(index, "keys") / "repeated.npy"


def write_npy(path: Path, array: np.ndarray) -> None:
    """Write an array, whole or not at all."""
    import io

    buffer = io.BytesIO()
    np.save(buffer, array)
    write_bytes(path, buffer.getvalue())


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder for this process; the system lets go of it however the process ends."""
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"{folder.parent} is being prepared by another process; wait for it or stop it."
            ) from None
        yield


# ------------------------------------------------------------------------------------------ one job


class _Split:
    """The shard and the document lengths of one split of a job."""

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        self._path, self._dtype, self._writer = path, dtype, None
        self.lengths: list[int] = []
        self.bytes = self.records = 0

    def add(self, text: str, tokenizer: Tokenizer) -> None:
        """Write a document's tokens, between `<|bos|>` and `<|eos|>`, as records."""
        from array_record.python import array_record_module

        if self._writer is None:
            self._writer = array_record_module.ArrayRecordWriter(str(self._path), _WRITER)
        pending = np.array([tokenizer.control["<|bos|>"]], self._dtype)
        length, ends = 0, np.array([tokenizer.control["<|eos|>"]], self._dtype)
        for piece, last in _pieces(text):
            ids = np.array(tokenizer.encode(piece), self._dtype)
            pending = np.concatenate([pending, ids, ends] if last else [pending, ids])
            keep = 0 if last else len(pending) % RECORD_TOKENS
            for at in range(0, len(pending) - keep, RECORD_TOKENS):
                with _on_disk():
                    self._writer.write(pending[at : at + RECORD_TOKENS].tobytes())
                self.records += 1
            length += len(pending) - keep
            pending = pending[len(pending) - keep :]
        self.lengths.append(length)
        self.bytes += len(text.encode())

    def close(self) -> dict[str, int]:
        """Finish the shard; counts of its records, documents, tokens and bytes of text.

        Raises:
          OSError: not all records arrived on the disk.
        """
        if self._writer is not None:
            from array_record.python import array_record_module

            with _on_disk():
                self._writer.close()
            # The writer is silent about a full disk, so its work is counted again.
            reader = array_record_module.ArrayRecordReader(str(self._path))
            if reader.num_records() != self.records:
                raise OSError(f"{self._path} is incomplete: is the disk full?")
            reader.close()
        np.save(self._path.with_suffix(".npy"), np.array(self.lengths, np.uint32))
        counts = {"records": self.records, "documents": len(self.lengths)}
        return {**counts, "tokens": sum(self.lengths), "bytes": self.bytes}


@contextlib.contextmanager
def _on_disk() -> Iterator[None]:
    """Makes an OSError of what ArrayRecord raises where it cannot write."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(str(error).partition(";")[0].removeprefix("write() failed: ")) from None


def _pieces(text: str) -> Iterator[tuple[str, bool]]:
    """(piece, whether it is the last): cut after a line end where there is one.

    Newlines are tokens of their own to our tokenizers, so such a cut does not change the ids; a Hugging
    Face one may join several, or begin each piece with its space, once in so many characters.
    """
    at = 0
    while len(text) - at > _PIECE:
        line = text.rfind("\n", at, at + _PIECE)
        end = line + 1 if line >= at else at + _PIECE
        yield text[at:end], False
        at = end
    yield text[at:], True


def held_out(text: str, share: float) -> bool:
    """Whether a document belongs to validation: a function of its text alone."""
    head = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(head, "big") < share * 2**64


def run_job(job: Job, index: int, spans: list[Span], tokenizer: Tokenizer, progress: Any) -> None:
    """Tokenize the spans into the folder of job `index`, which then counts as finished."""
    work = Path(job.out) / ".work"
    part = work / f"{name_of(index, job.stage)}.{os.getpid()}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    dtype = np.dtype(np.uint32 if tokenizer.vocab_size > 1 << 16 else np.uint16)
    splits = {name: _Split(part / f"{name}.arrayrecord", dtype) for name in _SPLITS}
    report, pipeline = Report(), Pipeline(_filters(job.filters))
    key, keys, number = key_function(job.filters) if job.stage == "keys" else None, [], -1
    repeated = None
    if job.stage == "job" and job.filters.duplicates != "keep":
        repeated, tally = np.load(repeated_of(work, index)), Pipeline([Filter("duplicates", str)]).tallies
        pipeline.tallies |= tally
    for span in spans:
        for text in read_span(span, job.field, report):
            if progress is not None and progress.get_obj().value < 0:
                raise InterruptedError("another job failed or the command was interrupted")
            if (text := pipeline.clean(text)) is None:
                continue
            number += 1
            if key is not None:
                keys.append(key(text))
                continue
            if repeated is not None:
                pipeline.tallies["duplicates"]["seen"] += 1
                if repeated[number]:
                    note_drop(pipeline.tallies["duplicates"], text)
                    continue
            if job.split == "document":
                splits["validation" if held_out(text, job.validation) else "train"].add(text, tokenizer)
            else:
                end = int(len(text) * (1 - job.validation))
                for name, half in (("train", text[:end]), ("validation", text[end:])):
                    if half:
                        splits[name].add(half, tokenizer)
        if progress is not None:
            with progress.get_lock():
                progress.value += span.size
    if not spans:
        for text in job.canaries:
            splits["train"].add(text, tokenizer)
    counts = {name: split.close() for name, split in splits.items()}
    if key is not None:
        write_npy(part / "keys.npy", np.stack(keys) if keys else np.zeros((0, 1), np.uint64))
    write_json(part / "report.json", {**counts, "report": asdict(report), "filters": pipeline.tallies})
    os.replace(part, work / name_of(index, job.stage))


@lru_cache(maxsize=1)  # once per process
def _filters(config: Filters) -> tuple[Filter, ...]:
    return tuple(make_filters(config))


# ----------------------------------------------------------------------------------------- all jobs

_process: dict[str, Any] = {}


def _start(tokenizer: str, progress: Any) -> None:
    """Runs once in each worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, which ends its workers
    parent = multiprocessing.parent_process()
    assert parent is not None

    def leave() -> None:  # a worker whose parent was killed would otherwise wait for ever
        parent.join()
        os._exit(1)

    threading.Thread(target=leave, daemon=True).start()
    _process.update(tokenizer=load_tokenizer(tokenizer), progress=progress)


def _work(job: Job, index: int, spans: list[Span]) -> int:
    run_job(job, index, spans, _process["tokenizer"], _process["progress"])
    return index


def run_all(job: Job, plan: list[list[Span]], workers: int, max_bad: float) -> list[JobReport]:
    """Run the jobs that are not finished; the reports of all, in order.

    Raises:
      UserError: from a job, or when a job is mostly bad lines (it is not worth going on then).
    """
    work = Path(job.out) / ".work"
    _filters.cache_clear()  # its files may be others than those of an earlier call
    for left in work.glob(f"{job.stage}-*.part"):
        shutil.rmtree(left, ignore_errors=True)
    todo = [i for i in range(len(plan)) if not _whole(work, i, job.stage)]
    if len(todo) < len(plan):
        log.info("%d of %d jobs were finished before", len(plan) - len(todo), len(plan))
    total = sum(s.size for spans in plan for s in spans)
    done = total - sum(s.size for i in todo for s in plan[i])
    what = "looking for duplicates" if job.stage == "keys" else "tokenizing"
    with _bar(total, done, what) as show, alive(what):
        useful = 1 + (total - done) // _WORTH_A_PROCESS
        finish = _finish(job, plan, todo, min(workers, len(todo), useful), show)
        with contextlib.closing(finish) as ended:  # so that an error here stops the pool
            for index in ended:
                _check_early(_report(work, index, job.stage), max_bad)
    return [_report(work, i, job.stage) for i in range(len(plan))]


def _finish(
    job: Job, plan: list[list[Span]], todo: list[int], workers: int, show: Any
) -> Generator[int, None, None]:
    """Run the jobs, yielding each as it ends: here when one worker is enough, else in a pool."""
    folder = str(Path(job.out) / "tokenizer")
    context = multiprocessing.get_context("spawn")  # fork would copy threads' locks
    progress = context.Value("q", 0)
    if workers <= 1:
        tokenizer = load_tokenizer(folder)
        for index in todo:
            run_job(job, index, plan[index], tokenizer, progress)
            show(progress.value)
            yield index
        return
    with ProcessPoolExecutor(workers, context, _start, (folder, progress)) as pool:
        waiting: set[Future[int]] = {pool.submit(_work, job, i, plan[i]) for i in todo}
        try:
            while waiting:
                ended, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
                show(progress.value)
                for future in ended:
                    yield future.result()
        except BrokenProcessPool:
            raise UserError(
                "a worker process was killed, perhaps for lack of memory; run the same command "
                "again with fewer --workers: finished work is kept."
            ) from None
        except BaseException:
            progress.value = _STOP  # jobs under way look at it before each document
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _report(work: Path, index: int, stage: Stage = "job") -> JobReport:
    return read_json(work / name_of(index, stage) / "report.json", JobReport, "run the same command again")


def _whole(work: Path, index: int, stage: Stage) -> bool:
    """Whether a job is finished; what is left of a damaged one is removed."""
    try:
        if (work / name_of(index, stage)).is_dir():
            _report(work, index, stage)
            return True
    except UserError as error:
        log.warning("%s", error)
        shutil.rmtree(work / name_of(index, stage), ignore_errors=True)
    return False


def _check_early(report: JobReport, max_bad: float) -> None:
    counts = report["report"]
    if counts.lines >= 100 and counts.bad > max(max_bad, 0.5) * counts.lines:
        counts.check(max_bad)


@contextlib.contextmanager
def _bar(total: int, done: int, what: str) -> Iterator[Any]:
    """A progress bar on standard error; gives a function of the bytes done since it began."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(what, *columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total, completed=done)
        yield lambda now: bar.update(task, completed=done + now)
