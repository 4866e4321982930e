"""Reading what `jaxgpt data prepare` wrote: token ids of documents, by number, from any thread.

Shapes: D documents of one split.
"""

from __future__ import annotations

import hashlib
import json
import threading
from bisect import bisect_right
from pathlib import Path
from typing import Any

import numpy as np

from jaxgpt.errors import UserError, require

_READER = "readahead_buffer_size:0,max_parallelism:0"  # random reads: neither helps


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
        require(path.is_file(), f"{path} is missing; run `jaxgpt data prepare --overwrite`.")
        self.lengths_D = np.load(path)
        require(
            int(self.lengths_D.sum(dtype=np.int64)) == part["tokens"],
            f"{path} does not match the manifest; run `jaxgpt data prepare --overwrite`.",
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
        joined = np.frombuffer(parts[0] if len(parts) == 1 else b"".join(parts), self.dtype)
        return joined[start - first * size : stop - first * size]

    def _record(self, number: int) -> bytes:
        shard = bisect_right(self._starts, number) - 1
        reader = self._readers[shard] or self._open(shard)
        return reader.read([number - self._starts[shard]])[0]

    def _open(self, shard: int) -> Any:
        from array_record.python import array_record_module

        with self._lock:
            if self._readers[shard] is None:
                path = self._shards[shard]
                require(Path(path).is_file(), f"{path} is missing; run `jaxgpt data prepare --overwrite`.")
                reader = array_record_module.ArrayRecordReader(path, options=_READER)
                require(
                    reader.ok() and reader.num_records() == self._records[shard],
                    f"{path} is damaged; run `jaxgpt data prepare --overwrite`.",
                )
                self._readers[shard] = reader
            return self._readers[shard]


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a prepared folder; `UserError` naming the command that writes one."""
    path = Path(folder) / "manifest.json"
    require(
        path.is_file(),
        f"{folder} holds no prepared text (no manifest.json); make it with "
        f"`jaxgpt data prepare SOURCES --out {folder}`.",
    )
    try:
        manifest = json.loads(path.read_text("utf-8"))
        version = manifest["version"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged; run `jaxgpt data prepare --overwrite`.") from None
    require(version == 1, f"{path} has version {version}; this jaxgpt reads 1: prepare it again.")
    return manifest
