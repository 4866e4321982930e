"""Strict JSON: dataclass trees checked field by field, both ways."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast

from jaxgpt.config import code
from jaxgpt.config.bounds import check_bounds
from jaxgpt.errors import UserError, nearest, require, shown
from jaxgpt.glossary import look_up

T = TypeVar("T")
STORED = "stored"
"""In a field's metadata: what a record means that was written before there was this field."""


def check_types(part: Any, where: str) -> None:
    """Raise `UserError` where a field of a config class holds what its type does not allow.

    Every `__post_init__` begins with it: comparing the number 0 with the text "3e-4" would otherwise
    stop with Python's words, which name no field.
    """
    for name, hint in _hints(type(part)).items():
        if getattr(part, name) is None and type(part).__dataclass_fields__[name].default is None:
            continue  # left out
        value = _parse(hint, getattr(part, name), f"{where}.{name}" if where else name)
        object.__setattr__(part, name, value)  # a list as a tuple, a whole number as a float


def to_json(value: Any) -> Any:
    """A dataclass tree as plain JSON values, each dataclass naming its class under `kind`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"kind": code.name_of(type(value)), **fields}
    if isinstance(value, tuple | list):
        return [to_json(v) for v in value]
    return value


def changed_fields(part: Any, prefix: str = "") -> dict[str, Any]:
    """Fields that are not as their class has them by default, by their full names, as JSON.

    A part of another kind than by default stands there by its kind, and its own such fields follow.
    """
    found: dict[str, Any] = {}
    for f in dataclasses.fields(part):
        value, name = getattr(part, f.name), f"{prefix}{f.name}"
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        if value == default:
            continue
        if not _is_part(value):
            found[name] = to_json(value)
            continue
        if type(value) is not type(default):
            found[name] = code.portable(to_json(value))["kind"]
        found |= changed_fields(value, f"{name}.")
    return found


def from_json(kind: type[T], value: Any, where: str = "", folder: Path | None = None) -> T:
    """The inverse of `to_json`; an unknown key, a missing one or a wrong type is a `UserError`.

    Args:
      kind: of the value.
      value: of JSON.
      where: name of the value in messages.
      folder: of the files that it names as `FILE.py:NAME`.
    """
    return _parse(kind, _with_code(value, where, folder), where)


def _with_code(value: Any, where: str, folder: Path | None) -> Any:
    """The value with parts whose class is in a user's file made of that class already."""
    if isinstance(value, list):
        return [_with_code(part, f"{where}[{i}]", folder) for i, part in enumerate(value)]
    if not isinstance(value, dict):
        return value
    parts = {k: _with_code(part, f"{where}.{k}" if where else k, folder) for k, part in value.items()}
    named = code.with_references(parts, lambda name: code.placed(name, folder))
    kind: Any = parts.get("kind")
    at = f"{where}.kind"
    own = code.class_of(kind, folder, at) if code.is_reference(kind) else code.shipped_class(kind, at)
    if own is None:
        return named
    del named["kind"]
    return _parse_dataclass(own, named, where)


def _parse(hint: Any, value: Any, where: str) -> Any:
    name = where or "config"
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        value = _parse(args[0], value, where)
        check_bounds(hint, value, name)
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        options = [a for a in args if a is not type(None)]
        if len(options) == 1:
            return _parse(options[0], value, where)
        named = {o.__name__: o for o in options if not getattr(o, "abstract", False)}
        if isinstance(value, tuple(o for o in options if isinstance(o, type))) and _is_part(value):
            return value
        if not (_is_part(value) or isinstance(value, dict)):
            raise UserError(f"{name} is {shown(value)}; it must be a {' or a '.join(named)}.")
        kind = type(value).__name__ if _is_part(value) else value.get("kind")
        _require_one_of(kind, named, f"{name}.kind")
        return _parse(named[kind], value, where)
    if dataclasses.is_dataclass(hint):
        if _is_part(value) and isinstance(value, cast(type, hint)):
            return value  # it was checked when it was made
        return _parse_dataclass(hint, value, where)
    if origin is Literal:
        _require_one_of(value, args, name)
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"{name} is {shown(value)}; it must be a list.")
        hints = args if args[-1] is not Ellipsis else args[:1] * len(value)
        if len(hints) != len(value):
            raise UserError(f"{name} is {shown(value)}; it must have {len(hints)} entries.")
        return tuple(_parse(h, v, f"{where}[{i}]") for i, (h, v) in enumerate(zip(hints, value, strict=True)))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 2**1000 else math.inf
    fits = isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool)
    if not fits:
        raise UserError(f"{name} is {shown(value)}; it must be a value of type {hint.__name__}.")
    # JSON has neither NaN nor infinity, and no setting means anything by them.
    if hint is float and not math.isfinite(value):
        raise UserError(f"{name} is {value}; it must be a finite number.")
    if hint is str and not _is_text(value):
        raise UserError(f"{name} is {shown(value)}; it must be text without NUL and half surrogate pairs.")
    return value


def _is_part(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _require_one_of(value: Any, allowed: Collection[Any], name: str) -> None:
    # Of the type too: True is not 1, and what cannot be hashed or compared is none of them.
    if not (isinstance(value, str | int) and value in allowed):
        near = nearest(value if isinstance(value, str) else shown(value), map(str, allowed))
        raise UserError(f"{name} is {shown(value)}{near}")


def _is_text(value: str) -> bool:
    """Whether files and their names can hold it."""
    return not any(c == "\0" or "\ud800" <= c <= "\udfff" for c in value)


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _parse_dataclass(kind: Any, value: Any, where: str) -> Any:
    name = where or "config"
    if _is_part(value):
        value = {"kind": type(value).__name__}
    if not isinstance(value, dict):
        raise UserError(f"{name} is {shown(value)}; it must be an object ({kind.__name__}).")
    hints = _hints(kind)
    names = {f.name for f in dataclasses.fields(kind)}
    given = dict(value)
    tag = given.pop("kind", kind.__name__)
    if tag != kind.__name__:
        raise UserError(f"{name}.kind is {shown(tag)}; it must be {kind.__name__!r}.")
    for key in given:
        if key not in names:
            raise UserError(f"{name} has no field {shown(key)}{look_up(key, names)}")
    prefix = f"{where}." if where else ""
    parsed = {key: _parse(hints[key], v, prefix + key) for key, v in given.items()}
    for f in dataclasses.fields(kind):
        if f.name not in parsed and STORED in f.metadata:
            parsed[f.name] = f.metadata[STORED]
        has_default = f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING
        require(
            f.name in parsed or has_default,
            f"{prefix}{f.name} is missing; {kind.__name__} needs it.",
        )
    return kind(**parsed)
