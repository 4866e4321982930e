"""What surrounds the loop: claiming the run's folder, stopping early."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
from jax.experimental import multihost_utils

from jaxgpt.checkpoint import Checkpoints, load_params
from jaxgpt.checkpoint.whole import FILE, Base, find_base, load_base, note_base, params_digest
from jaxgpt.config import Full, Run, code, load, load_run, to_json
from jaxgpt.errors import require
from jaxgpt.files import read_json, write_json
from jaxgpt.lock import LOCK, owned
from jaxgpt.report.run import Best
from jaxgpt.text.load import load_tokenizer
from jaxgpt.text.tokenizer import Tokenizer
from jaxgpt.train.changes import Changes, changes, set_apart
from jaxgpt.train.provenance import environment, note_start

log = logging.getLogger(__name__)


MADE_FROM = "made_from.json"
"""In the folder of a run that was not trained (merged, or an adapter imported): what it was made from."""


class Score(NamedTuple):
    """A metric of a task: its value, and which way is better."""

    value: float
    higher_is_better: bool


Scores = Callable[[dict], dict[str, Score]]
"""From the whole model's parameters to the metrics of tasks, by SOURCE:METRIC."""
MakeScores = Callable[[Run, Tokenizer, jax.sharding.Mesh], Scores | None]
"""What a command gives the loop, which itself knows nothing of evaluation; None where a run asks for none."""


BESIDE = "beside the steps"
"""What a trace calls the host's work that is no part of a step, as evaluating and saving."""


class Profile(Protocol):
    """What a command gives the loop to look at some steps, `first` to `last` (`jaxgpt.profile`)."""

    first: int
    last: int

    def check(self, steps: int, done: int = 0) -> None:
        """Refuse what a run of this many steps, of which `done` are done, will not come to."""
        ...

    def begin(self, run_folder: Path) -> None:
        """Start, before the first of them; nothing runs on the devices."""
        ...

    def end(self, compiled: Any) -> list[str]:
        """Stop, when the last of them is done; lines to print about the compiled step."""
        ...

    def close(self) -> None:
        """Training has ended, perhaps before `last`."""
        ...


BEST = "best.json"
"""In a run's folder: by what its best checkpoint is the best, and how good it is."""


def best_of(folder: Path) -> Best | None:
    """By what a run's best checkpoint is the best; None where none was chosen yet."""
    path = folder / BEST
    return (
        read_json(path, Best, "remove it; the next best checkpoint writes it anew")
        if path.is_file()
        else None
    )


def note_best(run: Run, by: str, score: Score, step: int) -> None:
    """Leave in the run's folder what its best checkpoint was chosen by; on the first process."""
    if jax.process_index() == 0:
        record = {"by": by, "higher_is_better": score.higher_is_better, "value": score.value, "step": step}
        write_json(run.folder / BEST, record)


class Claim:
    """A run's folder while it is owned. Until `keep`, what was put into it is withdrawn at an error.

    Attributes:
      changes: what the run changes of the one in the folder.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.folder, self.changes = run, run.folder, Changes({})
        self._made = [path for path in (run.folder, *run.folder.parents) if not path.exists()]
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

    def begin(self, checkpoints: Checkpoints, step: int, source: Path | None) -> None:
        """Make the folder that of this run, which goes on after `step` from one of its checkpoints.

        Later checkpoints that are no part of it become a run of their own; its config is stored; a record
        says where it comes from. An error before this, as of a damaged checkpoint, leaves all as it was.
        """
        if jax.process_index() == 0:
            later = [s for s in checkpoints.steps() if self.changes.until is not None and s > step]
            if later:
                if (best := best_of(self.folder)) and best["step"] > step:
                    (self.folder / BEST).unlink()
                apart = set_apart(self.folder, later)
                log.warning("going on from step %d; what came after it is now the run %s", step, apart)
            if self.changes.fields:
                log.info("changed: %s", self.changes)
                write_json(self.folder / "config.json", _config(self.run))
            note_start(self.folder, source, step, self.changes.fields)
        _barrier("begin")
        checkpoints.reload()

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
    claim = Claim(run)
    with claim.owned():
        claim.changes = _claim(run, tokenizer)
        yield claim


def _claim(run: Run, tokenizer: Tokenizer) -> Changes:
    folder, path = run.folder, run.folder / "config.json"
    found = check_folder(run)  # once more: now nobody else changes it
    if path.exists():
        require(
            load_tokenizer(folder / "tokenizer").digest == tokenizer.digest,
            f"{folder} was trained with another tokenizer than that of its data now; "
            "give this run another name or bring the data back.",
        )
    elif jax.process_index() == 0:
        tokenizer.save(folder / "tokenizer")
        code.save(run, folder)
        write_json(path, _config(run))
    _barrier("claim_folder")  # every process comes here, whichever of them saw the folder
    return found


def claimed_base(run: Run, mesh: jax.sharding.Mesh, *, copy: bool, verify: bool) -> dict | None:
    """The parameters that a run tunes a part of or stays close to, as they were when it began; None where it
    does neither.

    The run's folder then refers to them by their digest.

    Args:
      run: whose folder is owned.
      mesh: where to.
      copy: keep a copy of them in the folder.
      verify: compare checksums.
    """
    if isinstance(run.tune, Full) and getattr(run.objective, "kl", None) is None:
        return None
    known = (run.folder / FILE).exists()
    _barrier("find_base")
    if known:
        params, base = load_base(run.folder, mesh, verify=verify), find_base(run.folder)[1]
    else:
        params, step = load_params(run.init_from, load_run(run.init_from), mesh, verify=verify)
        base: Base = {"run": run.init_from, "step": step, "digest": params_digest(params)}
        log.info("starting from %s, step %d", run.init_from, step)
    if jax.process_index() == 0 and (copy or not known):
        note_base(run.folder, base, copy=copy)
    _barrier("note_base")
    return params


def _config(run: Run) -> dict[str, Any]:
    """What config.json holds."""
    return {"run": code.portable(to_json(run)), "environment": environment()}


def check_folder(run: Run) -> Changes:
    """What a run changes of the one that its folder holds; refuse one that is another."""
    folder, path = run.folder, run.folder / "config.json"
    require(
        not (folder / "hf").is_dir() and not (folder / MADE_FROM).exists(),
        f"{folder} is an imported or merged model without a state to resume from; "
        f"give this run another name, and start it there with --init-from {folder}.",
    )
    if not path.exists():
        return Changes({})
    found = changes(run, load(path))
    code.check_same(run, folder)
    return found


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
