"""Safetensors files: a folder of them read tensor by tensor, and written the same way."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import ml_dtypes
import numpy as np

from jaxgpt import files
from jaxgpt.errors import library_errors, require

log = logging.getLogger(__name__)

AGAIN = "download it again"
CONFIG, GENERATION = "config.json", "generation_config.json"
ONE, INDEX, SHARD = "model.safetensors", "model.safetensors.index.json", "model-*.safetensors"
DTYPES: Mapping[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""Types of weights, as safetensors names them; all of them are exact in float32."""
NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""The same by their names in config.json."""


def opened(path: Path) -> Any:
    """A safetensors file, mapped and not read; `UserError` where it is damaged."""
    import safetensors

    with library_errors(f"{path} cannot be read as safetensors", AGAIN):
        return safetensors.safe_open(path, framework="numpy")


class Header(NamedTuple):
    """What a file says of a tensor before it is read."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    open: Callable[[Path], Any] = opened
    """Gives what has its tensors by `get_tensor`, as a context."""

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


class Index(TypedDict):
    """What we read of model.safetensors.index.json."""

    weight_map: dict[str, str]


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object of one of the folder's files.

    Raises:
      UserError: there is no such file, or it is damaged.
    """
    require(os.path.lexists(path), f"{path} does not exist; give a folder with a Hugging Face model.")
    return files.read_json(path, dict[str, Any], AGAIN)


def headers(folder: Path) -> dict[str, Header]:
    """The tensors of a folder's safetensors files, in the order of the files.

    An index decides which file each is read from; what its files hold besides is named and left.

    Raises:
      UserError: no such file, one that is missing or damaged, not what the index says, or one file and
        an index beside it, so that a tensor may come from either.
    """
    where = _index(folder)
    if where is None:
        advice = f"; {SHARD} needs its index" if any(folder.glob(SHARD)) else ""
        if any(folder.glob("*.bin")):
            advice += "; pytorch_model.bin is not read: save it as safetensors"
        require((folder / ONE).is_file(), f"{folder} has no {ONE} and no {INDEX}{advice}.")
        if any(folder.glob(SHARD)):
            log.warning("%s: %s is read, and not %s, which no index names", folder, ONE, SHARD)
        return dict(_headers(folder / ONE))
    found, elsewhere = {}, []
    for file in sorted(set(where.values())):
        held = dict(_headers(folder / file))
        found |= {name: header for name, header in held.items() if where.get(name) == file}
        elsewhere += [f"{name} in {file}" for name in held if where.get(name) != file]
    lost = [name for name in where if name not in found]
    require(not lost, f"{folder / INDEX} names {shorten(lost)}, which its files do not hold; restore it.")
    if elsewhere:
        log.warning("not read, since %s takes them from no or another file: %s", INDEX, shorten(elsewhere))
    return found


def _index(folder: Path) -> dict[str, str] | None:
    """The file of every tensor by the folder's index; None where one file has them all."""
    path = folder / INDEX
    if not os.path.lexists(path):
        return None
    where = files.read_json(path, Index, AGAIN, once=True)["weight_map"]
    require(bool(where), f"{path} names no tensor; {AGAIN}.")
    names = sorted(set(where.values()))
    for name in names:
        require(_inside(folder, name), f"{path} names the file {name!r:.200}, which is outside of {folder}.")
    missing = [name for name in names if not (folder / name).is_file()]
    if ONE not in names and (folder / ONE).is_file():
        there = [name for name in names if name not in missing]
        require(
            not there,
            f"{folder} holds {ONE}, {INDEX} and its {shorten(there, 1)}, so each tensor may come from "
            "either; remove those that are not the model.",
        )
        log.warning(
            "%s is of other files, such as %s, which are not there: %s is read", path, missing[0], ONE
        )
        return None
    require(not missing, f"{folder} lacks {shorten(missing)}, which {INDEX} names; download them.")
    return where


def _inside(folder: Path, name: str) -> bool:
    """Whether a name is of a file in the folder, or of a link there, as Hugging Face's cache has them."""
    if not name.isprintable() or len(name) > 255 or Path(name).is_absolute() or ".." in Path(name).parts:
        return False
    return (folder / name).parent.resolve().is_relative_to(folder.resolve())


def file_headers(path: Path) -> dict[str, Header]:
    """The tensors of one safetensors file."""
    return dict(_headers(path))


def _headers(path: Path) -> Iterator[tuple[str, Header]]:
    with opened(path) as file:
        for name in file.offset_keys():
            part = file.get_slice(name)
            yield name, Header(path, tuple(part.get_shape()), part.get_dtype())


def each(found: Mapping[str, Header], names: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
    """These tensors one after another, each read once, no file opened twice in a row."""
    with ExitStack() as stack:
        path, file = None, None
        for name in names:
            if found[name].file != path:
                stack.close()
                path = found[name].file
                file = stack.enter_context(found[name].open(path))
            assert file is not None
            yield name, file.get_tensor(name)


def shorten(items: Iterable[str], most: int = 20) -> str:
    """Some of the items on one line, and how many more there are."""
    items = list(items)
    more = f" and {len(items) - most} more" if len(items) > most else ""
    shown = (item if item.isprintable() else ascii(item) for item in items[:most])
    return ", ".join(f"{item:.200}" for item in shown) + more


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
