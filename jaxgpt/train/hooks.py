"""What surrounds the loop: claiming the run's folder, stopping early."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from jaxgpt.config import Run, code, load, to_json
from jaxgpt.errors import require
from jaxgpt.files import read_json, write_json
from jaxgpt.lock import LOCK, owned
from jaxgpt.text.load import load_tokenizer
from jaxgpt.text.tokenizer import Tokenizer
from jaxgpt.train.changes import branch, branch_point, check_resumed, differences
from jaxgpt.train.provenance import environment


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
    check_folder(run)  # once more: now nobody else changes it
    resumed = path.exists()
    _barrier("check_folder")
    if resumed:
        require(
            load_tokenizer(folder / "tokenizer").digest == tokenizer.digest,
            f"{folder} was trained with another tokenizer than that of its data now; "
            "give this run another name or bring the data back.",
        )
    if jax.process_index() == 0:
        if resumed:
            _renew(run, path)
        else:
            tokenizer.save(folder / "tokenizer")
            code.save(run, folder)
            write_json(path, {"run": code.portable(to_json(run)), "environment": environment()})
    _barrier("claim_folder")  # every process comes here, whichever of them saw the folder


def _renew(run: Run, path: Path) -> None:
    """Bring a run's stored config up to date; where it branches off, its folder too."""
    held = load(path)
    branch(run, held)
    if set(differences(held, run)) - {"runs"}:
        record = read_json(path, dict[str, Any], "restore it")
        write_json(path, record | {"run": code.portable(to_json(run))})


def check_folder(run: Run) -> None:
    """Refuse a run whose folder holds another one."""
    folder, path = run.folder, run.folder / "config.json"
    require(
        not (folder / "hf").is_dir(),
        f"{folder} is an imported model without a state to resume from; "
        f"give this run another name, and start it there with --init-from {folder}.",
    )
    if path.exists():
        held = load(path)
        check_resumed(run, held)
        branch_point(run, held)
        code.check_same(run, folder)


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


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
