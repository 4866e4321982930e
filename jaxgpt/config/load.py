"""Config files, run folders and the command line to a `Run`."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import itertools
import re
import stat
import traceback
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from jaxgpt.config import code
from jaxgpt.config.architecture import Architecture
from jaxgpt.config.data import Data
from jaxgpt.config.gpt import GPT, MoE, RopeScaling
from jaxgpt.config.knowledge import Knowledge
from jaxgpt.config.measures import Measure
from jaxgpt.config.models import Bert, Classifier, Headed, RewardModel, TransformerXL
from jaxgpt.config.objectives import Objective
from jaxgpt.config.replay import Replay
from jaxgpt.config.run import Run, read_run
from jaxgpt.config.suite import Suite
from jaxgpt.config.tasks import Task
from jaxgpt.config.training import Compute, Mesh, Optim, Train
from jaxgpt.errors import UserError, did_you_mean, require, same_name, shown
from jaxgpt.glossary import answer, look_up

KINDS = (
    *(GPT, Bert, TransformerXL, Classifier, RewardModel, MoE, RopeScaling),
    *(
        *typing.get_args(Data),
        *typing.get_args(Objective),
        *typing.get_args(Measure),
        Replay,
        Compute,
        Optim,
        Mesh,
        Train,
        Run,
        Knowledge,
    ),
)
"""What a config file can build."""
MOST_RUNS = 10_000
"""Of a sweep."""


def load(path: str | Path) -> Run:
    """The `Run` of a config file (`.py` with `config()`, or a run's `config.json`) or a run folder.

    Raises:
      UserError: naming the file and what is wrong in it.
    """
    path = _existing(path)
    if path.is_dir():
        path = _existing(path / "config.json")
    if path.suffix == ".json":
        return read_run(path, repr(str(path)))
    require(path.suffix == ".py", f"config {str(path)!r} must end in .py or .json.")
    run = _checked(_call(path, "config", "Run"), f"{path}: config() returned")
    code.trust_named(run)
    return run


def _existing(path: str | Path) -> Path:
    """The path of a config, if it is one of a file or a folder."""
    path = Path(path)
    fix = "give a .py file, a config.json or a run folder."
    try:
        held = path.stat()
    except (OSError, ValueError) as error:  # ValueError: a NUL in it
        why = getattr(error, "strerror", None) or str(error)
        missing = isinstance(error, FileNotFoundError | NotADirectoryError) and not path.is_symlink()
        said = "does not exist" if missing else f"cannot be read ({why})"
        raise UserError(f"config {shown(str(path), 4096)} {said}; {fix}") from None
    regular = stat.S_ISREG(held.st_mode) or stat.S_ISDIR(held.st_mode)
    require(regular, f"config {str(path)!r} is neither a file nor a folder; {fix}")
    return path


def load_run(folder: str | Path) -> Run:
    """The resolved config of a run's folder.

    Raises:
      UserError: there is no such folder, or it is none of a run.
    """
    folder = Path(folder)
    require(folder.is_dir(), f"run folder {str(folder)!r} does not exist; give the folder of a run.")
    require(
        (folder / "config.json").is_file(),
        f"{str(folder)!r} is no run folder: it has no config.json; give a folder that `jaxgpt train` made.",
    )
    return load(folder)


def load_suite(path: str | Path) -> Suite:
    """The suite of a config file's `config()`.

    Raises:
      UserError: the file has no `config()`, or one that returns something else.
    """
    path = Path(path)
    require(
        path.is_file() and path.suffix == ".py",
        f"{str(path)!r} is no config file; give a .py file with `def config() -> Suite`.",
    )
    suite = _call(path, "config", "Suite")
    require(
        isinstance(suite, Suite), f"{path}: config() returns {type(suite).__name__}; it must return a Suite."
    )
    code.trust_named(suite)
    return suite


def load_sweep(path: str | Path) -> dict[str, Run]:
    """The runs of a config file's `sweep()` by their names, in its order.

    Raises:
      UserError: the file has no `sweep()`, or one that yields other things than (name, Run) pairs.
    """
    path = Path(path)
    require(
        path.is_file() and path.suffix == ".py",
        f"{str(path)!r} is no config file; give a .py file with `def sweep()`.",
    )
    pairs = _call(path, "sweep", "Iterator[tuple[str, Run]]")
    with _explained(path):
        pairs = list(itertools.islice(pairs, MOST_RUNS + 1))
    require(len(pairs) <= MOST_RUNS, f"{path}: sweep() yields more than {MOST_RUNS:,} runs; yield fewer.")
    runs: dict[str, Run] = {}
    for pair in pairs:
        require(
            isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str),
            f"{path}: sweep() yields {shown(pair)}; it must yield (name, Run) pairs.",
        )
        name, run = pair
        require(name not in runs, f"{path}: sweep() yields the name {name!r} twice; names differ.")
        runs[name] = _checked(run, f"{path}: sweep() yields for {name!r}")
        code.trust_named(run)
    require(bool(runs), f"{path}: sweep() yields nothing; yield at least one (name, Run) pair.")
    return runs


def _call(path: Path, function: str, kind: str) -> Any:
    """What a function of a config file returns."""
    with _explained(path):
        module = load_module(path)
    require(
        callable(getattr(module, function, None)),
        f"{path} has no function {function}(); define `def {function}() -> {kind}`.",
    )
    with _explained(path):
        return getattr(module, function)()


def _checked(run: Any, where: str) -> Run:
    require(isinstance(run, Run), f"{where} {type(run).__name__}; it must return a Run.")
    return run


def load_module(path: Path) -> types.ModuleType:
    """Run a Python config file and return it as a module."""
    module = code.run_file(path)
    if any(isinstance(v, type) and v.__module__ == module.__name__ for v in vars(module).values()):
        code.trust(path)  # runs may keep copies of it
    return module


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn whatever the code of a config file raises into a `UserError` with its line."""
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # sys.exit() is an error here too
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f.lineno for f in frames if Path(f.filename).resolve() == path.resolve()]
        if isinstance(error, SyntaxError) and Path(error.filename or "").resolve() == path.resolve():
            raise UserError(f"{path}, line {error.lineno}: {error.msg}.") from None
        where = f"{path}, line {lines[-1]}" if lines else str(path)
        what = str(error) if isinstance(error, UserError) else _explain_error(error)
        raise UserError(f"{where}: {what}") from None


def _explain_error(error: BaseException) -> str:
    """Name the nearest field when the error is an unknown keyword of one of our classes."""
    words = str(error).split("'")
    for kind in (*KINDS, *Architecture.__subclasses__(), *Task.__subclasses__()):
        if str(error).startswith(f"{kind.__name__}.__init__") and "unexpected keyword" in str(error):
            names = [f.name for f in dataclasses.fields(kind)]
            return f"{kind.__name__} has no field {words[1]!r}{look_up(words[1], names)}"
    if isinstance(error, SystemExit):
        return f"it calls sys.exit({shown(error.code, 40)}); a config returns a Run."
    return f"{type(error).__name__}: {' '.join(str(error).split()):.300}"


def override(
    run: Run, args: list[str], prog: str = "jaxgpt train CONFIG", description: str | None = None
) -> Run:
    """`run` with fields replaced from flags such as `--optim.peak-lr 3e-4` (typed by tyro).

    `prog` and `description` are for --help; None describes a `Run`.
    """
    import tyro  # imported late: it is only needed by commands that take options

    run = _started_from(run, args)
    kind = tyro.conf.AvoidSubcommands[tyro.conf.FlagConversionOff[Run]]
    if {"-h", "--help"} & set(args):
        description = f"{description or inspect.getdoc(Run)}\n\n{CONFIG}\n\n{kinds_of(run)}"
    made = parse_args(kind, args, prog, default=run, description=description)
    code.trust_named(made, run)
    return made


def _started_from(run: Run, args: list[str]) -> Run:
    """The run with `--init-from` set, whose model it takes where its config gives none."""
    base = ""
    for word, after in zip(args, [*args[1:], ""], strict=False):
        name, joined, value = word.partition("=")
        if name in ("--init-from", "--init_from"):
            base = value if joined else after
    if not (run.inherits and base):
        return run
    model: Any = None
    if run.inherits == "backbone" and isinstance(run.model, Headed):
        model = dataclasses.replace(run.model, backbone=cast(Any, None))
    return dataclasses.replace(run, init_from=base, model=model)


CONFIG = (
    "CONFIG (required): a .py file with `def config() -> Run`, a run's config.json or a run folder; --help "
    "behind it shows its own fields."
)


def kinds_of(run: Run) -> str:
    """What the help says about the kinds of a run's parts: those it has, and the others."""
    parts = "; ".join(f"{where} is {kind} (or {', '.join(others)})" for where, kind, others in _kinds(run))
    return (
        f"The fields below are those of this config's kinds, with its values as defaults: {parts}. Kinds are "
        "chosen in the config file; docs/config.md lists the fields of all."
    )


OPEN: dict[Any, str] = {Architecture: "your own Architecture", Task: "a task of jaxgpt.tasks or your own"}
"""Classes that users derive their own from."""


def _kinds(part: Any, where: str = "") -> Iterator[tuple[str, str, list[str]]]:
    """(field, its kind, the others) of each part that can be of several."""
    hints = typing.get_type_hints(type(part))
    for field in dataclasses.fields(part):
        options = [k for k in typing.get_args(hints[field.name]) if dataclasses.is_dataclass(k)]
        value, name = getattr(part, field.name), where + field.name
        if options:
            kinds = [OPEN.get(k) or k.__name__ for k in options]
            kinds += ["None"] * (type(None) in typing.get_args(hints[field.name]))
            kind = "None" if value is None else type(value).__name__
            yield name, kind, [other for other in kinds if other != kind]
        if dataclasses.is_dataclass(value):
            yield from _kinds(value, f"{name}.")


def parse_args(kind: Any, args: list[str], prog: str, **options: Any) -> Any:
    """`tyro.cli`, which raises `UserError` with one sentence in place of printing a box and exiting."""
    import tyro

    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            value, unknown = tyro.cli(kind, args=args, prog=prog, return_unknown_args=True, **options)
    except SystemExit as error:
        if not error.code:  # --help
            raise
        raise UserError(_unboxed(box.getvalue())) from None
    if not unknown:
        return value
    if not unknown[0].startswith("-"):
        raise UserError(f"unexpected argument {unknown[0]!r}; options are written as --name value.")
    with contextlib.redirect_stdout(box), contextlib.suppress(SystemExit):
        tyro.cli(kind, args=["--help"], prog=prog, **options)
    flags = re.findall(r"(?<!\S)--[a-z][\w.-]*", box.getvalue())
    name = unknown[0].partition("=")[0]
    said = "" if any(same_name(name, flag) for flag in flags) else answer(name, flags=True)
    hint = f"{said}." if said else did_you_mean(name, flags) or f"`{prog} --help` lists what there is."
    raise UserError(f"unknown option {unknown[0]!r}; {hint}")


def _unboxed(box: str) -> str:
    """What tyro says in its box, as one line and without the hints below it."""
    lines = [x.strip("│ ") for x in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()]

    def is_rule(line: str) -> bool:  # dashes where the terminal has no box characters
        return line[:3] in ("───", "╰──", "---", "")

    said = " ".join(itertools.takewhile(lambda x: not is_rule(x), itertools.dropwhile(is_rule, lines[1:])))
    return re.sub(r"^Error parsing \w+: ", "", said) or "these options do not parse."
