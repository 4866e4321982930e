"""Strict JSON: dataclass trees checked field by field, both ways."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from typing import Any, Literal, TypeVar

from jaxgpt.errors import require, require_known

T = TypeVar("T")


def check_types(part: Any, where: str) -> None:
    """Raise `UserError` where a field of a config class holds what its type does not allow.

    Every `__post_init__` begins with it: comparing the number 0 with the text "3e-4" would otherwise
    stop with Python's words, which name no field.
    """
    for name, hint in _hints(type(part)).items():
        _parse(hint, to_json(getattr(part, name)), f"{where}.{name}" if where else name)


def to_json(value: Any) -> Any:
    """A dataclass tree as plain JSON values, each dataclass naming its class under `kind`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"kind": type(value).__name__, **fields}
    if isinstance(value, tuple | list):
        return [to_json(v) for v in value]
    return value


def from_json(kind: type[T], value: Any, where: str = "") -> T:
    """The inverse of `to_json`; an unknown key, a missing one or a wrong type is a `UserError`."""
    return _parse(kind, value, where)


def _parse(hint: Any, value: Any, where: str) -> Any:
    shown = where or "config"
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        options = [a for a in args if a is not type(None)]
        if len(options) == 1:
            return _parse(options[0], value, where)
        named = {o.__name__: o for o in options}
        require(isinstance(value, dict), f"{shown} is {value!r}; it must be a {' or a '.join(named)}.")
        kind = value.get("kind")
        require_known(kind, named, f"{shown}.kind is {kind!r}")
        return _parse(named[kind], value, where)
    if dataclasses.is_dataclass(hint):
        return _parse_dataclass(hint, value, where)
    if origin is Literal:
        require_known(value, args, f"{shown} is {value!r}")
        return value
    if origin is tuple:
        require(isinstance(value, list | tuple), f"{shown} is {value!r}; it must be a list.")
        return tuple(_parse(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    fits = isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool)
    require(fits, f"{shown} is {value!r}; it must be a value of type {hint.__name__}.")
    # JSON has neither NaN nor infinity, and no setting means anything by them.
    require(hint is not float or math.isfinite(value), f"{shown} is {value}; it must be a finite number.")
    return value


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _parse_dataclass(kind: Any, value: Any, where: str) -> Any:
    shown = where or "config"
    require(isinstance(value, dict), f"{shown} is {value!r}; it must be an object ({kind.__name__}).")
    hints = _hints(kind)
    names = {f.name for f in dataclasses.fields(kind)}
    given = dict(value)
    tag = given.pop("kind", kind.__name__)
    require(tag == kind.__name__, f"{shown}.kind is {tag!r}; it must be {kind.__name__!r}.")
    for name in given:
        require_known(name, names, f"{shown} has no field {name!r}")
    prefix = f"{where}." if where else ""
    parsed = {name: _parse(hints[name], v, prefix + name) for name, v in given.items()}
    for f in dataclasses.fields(kind):
        has_default = f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING
        require(
            f.name in parsed or has_default,
            f"{prefix}{f.name} is missing; {kind.__name__} needs it.",
        )
    return kind(**parsed)
