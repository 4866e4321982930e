"""Python that a config names: stored as `FILE.py:NAME`, the file copied into the run and loaded from there.

Code runs with all the rights of its user. So a copy in a run's folder is run only where the user has
loaded the same file as a config before, or says so (`--trust-code`).
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import inspect
import os
import re
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxgpt.errors import UserError, library_errors, nearest, require, require_known, shown
from jaxgpt.files import read_small, write_bytes

FOLDER = "code"
"""In a run's folder."""
TRUST = "JAXGPT_TRUST_CODE"
"""Environment variable that `--trust-code` sets, for this process and those that it starts."""
_REFERENCE = re.compile(r"(?P<file>[^\0]*\.py):(?P<name>[^\W\d]\w*)")
SHIPPED = "jaxgpt.tasks"
"""The package whose classes are named by it: tasks live above what a config may import."""
FIELDS = ("kind", "rewards", "metrics", "scorer", "metric", "encoder")
"""Fields whose texts may be such names: of a part's class, and of functions."""
_EXPERIMENT = ("config", "sweep")
"""Functions of a file that are no part of what a run computes: their values are in its config."""


def name_of(kind: type) -> str:
    """How JSON names a config class: by its name, one outside the package as `FILE.py:NAME`.

    Raises:
      UserError: it is defined in no file, or not at the top of one.
    """
    if not _is_outside(kind):
        return f"{SHIPPED}:{kind.__name__}" if kind.__module__.startswith(SHIPPED) else kind.__name__
    path = _file_of(kind)
    require(
        path is not None and kind.__qualname__ == kind.__name__,
        f"the class {kind.__qualname__} cannot be stored with a run; define it at the top of a .py file.",
    )
    return f"{path}:{kind.__name__}"


def _is_outside(kind: Any) -> bool:
    return inspect.isclass(kind) and kind.__module__.partition(".")[0] != "jaxgpt"


def _file_of(kind: Any) -> Path | None:
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    return Path(file).resolve() if file and file.endswith(".py") else None


def shipped_class(name: Any, where: str) -> type | None:
    """The class of `jaxgpt.tasks:NAME`; None for another name.

    Raises:
      UserError: there is no such task.
    """
    package, colon, own = name.partition(":") if isinstance(name, str) else ("", "", "")
    if not colon or package != SHIPPED:
        return None
    tasks = importlib.import_module(SHIPPED)
    require_known(own, tasks.__all__, f"{where} names the task {own!r}")
    return getattr(tasks, own)


def is_reference(name: Any) -> bool:
    """Whether it is a `FILE.py:NAME`."""
    return isinstance(name, str) and _REFERENCE.fullmatch(name) is not None


def class_of(reference: str, folder: Path | None, where: str) -> type:
    """The class that `FILE.py:NAME` means.

    Args:
      reference: as `name_of` gives it, or with a FILE of `folder` alone.
      folder: of the files.
      where: name of the field in messages.

    Raises:
      UserError: there is no such file or class, it is no config class, or its code is not trusted.
    """
    path, name, module = _module_of(reference, folder, where)
    kind = getattr(module, name, None)
    kinds = [n for n, k in vars(module).items() if _is_outside(k) and dataclasses.is_dataclass(k)]
    require(
        name in kinds,
        f"{where} is {shown(reference)} but {path} defines no such config class{nearest(name, kinds)}",
    )
    assert isinstance(kind, type)
    return kind


def function_of(reference: str, where: str) -> Callable[..., Any]:
    """The function that `FILE.py:NAME` means.

    Raises:
      UserError: as `class_of`.
    """
    if reference in _given:
        return _given[reference]
    path, name, module = _module_of(reference, None, where)
    found = getattr(module, name, None)
    names = [n for n, f in vars(module).items() if inspect.isfunction(f) and n not in _EXPERIMENT]
    if callable(found):
        return found
    raise UserError(f"{where} is {shown(reference)} but {path} has no such function{nearest(name, names)}")


def references(names: Any, where: str) -> Any:
    """Names of functions, or functions themselves, as `FILE.py:NAME` with whole paths; others as they are.

    Raises:
      UserError: a function that is not at the top of a file.
    """
    return tuple(_reference(name, where) for name in names) if isinstance(names, list | tuple) else names


def _reference(name: Any, where: str) -> Any:
    if is_reference(name):
        file, _, own = name.rpartition(":")
        return f"{Path(file).expanduser().resolve()}:{own}"
    if not callable(name):
        return name
    own, path = getattr(name, "__qualname__", ""), _file_of(name)
    require(
        path is not None and own.isidentifier(),
        f"{where} has {shown(name)}, which cannot be stored with a run; define it at the top of a .py file.",
    )
    _given[f"{path}:{own}"] = name
    return f"{path}:{own}"


_given: dict[str, Callable[..., Any]] = {}
"""Functions that this process has handed over as such, by their names; their file has run here."""


def placed(reference: str, folder: Path | None) -> str:
    """A reference whose FILE, if no whole path, is in `folder`."""
    file, _, name = reference.rpartition(":")
    return reference if folder is None or Path(file).is_absolute() else f"{folder / Path(file).name}:{name}"


def _module_of(reference: str, folder: Path | None, where: str) -> tuple[Path, str, types.ModuleType]:
    """The file of a reference, the name in it, and its module, run if it is trusted."""
    file, _, name = placed(reference, folder).rpartition(":")
    path = Path(file)
    require(
        path.is_file(),
        f"{where} is {shown(reference)} but {path} does not exist; keep a run's folder {FOLDER!r} beside its "
        "config.json.",
    )
    data = read_small(path, "restore it")
    require(
        _is_trusted(data),
        f"{where} is {shown(reference)}: {path} holds Python code that came with the run and that you have "
        "not run before; read it, then add --trust-code (in Python, trust_code=True).",
    )
    with library_errors(f"{path} cannot be loaded", "restore it"):
        return path, name, _loaded(path.resolve(), data)


@functools.cache  # so that two loads of one run have equal configs, and share compiled programs
def _loaded(path: Path, data: bytes) -> types.ModuleType:
    return run_file(path, hashlib.sha256(data).hexdigest())


def run_file(path: Path, digest: str = "") -> types.ModuleType:
    """Run a Python file and return it as a module."""
    path = path.resolve()
    known = hashlib.sha256(str(path).encode()).hexdigest()[:12] + digest[:12]
    spec = importlib.util.spec_from_file_location(f"jaxgpt_file_{known}_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look their module up
    spec.loader.exec_module(module)
    return module


# -------------------------------------------------------------------------------------- a run's copies


def portable(value: Any) -> Any:
    """JSON with every `FILE.py:NAME` named by the file's last part, as a run's folder keeps it."""
    if isinstance(value, list):
        return [portable(part) for part in value]
    if not isinstance(value, dict):
        return value
    return with_references(
        {name: portable(part) for name, part in value.items()}, lambda name: Path(name).name
    )


def with_references(value: dict[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """A part's JSON with the names in its `FIELDS` changed."""

    def one(name: Any) -> Any:
        return change(name) if is_reference(name) else name

    own = {name: value[name] for name in FIELDS if name in value}
    return value | {n: [*map(one, part)] if isinstance(part, list) else one(part) for n, part in own.items()}


def save(run: Any, folder: Path) -> None:
    """Copy the files whose classes a config uses into `folder`.

    Raises:
      UserError: two of them have the same name.
    """
    for path in _files(run):
        (folder / FOLDER).mkdir(exist_ok=True)
        write_bytes(folder / FOLDER / path.name, path.read_bytes())


def check_same(run: Any, folder: Path) -> None:
    """Refuse to go on with a run whose code is another by now, beside what `config` and `sweep` do.

    Raises:
      UserError: naming the file.
    """
    for path in _files(run):
        held = folder / FOLDER / path.name
        same = held.is_file() and _meaning(held) == _meaning(path)
        require(
            same,
            f"{path} is not what {folder} was started with ({held}); give this run another name, or restore "
            "the file.",
        )


def _meaning(path: Path) -> str:
    """A file's syntax tree without comments, its docstring and the functions of the experiment."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return str(path)
    names = [part for part in tree.body if getattr(part, "name", None) not in _EXPERIMENT]
    return "\n".join(ast.dump(part) for part in names if not _is_docstring(part))


def _is_docstring(part: ast.stmt) -> bool:
    return isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant)


def _files(run: Any) -> list[Path]:
    found: dict[str, Path] = {}
    kinds = [path for kind in map(type, _parts(run)) if _is_outside(kind) and (path := _file_of(kind))]
    for path in [*kinds, *_named(run)]:
        other = found.setdefault(path.name, path)
        require(other == path, f"{other} and {path} are both used and have one name; rename one of them.")
    return list(found.values())


def _named(run: Any) -> list[Path]:
    """The files of the functions that a config names."""
    given = [getattr(part, field, ()) for part in _parts(run) for field in FIELDS]
    names = [name for value in given for name in ([value] if isinstance(value, str) else value)]
    return [Path(name.rpartition(":")[0]) for name in names if is_reference(name)]


def trust_named(run: Any, but: Any = None) -> None:
    """Trust the functions that a user's own config or command line names, but those that `but` did."""
    for path in set(_named(run)) - set(_named(but)):
        if path.is_file():
            trust(path)


def _parts(value: Any) -> Iterator[Any]:
    """A config and everything in it that is a part of its own."""
    if dataclasses.is_dataclass(value):
        yield value
        for field in dataclasses.fields(value):
            yield from _parts(getattr(value, field.name))
    elif isinstance(value, tuple):
        for part in value:
            yield from _parts(part)


# -------------------------------------------------------------------------------------- what is trusted


def trust(path: Path) -> None:
    """Remember that the user has run this file, so that copies of it in runs may be run."""
    data = path.read_bytes()
    if not _is_trusted(data):
        try:
            write_bytes(_mark(data), str(path.resolve()).encode())
        except (OSError, UserError):  # no home that can be written: such copies need --trust-code then
            _here.add(_mark(data).name)


@contextlib.contextmanager
def trusting(yes: bool) -> Iterator[None]:
    """Trust all code inside, if so asked, and no more of it afterwards."""
    before = os.environ.get(TRUST)
    if yes:
        os.environ[TRUST] = "1"
    try:
        yield
    finally:
        if yes:
            os.environ.pop(TRUST)
            os.environ |= {} if before is None else {TRUST: before}


def _is_trusted(data: bytes) -> bool:
    mark = _mark(data)
    return os.environ.get(TRUST) == "1" or mark.name in _here or mark.exists()


_here: set[str] = set()
"""Digests of files that this process has run, where they cannot be written down."""


def _mark(data: bytes) -> Path:
    home = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    return home / "jaxgpt" / "trusted" / hashlib.sha256(data).hexdigest()
