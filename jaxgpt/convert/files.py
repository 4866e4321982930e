"""Safetensors files: a folder of them read tensor by tensor, and written the same way."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxgpt.errors import UserError, require

CONFIG, GENERATION = "config.json", "generation_config.json"
ONE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES: Mapping[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""Types of weights, as safetensors names them; all of them are exact in float32."""
NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""The same by their names in config.json."""


class Header(NamedTuple):
    """What a file says of a tensor before it is read."""

    file: Path
    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; `UserError` where there is none."""
    require(path.is_file(), f"{path} does not exist; give a folder with a Hugging Face model.")
    try:
        value = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); download it again.") from None
    require(isinstance(value, dict), f"{path} holds {type(value).__name__}, not an object; restore it.")
    return value


def headers(folder: Path) -> dict[str, Header]:
    """The tensors of a folder's safetensors files, in the order of the files.

    Raises:
      UserError: no such file, one that is missing or damaged, or not what the index says.
    """
    if (folder / INDEX).is_file():
        where = read_json(folder / INDEX).get("weight_map")
        require(isinstance(where, dict), f"{folder / INDEX} has no weight_map; download it again.")
        assert isinstance(where, dict)
    else:
        pickled = any(folder.glob("*.bin")) and "; pytorch_model.bin is not read: save it as safetensors"
        require((folder / ONE).is_file(), f"{folder} has no {ONE} and no {INDEX}{pickled or ''}.")
        where = {}
    files = sorted({folder / name for name in where.values()}) or [folder / ONE]
    missing = [path.name for path in files if not path.is_file()]
    require(not missing, f"{folder} lacks {', '.join(missing)}, which {INDEX} names; download them.")
    found = {name: header for path in files for name, header in _headers(path)}
    lost = [name for name in where if name not in found]
    require(not lost, f"{folder / INDEX} names {shorten(lost)}, which its files do not hold; restore it.")
    return found


def _headers(path: Path) -> Iterator[tuple[str, Header]]:
    with opened(path) as file:
        for name in file.offset_keys():
            part = file.get_slice(name)
            yield name, Header(path, tuple(part.get_shape()), part.get_dtype())


def opened(path: Path) -> Any:
    """A safetensors file, mapped and not read; `UserError` where it is damaged."""
    import safetensors

    try:
        return safetensors.safe_open(path, framework="numpy")
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read as safetensors ({error}); download it again.") from None


def each(found: Mapping[str, Header], names: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
    """These tensors one after another, each read once, no file opened twice in a row."""
    with ExitStack() as stack:
        path, file = None, None
        for name in names:
            if found[name].file != path:
                stack.close()
                path = found[name].file
                file = stack.enter_context(opened(path))
            assert file is not None
            yield name, file.get_tensor(name)


def shorten(items: Iterable[str], most: int = 20) -> str:
    """Some of the items, and how many more there are."""
    items = list(items)
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more


# ------------------------------------------------------------------------------------------ writing


class Entry(NamedTuple):
    """A tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]
    """Its contents, called once when their turn comes."""

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def write_model(
    folder: Path, entries: Iterable[Entry], most: int, step: Callable[[int], None] = lambda size: None
) -> None:
    """Write tensors into one file, or into several of at most `most` bytes (or one tensor) and an index.

    One tensor is held at a time; `step` is called with the bytes of each once it is written.
    """
    shards: list[list[Entry]] = [[]]
    for entry in entries:
        if shards[-1] and sum(e.size for e in shards[-1]) + entry.size > most:
            shards.append([])
        shards[-1].append(entry)
    if len(shards) == 1:
        _write(folder / ONE, shards[0], step)
        return
    where = {}
    for i, shard in enumerate(shards, 1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        _write(folder / name, shard, step)
        where |= {entry.name: name for entry in shard}
    total = sum(entry.size for shard in shards for entry in shard)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _write(path: Path, entries: list[Entry], step: Callable[[int], None]) -> None:
    """One file: the length of the header, the header as JSON, the tensors (the format's own README)."""
    # Larger types first, so that every tensor is aligned to its own.
    entries = sorted(entries, key=lambda e: (-DTYPES[e.dtype].itemsize, e.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for entry in entries:
        offsets = [at, at := at + entry.size]
        header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            array = np.ascontiguousarray(entry.make(), DTYPES[entry.dtype])
            assert array.shape == entry.shape, entry.name
            stream.write(array.view(np.uint8).data if array.size else b"")
            step(entry.size)
