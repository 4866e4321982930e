"""What surrounds the loop: claiming the run's folder, stopping early."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from jaxgpt.config import Classifier, Run, code, load, load_run, to_json
from jaxgpt.errors import UserError, require
from jaxgpt.files import write_json
from jaxgpt.lock import LOCK, owned
from jaxgpt.text.load import load_tokenizer
from jaxgpt.text.tokenizer import Tokenizer

MAY_CHANGE = (
    "mesh", "compute", "runs", "data.workers", "train.log_every", "train.save_every", "train.keep",
    "train.best_holds",
)  # fmt: skip
"""Fields that may differ when a run is resumed: they change how it is computed, not what."""


class Claim:
    """A run's folder while it is owned. Until `keep`, what was put into it is withdrawn at an error."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._made = [path for path in (folder, *folder.parents) if not path.exists()]
        self._before: set[Path] | None = None

    @contextlib.contextmanager
    def owned(self) -> Iterator[None]:
        """Own the folder until the end; on the first process, which answers for all."""
        if jax.process_index() != 0:
            yield
            return
        try:
            with owned(self.folder):
                if not (self.folder / "config.json").exists():
                    self._before = set(self.folder.iterdir()) - {self.folder / LOCK}
                try:
                    yield
                except BaseException:
                    self.withdraw()
                    raise
        finally:
            self._remove_empty()

    def keep(self) -> None:
        """Leave the folder as it is, whatever comes."""
        self._before = None

    def withdraw(self) -> None:
        """Remove what this process has put into a fresh folder, and the folders it has made."""
        if self._before is None:
            return
        for path in set(self.folder.iterdir()) - self._before:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        self._remove_empty()

    def _remove_empty(self) -> None:
        with contextlib.suppress(OSError):  # something is in it, most often
            for path in self._made:
                path.rmdir()


@contextlib.contextmanager
def claimed(run: Run, tokenizer: Tokenizer) -> Iterator[Claim]:
    """Own the run's folder: create it, or make sure that the one there belongs to this config.

    No other process can train there meanwhile. An error before `Claim.keep` leaves nothing of a fresh
    folder behind.

    Raises:
      UserError: the folder is in use, or holds another config or another tokenizer.
    """
    check_folder(run)
    claim = Claim(run.folder)
    with claim.owned():
        _claim(run, tokenizer)
        yield claim


def _claim(run: Run, tokenizer: Tokenizer) -> None:
    folder, path = run.folder, run.folder / "config.json"
    check_folder(run)  # once more: now nobody changes it
    if path.exists():
        require(
            load_tokenizer(folder / "tokenizer").digest == tokenizer.digest,
            f"{folder} was trained with another tokenizer than that of its data now; "
            "give this run another name or bring the data back.",
        )
    elif jax.process_index() == 0:
        tokenizer.save(folder / "tokenizer")
        code.save(run, folder)
        write_json(path, {"run": code.portable(to_json(run)), "environment": environment()})
    _barrier("claim_folder")  # every process comes here, whichever of them saw the folder


def check_folder(run: Run) -> None:
    """Refuse a run whose folder holds another one."""
    folder, path = run.folder, run.folder / "config.json"
    require(
        not (folder / "hf").is_dir(),
        f"{folder} is an imported model without a state to resume from; "
        f"give this run another name, and start it there with --init-from {folder}.",
    )
    if path.exists():
        _check_same(run, load(path))
        code.check_same(run, folder)


def _check_same(run: Run, held: Run) -> None:
    before, now = _flat(code.portable(to_json(held))), _flat(code.portable(to_json(run)))
    changed = [
        name
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name) and not name.startswith(MAY_CHANGE)
    ]
    if changed:
        name = changed[0]
        more = f" and {len(changed) - 1} more fields" if len(changed) > 1 else ""
        raise UserError(
            f"{run.folder} holds a run with {name} {before.get(name)!r}, not {now.get(name)!r}{more}; "
            f"give this run another name or --runs (with --init-from {run.folder} it goes on from there), or "
            "delete the folder to start over."
        )


MAY_DIFFER = ("dropout", "head_dropout", "frozen", "causal", "prefix")
"""Fields of a model that its parameters do not depend on: a run may start from one that differs in them."""


def check_base(run: Run, tokenizer: Tokenizer) -> None:
    """Make sure that the run named by `init_from`, if there is one, holds the same model and tokenizer.

    Raises:
      UserError: it is no run, a field of its model beside `MAY_DIFFER` differs, or its ids mean
        something else.
    """
    if not run.init_from:
        return
    base, model = load_run(run.init_from).model, run.model
    if isinstance(model, Classifier) and not isinstance(base, Classifier):
        model = model.backbone
    require(
        type(base) is type(model),
        f"init_from {run.init_from!r} holds a {type(base).__name__}, not a {type(model).__name__}; "
        "give this config the same one.",
    )
    differ = [
        f"{f.name} {getattr(base, f.name)!r}, not {getattr(model, f.name)!r}"
        for f in fields(base)
        if f.name not in MAY_DIFFER and getattr(base, f.name) != getattr(model, f.name)
    ]
    require(
        not differ,
        f"init_from {run.init_from!r} holds a model with {', '.join(differ)}; "
        f"give this config the same one (only {', '.join(MAY_DIFFER)} may differ).",
    )
    require(
        load_tokenizer(Path(run.init_from) / "tokenizer").digest == tokenizer.digest,
        f"init_from {run.init_from!r} was trained with another tokenizer than that of this run's data; "
        f"prepare the data with --tokenizer {run.init_from}/tokenizer, or leave data.tokenizer empty.",
    )


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix.removesuffix("."): value}
    return {k: v for name, part in value.items() for k, v in _flat(part, f"{prefix}{name}.").items()}


def environment() -> dict[str, Any]:
    """What a run was computed with: revision, versions, devices, flags."""
    names = ("jaxgpt", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    versions: dict[str, str | None] = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    git = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=12",
    ]
    try:
        revision = subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        revision = None
    return {
        "git": revision,
        "python": platform.python_version(),
        "versions": versions,
        "devices": jax.device_count(),
        "device": jax.devices()[0].device_kind,
        "processes": jax.process_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


class Patience:
    """Early stopping: remembers the lowest score of an evaluation and how long ago it was.

    Args:
      limit: evaluations without a lower score before `over`; 0 never ends.
      best, waited: the memory of an earlier process, from a checkpoint.
    """

    def __init__(self, limit: int, best: float = float("inf"), waited: int = 0) -> None:
        self.limit, self.best, self.waited = limit, best, waited

    def update(self, score: float) -> bool:
        """Note an evaluation; True when it is the best so far."""
        better = score < self.best
        self.best, self.waited = (score, 0) if better else (self.best, self.waited + 1)
        return better

    @property
    def over(self) -> bool:
        """Whether to stop."""
        return 0 < self.limit <= self.waited
