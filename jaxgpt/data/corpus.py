"""Reading what `jaxgpt data prepare` wrote: token ids of documents, by number, from any thread.

Shapes: D documents of one split.
"""

from __future__ import annotations

import hashlib
import json
import threading
from bisect import bisect_right
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import msgspec
import numpy as np

from jaxgpt.errors import library_errors, require
from jaxgpt.files import Count, check_json, read_json

AGAIN = "run `jaxgpt data prepare --overwrite`"
_READER = "readahead_buffer_size:0,max_parallelism:0"  # random reads: neither helps


class Shard(TypedDict):
    """One file of records."""

    file: Annotated[str, msgspec.Meta(pattern=r"^\d{5,}\.arrayrecord$")]
    records: Count
    documents: Count
    tokens: Count
    bytes: Count


class Part(TypedDict):
    """One split: the totals of its shards."""

    records: Count
    documents: Count
    tokens: Count
    bytes: Count
    shards: list[Shard]


class _Parts(TypedDict):
    train: Part
    validation: Part


class _Words(TypedDict):
    kind: str
    digest: str
    vocab_size: Count


class _Manifest(TypedDict):
    version: int
    tokenizer: _Words
    dtype: Literal["uint16", "uint32"]
    record_tokens: Annotated[int, msgspec.Meta(ge=1, le=2**31)]
    splits: _Parts


class Sendable:
    """Drops what a process that receives the object makes anew: locks, plans, open files."""

    _fresh: tuple[str, ...] = ()

    def _reset(self) -> None:
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in self._fresh}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()


class Corpus(Sendable):
    """One split of a folder that `jaxgpt data prepare` wrote: documents of token ids by number.

    Raises:
      UserError: a folder without a manifest, an unknown version, or shards that do not match it.
    """

    _fresh = ("_readers", "_lock")

    def __init__(self, folder: str | Path, split: str) -> None:
        self.folder, self.split = Path(folder), split
        self.manifest = read_manifest(self.folder)
        part = self.manifest["splits"][split]
        self.record_tokens: int = self.manifest["record_tokens"]
        self.dtype = np.dtype(self.manifest["dtype"])
        path = self.folder / split / "lengths.npy"
        self.lengths_D = read_lengths(path, part["documents"])
        records = sum(shard["records"] for shard in part["shards"])
        require(
            int(self.lengths_D.sum(dtype=np.int64)) == part["tokens"]
            and int((-(-self.lengths_D.astype(np.int64) // self.record_tokens)).sum()) == records,
            f"{path} does not match the manifest; {AGAIN}.",
        )
        records_D = -(-self.lengths_D.astype(np.int64) // self.record_tokens)
        self._first_D = np.cumsum(records_D) - records_D
        self._shards = [str(self.folder / split / s["file"]) for s in part["shards"]]
        self._records = [s["records"] for s in part["shards"]]
        self._starts = np.cumsum([0, *self._records]).tolist()
        # What the rows depend on, and not where or when the sources lay on a disk.
        kept = {k: v for k, v in self.manifest.items() if k != "sources"}
        digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode())
        digest.update(self.lengths_D.tobytes())
        self.digest = digest.hexdigest()
        self._reset()

    def _reset(self) -> None:
        self._readers: list[Any] = [None] * len(self._shards)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.lengths_D)

    def read(self, document: int, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of a document, in the dtype they are stored in."""
        size = self.record_tokens
        first, last = start // size, (stop - 1) // size
        record = int(self._first_D[document])
        parts = [self._record(record + i) for i in range(first, last + 1)]
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        held = min(int(self.lengths_D[document]), (last + 1) * size) - first * size
        require(
            len(data) == held * self.dtype.itemsize,
            f"{self.folder}/{self.split} is damaged (a record has {len(data)} bytes); {AGAIN}.",
        )
        joined = np.frombuffer(data, self.dtype)
        return joined[start - first * size : stop - first * size]

    def _record(self, number: int) -> bytes:
        shard = bisect_right(self._starts, number) - 1
        reader = self._readers[shard] or self._open(shard)
        with library_errors(f"{self._shards[shard]} is damaged", AGAIN):
            return reader.read([number - self._starts[shard]])[0]

    def _open(self, shard: int) -> Any:
        from array_record.python import array_record_module

        with self._lock:
            if self._readers[shard] is None:
                path = self._shards[shard]
                require(Path(path).is_file(), f"{path} is missing; {AGAIN}.")
                with library_errors(f"{path} is damaged", AGAIN):
                    reader = array_record_module.ArrayRecordReader(path, options=_READER)
                    whole = reader.ok() and reader.num_records() == self._records[shard]
                require(whole, f"{path} is damaged; {AGAIN}.")
                self._readers[shard] = reader
            return self._readers[shard]


def read_lengths(path: Path, documents: int) -> np.ndarray:
    """[D] uint32: tokens of each document, as `jaxgpt data prepare` wrote them.

    Raises:
      UserError: the file is missing or damaged, or has not so many documents.
    """
    require(path.is_file(), f"{path} is missing; {AGAIN}.")
    with library_errors(f"{path} is damaged", AGAIN):
        mapped = np.load(path, mmap_mode="r")  # allocates nothing of what its header promises
    require(
        mapped.dtype == np.uint32 and mapped.shape == (documents,),
        f"{path} is damaged ({mapped.dtype} of {mapped.shape}, not uint32 of {documents}); {AGAIN}.",
    )
    lengths_D = np.array(mapped)
    require(bool((lengths_D > 0).all()), f"{path} is damaged (a document has no token); {AGAIN}.")
    return lengths_D


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a prepared folder, checked; `UserError` naming the command that writes one."""
    path = Path(folder) / "manifest.json"
    require(
        path.is_file(),
        f"{folder} holds no prepared text (no manifest.json); make it with "
        f"`jaxgpt data prepare SOURCES --out {folder}`.",
    )
    manifest = read_json(path, dict[str, Any], AGAIN)
    version = manifest.get("version")
    require(
        not isinstance(version, int) or version == 1,
        f"{path} has version {version}; this jaxgpt reads 1: prepare it again.",
    )
    check_json(manifest, _Manifest, path, AGAIN)
    for name, part in manifest["splits"].items():
        totals = {
            key: sum(shard[key] for shard in part["shards"]) for key in Shard.__annotations__ if key != "file"
        }
        require(
            totals == {key: part[key] for key in totals},
            f"{path} is damaged (the shards of {name} are not its total); {AGAIN}.",
        )
    return manifest
