"""All fields of a config as a page: `python -m jaxgpt.config.reference > docs/config.md`.

What it says is what the classes say: types and bounds, defaults, and the docstrings of classes and fields.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import sys
import textwrap
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from jaxgpt.config.architecture import Architecture
from jaxgpt.config.bounds import Bounds
from jaxgpt.config.run import Run

HEAD = """# Every field of a config

Made by `python -m jaxgpt.config.reference > docs/config.md` from the docstrings of the code; a test compares
them. An experiment is a `Run` (see [`configs/`](../configs/)). On the command line, a field is a flag with
the path of its names: `--optim.peak-lr 3e-4`, `--model.layers 6`. Kinds (such as `model=Bert(...)`) are
chosen in the config file; `jaxgpt train CONFIG --help` shows the fields of its own kinds with its values.
"""


def page() -> str:
    """The page in Markdown."""
    return "\n".join([HEAD, *(_section(kind, path) for kind, path in _kinds(Run, ""))])


def _kinds(kind: Any, path: str) -> Iterator[tuple[Any, str]]:
    """The class and those of its fields, in order, each once, with where it stands in a `Run`."""
    seen: dict[Any, str] = {kind: path}
    for one, where in ((k, w) for k, w in _walk(kind, path) if k is not Architecture):
        seen.setdefault(one, where)
    yield from seen.items()


def _walk(kind: Any, path: str) -> Iterator[tuple[Any, str]]:
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        where = f"{path}.{field.name}" if path else field.name
        for option in _options(hints[field.name]):
            if dataclasses.is_dataclass(option):
                yield option, where
                yield from _walk(option, where)


def _options(hint: Any) -> Iterator[Any]:
    """The classes in a hint, of a tuple's entries too."""
    for part in typing.get_args(hint) or (hint,):
        yield from _options(part) if typing.get_args(part) else (part,)


def _section(kind: Any, path: str) -> str:
    says, hints = _field_docs(kind), typing.get_type_hints(kind, include_extras=True)
    lines = [
        f"## {kind.__name__}" + (f": `{path}`" if path else ""),
        "",
        _one_line(inspect.getdoc(kind) or ""),
    ]
    fields = dataclasses.fields(kind)
    if fields:
        lines += ["", "| field | what it is | values | default |", "|---|---|---|---|"]
    for field in fields:
        about = says.get(field.name) or _about_part(hints[field.name])
        cells = (f"`{field.name}`", about, _values(hints[field.name]), _default(field))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join([*lines, ""])


def _about_part(hint: Any) -> str:
    """What a part without a text of its own is: what its class is, where it can be of one alone."""
    if dataclasses.is_dataclass(hint):
        return _one_line(inspect.getdoc(hint) or "")
    return "Of one of these kinds, each described below." if typing.get_args(hint) else ""


def _field_docs(kind: Any) -> dict[str, str]:
    """The text below each field, in the class and those it is derived from."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(body, ast.ClassDef)
        for field, text in zip(body.body, body.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                assert isinstance(field.target, ast.Name) and isinstance(text.value, ast.Constant)
                found[field.target.id] = _one_line(str(text.value.value))
    return found


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _values(hint: Any) -> str:
    """What a field may be, in words."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        bounds = [f" {part}" for part in args[1:] if isinstance(part, Bounds)]
        return _values(args[0]) + "".join(bounds)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_values, args))
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in args)
    if origin is tuple:
        return (
            f"tuple of {_values(args[0])}" if args[-1] is Ellipsis else f"({', '.join(map(_values, args))})"
        )
    if dataclasses.is_dataclass(hint):
        return "an `Architecture` of your own" if hint is Architecture else f"`{hint.__name__}`"
    return {type(None): "None", str: "text", bool: "True, False"}.get(hint) or hint.__name__


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return f"`{field.default!r}`"
    if field.default_factory is dataclasses.MISSING:
        return "required"
    made = field.default_factory()
    given = {f.name: getattr(made, f.name) for f in dataclasses.fields(made) if _required(f)}
    return f"`{type(made).__name__}({', '.join(f'{name}={value!r}' for name, value in given.items())})`"


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


if __name__ == "__main__":
    sys.stdout.write(page())
