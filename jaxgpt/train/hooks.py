"""What surrounds the loop: claiming the run's folder, stopping on a signal, stopping early."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import signal
import subprocess
import time
from dataclasses import fields
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxgpt.config import Classifier, Run, load, load_run, to_json
from jaxgpt.errors import UserError, require
from jaxgpt.files import write_json
from jaxgpt.text.load import load_tokenizer
from jaxgpt.text.tokenizer import Tokenizer

MAY_CHANGE = (
    "mesh", "compute", "runs", "data.workers", "train.log_every", "train.save_every", "train.keep",
    "train.best_holds",
)  # fmt: skip
"""Fields that may differ when a run is resumed: they change how it is computed, not what."""


def claim_folder(run: Run, tokenizer: Tokenizer) -> None:
    """Create the run's folder, or make sure that the one there belongs to this config.

    Raises:
      UserError: the folder holds another config or another tokenizer.
    """
    folder, path = run.folder, run.folder / "config.json"
    check_folder(run)
    if path.exists():
        require(
            load_tokenizer(folder / "tokenizer").digest == tokenizer.digest,
            f"{folder} was trained with another tokenizer than that of its data now; "
            "give this run another name or bring the data back.",
        )
    elif jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save(folder / "tokenizer")
        write_json(path, {"run": to_json(run), "environment": environment()})
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


def _check_same(run: Run, held: Run) -> None:
    before, now = _flat(to_json(held)), _flat(to_json(run))
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


ONE_PRESS = 1.0
"""Seconds in which signals count as one: `uv run`, `timeout` and `srun` send on what we had already."""


class StopSignal:
    """SIGTERM and SIGINT ask the loop to save and leave; a later one ends the process at once."""

    def __init__(self) -> None:
        self.name, self._since = "", 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if not self.name:
            self.name, self._since = signal.Signals(number).name, time.monotonic()
        elif time.monotonic() - self._since >= ONE_PRESS:
            self.__exit__()
            os.kill(os.getpid(), number)

    def seen(self, step: int, every: int) -> bool:
        """Whether any process was asked to stop; a cluster agrees on it every few steps."""
        if jax.process_count() == 1:
            return bool(self.name)
        if step % every:
            return False
        return bool(multihost_utils.process_allgather(np.array(bool(self.name))).any())


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
