"""The checkpoints of a run's folder: which there are, saving one, and the newest or best that can be read."""

from __future__ import annotations

import functools
import logging
import os
import shutil
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as policies

from jaxgpt.checkpoint.checksum import make_sums, measure
from jaxgpt.checkpoint.damage import Damaged, errno_of, first_line
from jaxgpt.checkpoint.read import read_step, trusted_score
from jaxgpt.config import Compute, Run
from jaxgpt.errors import UserError, require, system_fix
from jaxgpt.sharding import param_shardings
from jaxgpt.target import Target
from jaxgpt.tune import make_tuning

log = logging.getLogger(__name__)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """A pytree of everything a step changes.

    Randomness needs no entry: the key of a step is `fold_in(key(seed), step)`.

    Attributes:
      step: updates tried so far, int32.
      bad_steps: updates skipped in a row up to now, int32.
      params: pure dict of float32 arrays.
      opt: optax state.
      memory: of a recurrent model, [B, ...] arrays, a row of the batch each; None for others.
    """

    step: jax.Array
    bad_steps: jax.Array
    params: dict
    opt: Any
    memory: Any = None


_ABANDONED = ("Event loop is closed", "Encountered error while reading array index")
"""What Orbax's reads under way raise once another one has failed, or when nobody waits for them any more."""


@functools.cache  # once per process
def _one_error() -> None:
    """Keep quiet the reads and writes under way when another one fails: each would print a trace."""
    before = sys.unraisablehook

    def hook(error: Any) -> None:
        if not any(words in str(error.exc_value) for words in _ABANDONED):
            before(error)

    sys.unraisablehook = hook


def _score(metrics: dict[str, float]) -> float:
    """The one number of an evaluation, the lowest of which is the best (`val_loss` in older runs)."""
    return next(iter(metrics.values()))


ALONE = "params_alone"
"""Among a checkpoint's metrics, after its score: it holds parameters and nothing to resume from."""


def steps_on_disk(run: Path) -> tuple[list[int], list[int]]:
    """The steps that a run's folder has a checkpoint of, and those of them that can be resumed from, oldest
    first. It looks at names alone, which any one process may.
    """
    found = [path for path in (run / "checkpoints").glob("*") if path.name.isdecimal()]
    steps = sorted(int(path.name) for path in found)
    return steps, sorted(int(path.name) for path in found if (path / "rest").exists())


class SaveError(RuntimeError):
    """A checkpoint could not be written; the ones before it are whole."""


@dataclass(frozen=True)
class _NewestWhole:
    """Keeps the newest n checkpoints that a run can be resumed from, and that of the step `always` (an Orbax
    preservation policy).
    """

    n: int
    always: int

    def should_preserve(
        self,
        checkpoints: Sequence[policies.PolicyCheckpointInfo],
        *,
        context: policies.PreservationContext,
    ) -> Sequence[bool]:
        whole = [info.step for info in checkpoints if ALONE not in (info.metrics or {})]
        return [info.step in (*whole[-self.n :], self.always) for info in checkpoints]


class Checkpoints:
    """The checkpoints of one run folder: the newest `keep`, the best (`Train.best_by`), and that of one step
    which is kept `always`.

    A best one may hold parameters alone (`Train.best_holds`): nothing is resumed from it.
    """

    def __init__(self, folder: Path, *, keep: int = 2, always: int = 0, read_only: bool = False) -> None:
        self.folder = Path(folder).absolute() / "checkpoints"
        _one_error()
        require(
            self.folder.is_dir() or not os.path.lexists(self.folder),
            f"{self.folder} is not a folder; move it away.",
        )
        _forget_damaged_scores(self.folder)
        newest = _NewestWhole(keep, always)
        best = policies.BestN(
            get_metric_fn=_score,
            reverse=True,
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        self.manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy([newest, best]),
                best_fn=_score,
                best_mode="min",
                read_only=read_only,
                create=not read_only,
                cleanup_tmp_directories=not read_only,
            ),
        )

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, oldest first."""
        return sorted(self.manager.all_steps())

    def whole_steps(self) -> list[int]:
        """Those that were saved with all that a run needs to be resumed, oldest first."""
        return [s for s in self.steps() if ALONE not in (self.manager.metrics(s) or {})]

    def best(self) -> int | None:
        """The step with the lowest score, the newest where none was measured."""
        steps = self.steps()
        return (self.manager.best_step() or steps[-1]) if steps else None

    def has_best(self, until: int | None = None) -> bool:
        """Whether a checkpoint, up to the step `until`, has a score."""
        return any(self.manager.metrics(s) for s in self.steps() if until is None or s <= until)

    def reload(self) -> None:
        """See what was moved away meanwhile."""
        self.manager.reload()

    def save(
        self, state: State, host: dict[str, Any], score: float | None = None, *, whole: bool = True
    ) -> None:
        """Copy the state off the devices and write it in the background.

        Args:
          state: what to save.
          host: the data's position and the loop's memory.
          score: of an evaluation, if it was the lowest so far.
          whole: or the parameters alone, to be sampled from.

        Raises:
          SaveError: this save, or the one before it, could not be written.
        """
        step, score = int(state.step), None if score is None else float(score)
        metrics = None if score is None else {"score": score} | ({} if whole else {ALONE: 1.0})
        arrays = {"params": state.params} | ({"rest": _rest(state)} if whole else {})
        sums = make_sums(
            {name: measure(tree) for name, tree in arrays.items()}, host if whole else None, metrics
        )
        items: dict[str, Any] = {name: ocp.args.StandardSave(tree) for name, tree in arrays.items()}
        items |= {"sums": ocp.args.JsonSave(sums)} | ({"host": ocp.args.JsonSave(host)} if whole else {})
        try:
            if step in set(self.steps()) - set(self.whole_steps()):  # of before this run was resumed
                self.manager.delete(step)
            self.manager.save(step, args=ocp.args.Composite(**items), metrics=metrics, force=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise self._explain(error) from error

    def check(self) -> None:
        """Raise `SaveError` once writing in the background has failed; never waits.

        Not by the manager's `check_for_errors`: that takes the error from the thread which finishes
        the checkpoint, and half of one could then be taken for a whole.
        """
        if not self.manager.is_saving_in_progress():
            self.finish()

    def finish(self) -> None:
        """Wait until what was saved is on disk. Raises `SaveError` if it could not be written."""
        try:
            self.manager.wait_until_finished()
        except (OSError, ValueError, RuntimeError) as error:
            raise self._explain(error) from error

    def close(self) -> None:
        """Finish and free the threads. Raises `SaveError` as `finish` does."""
        try:
            self.finish()
        finally:
            self.manager.close()

    def _explain(self, error: Exception) -> SaveError:
        _, whole = steps_on_disk(self.folder.parent)
        last = f"the last whole one is step {whole[-1]}" if whole else "there is no whole one yet"
        number, fix = errno_of(error), "run the same command again"
        why = first_line(error) if number is None else os.strerror(number)
        fix = fix if number is None else f"{system_fix(number)} and {fix}"
        return SaveError(f"a checkpoint could not be written under {self.folder} ({why}); {last}: {fix}.")

    def restore(
        self,
        abstract: State,
        host: Any = dict[str, Any],
        *,
        verify: bool = True,
        until: int | None = None,
    ) -> tuple[State, Any] | None:
        """The newest whole checkpoint in the layout of `abstract`, or None where there is none at all.

        Damaged ones that are newer are moved to `damaged/` beside the checkpoints, with a warning.

        Args:
          abstract: what to restore, with its shardings.
          host: what the data's position and the loop's memory must be, a schema.
          verify: compare checksums.
          until: leave those of later steps alone.

        Raises:
          UserError: checkpoints are there, and none can be resumed from; nothing is moved then.
        """
        targets, damaged = {"params": abstract.params, "rest": _rest(abstract)}, list[int]()
        for step in reversed([s for s in self.whole_steps() if until is None or s <= until]):
            try:
                trees, known = read_step(self.folder / str(step), targets, host, verify=verify)
            except Damaged as error:
                _say_damaged(step, error)
                damaged.append(step)
                continue
            self._set_aside(damaged, step)
            return State(params=trees["params"], **trees["rest"]), known
        self._require_none(damaged)
        return None

    def _require_none(self, damaged: list[int]) -> None:
        """Refuse to start over where there is a checkpoint, whatever became of it."""
        aside, run = self.folder.parent / "damaged", self.folder.parent
        over = f"to start over, give this run another name or delete {run}"
        require(
            not damaged,
            f"every checkpoint of {run} is damaged ({', '.join(map(str, damaged))}) and left as it is; "
            f"bring back a whole one; {over}.",
        )
        steps = ", ".join(map(str, self.steps()))
        require(
            not steps,
            f"{self.folder} holds parameters alone (step {steps}) and no state to resume from; "
            f"give this run another name and start it there with --init-from {run}; {over}.",
        )
        require(
            not (aside.is_dir() and any(aside.iterdir())),
            f"every checkpoint of {run} was damaged and is in {aside}; {over}.",
        )

    def _set_aside(self, damaged: list[int], used: int) -> None:
        """Move damaged steps away, once: one process does, and all see it done."""
        if not damaged:
            return
        if jax.process_index() == 0:
            target = self.folder.parent / "damaged"
            log.warning("using step %d instead; the damaged are moved to %s", used, target)
            target.mkdir(exist_ok=True)
            for step in damaged:
                shutil.move(self.folder / str(step), target / f"{step}-{os.getpid()}")
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged")
        self.manager.reload()

    def load_params(self, run: Run, mesh: jax.sharding.Mesh, step: int, *, verify: bool = True) -> dict:
        """The trained parameters of one step alone, laid out on the mesh.

        Raises:
          Damaged: the step's files.
          UserError: they are of another structure, or not finite.
        """
        model = make_tuning(run.tune, run.model, Compute(attention="xla"), Target("cpu", "cpu")).learned
        target = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            nnx.to_pure_dict(model),
            param_shardings(model, mesh),
        )
        return read_step(self.folder / str(step), {"params": target}, verify=verify)[0]["params"]


def _rest(state: State) -> dict[str, Any]:
    """All but the parameters; without an entry for a memory where the model has none."""
    rest = {"step": state.step, "bad_steps": state.bad_steps, "opt": state.opt}
    return rest if state.memory is None else rest | {"memory": state.memory}


def _say_damaged(step: int, error: Damaged) -> None:
    if jax.process_index() == 0:
        log.warning("checkpoint %d is damaged (%s)", step, error)


def _forget_damaged_scores(folder: Path) -> None:
    """Remove scores that cannot be read or trusted: no checkpoint beside them could be opened."""
    for path in sorted(folder.glob("*/metrics/metrics")):
        if not trusted_score(path):
            log.warning("%s is damaged and removed: its step no longer counts as the best", path)
            path.unlink(missing_ok=True)


def load_saved(
    folder: str | Path, run: Run, mesh: jax.sharding.Mesh, which: str = "best", *, verify: bool = True
) -> tuple[dict, int]:
    """What a run has trained, in the training form, on any mesh.

    Args:
      folder: the run's folder.
      run: its config.
      mesh: where to.
      which: `best` (see `Train.best_by`), `newest`, or a step.
      verify: compare checksums, and refuse parameters that are not finite.

    Returns:
      The parameters and their step.

    Raises:
      UserError: there is no such checkpoint, none is whole, or it does not fit the config.
    """
    folder = Path(folder)
    require(
        (folder / "checkpoints").is_dir(),
        f"{str(folder)!r} has no checkpoints yet; run `jaxgpt train {folder / 'config.json'}` first.",
    )
    with closing(Checkpoints(folder, read_only=True)) as checkpoints:
        steps = checkpoints.steps()
        require(bool(steps), f"{str(folder)!r} has no whole checkpoint yet; train it for longer.")
        if which in ("best", "newest"):
            first = checkpoints.best() if which == "best" else steps[-1]
            steps.sort(key=lambda step: (step == first, step), reverse=True)
        else:
            require(
                which.isdecimal() and which.isascii() and int(which) in steps,
                f"checkpoint {which!r} is not in {str(folder)!r}; it has best, newest, "
                f"{', '.join(map(str, steps))}.",
            )
            steps = [int(which)]
        for step in steps:
            try:
                return checkpoints.load_params(run, mesh, step, verify=verify), step
            except Damaged as error:
                _say_damaged(step, error)
    raise UserError(
        f"no checkpoint in {str(folder)!r} could be read ({', '.join(map(str, steps))} are damaged); "
        "name another one or train it again."
    )
