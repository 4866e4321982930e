"""Files written whole or not at all, and JSON read with suspicion.

Nobody indexes into raw JSON: `parse_json` and `read_json` check a small schema (a msgspec type, most
often a `TypedDict` or `Struct`) and answer whatever a file may hold with one sentence.
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import msgspec

from jaxgpt.errors import UserError, require

T = TypeVar("T")

Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
"""A number of things, in a schema: never negative, never absurd."""
MOST_BYTES = 2**30
"""Of a file that is read whole: the largest tokenizers have some 2**25."""
MOST_LEVELS = 100
"""Of lists and objects within each other, in JSON that we read."""
TOO_DEEP = "its values are nested too deeply"


def parse_json(data: bytes | str, kind: type[T], where: str | Path, fix: str, *, once: bool = False) -> T:
    """The value of JSON text, checked against a schema.

    Args:
      data: UTF-8 or text.
      kind: what msgspec can convert to; `Any` takes all that is JSON.
      where: names the file in the error.
      fix: what to do about it, for the end of the sentence.
      once: refuse an object that has a name twice; JSON's readers take the last.

    Raises:
      UserError: not UTF-8, not JSON (which has no NaN and no infinity), nested too deeply, or not of
        that schema.
    """
    try:
        value = json.loads(data, parse_constant=_refuse, object_pairs_hook=_unique if once else None)
    except RecursionError:
        why = TOO_DEEP
    except UnicodeDecodeError as error:
        why = f"not UTF-8 at byte {error.start}"
    except ValueError as error:  # JSONDecodeError is one; an integer of thousands of digits another
        why = f"not JSON: {error}"
    else:
        if not _too_deep(value):
            return check_json(value, kind, where, fix)
        why = TOO_DEEP
    raise UserError(f"{where} is damaged ({why}); {fix}.")


def check_json(value: Any, kind: type[T], where: str | Path, fix: str) -> T:
    """What `parse_json` gave, checked against another schema.

    Raises:
      UserError: it is not of that schema.
    """
    try:
        return msgspec.convert(value, kind)
    except (msgspec.ValidationError, OverflowError, UnicodeEncodeError) as error:  # last: a lone surrogate
        why = f"{error}{_found(value, str(error))}"
    raise UserError(f"{where} is damaged ({why}); {fix}.")


def _found(value: Any, why: str) -> str:
    """What stands at the place that msgspec names in its error, as words behind that."""
    place = re.search(r" - at `\$([^`]*)`$", why)
    for name, index in re.findall(r"\.(\w+)|\[(\d+|\.\.\.)\]", place[1]) if place else ():
        if index == "...":  # an entry of a dict: it does not say which
            return ""
        value = value[int(index) if index else name]
    return f", which is {value!r:.60}" if place and not isinstance(value, dict | list) else ""


def _too_deep(value: Any) -> bool:
    """Whether it is nested too deeply for functions that call themselves, as a schema's `Any` may be."""
    level = [value]
    for _ in range(MOST_LEVELS):
        inner = (v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list))
        level = [child for part in inner for child in part if isinstance(child, dict | list)]
        if not level:
            return False
    return True


def read_json(path: Path, kind: type[T], fix: str, *, once: bool = False) -> T:
    """The value of a JSON file, see `parse_json`.

    Raises:
      UserError: as `parse_json`, or the file cannot be read.
    """
    try:
        data = read_small(path, fix)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); {fix}.") from None
    return parse_json(data, kind, path, fix, once=once)


def read_text(path: Path, fix: str) -> str:
    """The text of a small file in UTF-8.

    Raises:
      UserError: it cannot be read, or is no such text.
    """
    try:
        return read_small(path, fix).decode()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); {fix}.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text in UTF-8 (byte {error.start}); {fix}.") from None


def read_small(path: Path, fix: str) -> bytes:
    """The bytes of a file that is read whole, at most `MOST_BYTES`.

    Raises:
      UserError: a pipe, which would block, or whatever else is no file; or one of an absurd size.
      OSError: it cannot be read.
    """
    require(path.is_file() or not os.path.lexists(path), f"{path} is not a file; {fix}.")
    size = path.stat().st_size
    require(
        size <= MOST_BYTES, f"{path} has {size:,} bytes, more than the {MOST_BYTES:,} that it may; {fix}."
    )
    return path.read_bytes()


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON value")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in value if names.count(name) > 1)!r:.200} stands in it twice")
    return value


def finite(value: Any) -> Any:
    """The value with None for each float that is not finite, since JSON has no NaN."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(v) for key, v in value.items()}
    return [finite(v) for v in value] if isinstance(value, list | tuple) else value


def require_writable(folder: Path) -> None:
    """Make sure that files can be made in a folder, or it itself, before what goes there is computed.

    Raises:
      UserError: they cannot.
    """
    there = folder.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise UserError(
            f"{there} cannot be written ({error.strerror}); check its path and rights, or name another."
        ) from None


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file and its folder; on any error the file is as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, whole or not at all."""
    write_bytes(path, text.encode())


def to_json(value: Any, indent: int | None = None) -> str:
    """The value as JSON; a float that is not finite is null (`finite`), never NaN."""
    return json.dumps(finite(value), indent=indent, ensure_ascii=False, allow_nan=False)


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, whole or not at all."""
    write_text(path, to_json(value, 2) + "\n")


def write_jsonl(path: Path, records: Iterable[Any]) -> None:
    """Write one JSON object per line, whole or not at all."""
    write_text(path, "".join(to_json(record) + "\n" for record in records))
