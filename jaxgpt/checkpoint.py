"""Orbax checkpoints of a run: written whole or not at all, restored on any mesh.

A checkpoint has three items: `params`, which sampling loads alone; `rest`, the optimizer and
counters; `host`, the data position and the loop's memory as JSON.
"""

from __future__ import annotations

import functools
import json
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
from orbax.checkpoint import checkpoint_managers as policies

from jaxgpt.config import Run
from jaxgpt.errors import UserError, require
from jaxgpt.models import abstract_params
from jaxgpt.sharding import param_shardings

log = logging.getLogger(__name__)

_NOT_DAMAGE = (MemoryError, PermissionError, jax.errors.JaxRuntimeError)
"""What reading can raise that says nothing about the files: no reason to set a checkpoint aside."""


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


@functools.cache  # once a process
def _one_error() -> None:
    """Keep quiet the reads and writes under way when another one fails: each would print a trace."""
    before = sys.unraisablehook

    def hook(error: Any) -> None:
        if "Event loop is closed" not in str(error.exc_value):
            before(error)

    sys.unraisablehook = hook


def _score(metrics: dict[str, float]) -> float:
    """The one number of an evaluation, the lowest of which is the best (`val_loss` in older runs)."""
    return next(iter(metrics.values()))


ALONE = "params_alone"
"""Among a checkpoint's metrics, after its score: it holds parameters and nothing to resume from."""


class SaveError(RuntimeError):
    """A checkpoint could not be written; the ones before it are whole."""


@dataclass(frozen=True)
class _NewestWhole:
    """Keeps the newest n checkpoints that a run can be resumed from (an Orbax preservation policy)."""

    n: int

    def should_preserve(
        self,
        checkpoints: Sequence[policies.PolicyCheckpointInfo],
        *,
        context: policies.PreservationContext,
    ) -> Sequence[bool]:
        whole = [info.step for info in checkpoints if ALONE not in (info.metrics or {})]
        return [info.step in whole[-self.n :] for info in checkpoints]


class Checkpoints:
    """The checkpoints of one run folder: the newest `keep`, and the best (`Train.best_by`).

    A best one may hold parameters alone (`Train.best_holds`): nothing is resumed from it.
    """

    def __init__(self, folder: Path, *, keep: int = 2, read_only: bool = False) -> None:
        self.folder = Path(folder).absolute() / "checkpoints"
        _one_error()
        _forget_damaged_scores(self.folder)
        newest = _NewestWhole(keep)
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
        step = int(state.step)
        items = {"params": ocp.args.StandardSave(state.params)}
        if whole:
            items |= {"rest": ocp.args.StandardSave(_rest(state)), "host": ocp.args.JsonSave(host)}
        metrics = None if score is None else {"score": score} | ({} if whole else {ALONE: 1.0})
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
        whole = [int(p.name) for p in self.folder.iterdir() if p.name.isdigit() and (p / "rest").exists()]
        last = f"the last whole one is step {max(whole)}" if whole else "there is no whole one yet"
        return SaveError(
            f"a checkpoint could not be written under {self.folder} ({_first(error)}); {last}: "
            "free some space and run the same command again."
        )

    def restore(self, abstract: State) -> tuple[State, dict[str, Any]] | None:
        """The newest whole checkpoint in the layout of `abstract`, or None where there is none.

        A damaged one is moved to `damaged/` beside the checkpoints, with a warning.
        """
        if self.steps() and not self.whole_steps():
            log.warning("%s holds parameters alone and no state to resume from; starting over", self.folder)
        for step in reversed(self.whole_steps()):
            try:
                items = self.manager.restore(
                    step,
                    args=ocp.args.Composite(
                        params=ocp.args.StandardRestore(abstract.params),
                        rest=ocp.args.StandardRestore(_rest(abstract)),
                        host=ocp.args.JsonRestore(),
                    ),
                )
            except _NOT_DAMAGE:
                raise
            except Exception as error:  # whatever a damaged file makes the readers raise
                self._set_aside(step, error)
                continue
            return State(params=items["params"], **items["rest"]), items["host"]
        return None

    def _set_aside(self, step: int, error: Exception) -> None:
        older = [s for s in self.whole_steps() if s < step]
        log.warning(
            "checkpoint %d is damaged (%s: %s); %s",
            step,
            type(error).__name__,
            _first(error),
            f"using step {older[-1]} instead" if older else "there is no older one, starting over",
        )
        target = self.folder.parent / "damaged"
        target.mkdir(exist_ok=True)
        shutil.move(self.folder / str(step), target / f"{step}-{os.getpid()}")
        self.manager.reload()

    def load_params(self, run: Run, mesh: jax.sharding.Mesh, step: int) -> dict:
        """The parameters of one step alone, laid out on the mesh."""
        model = abstract_params(run.model)
        target = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            nnx.to_pure_dict(model),
            param_shardings(model, mesh),
        )
        args = ocp.args.Composite(params=ocp.args.StandardRestore(target))
        return self.manager.restore(step, args=args)["params"]


def _rest(state: State) -> dict[str, Any]:
    """All but the parameters; without an entry for a memory where the model has none."""
    rest = {"step": state.step, "bad_steps": state.bad_steps, "opt": state.opt}
    return rest if state.memory is None else rest | {"memory": state.memory}


def _first(error: Exception) -> str:
    """The first line of what an error says."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _forget_damaged_scores(folder: Path) -> None:
    """Remove scores that cannot be read: no checkpoint beside them could be opened."""
    for path in sorted(folder.glob("*/metrics/metrics")):
        try:
            json.loads(path.read_bytes())
        except ValueError:
            log.warning("%s is damaged and removed: its step no longer counts as the best", path)
            path.unlink()


def load_params(
    folder: str | Path, run: Run, mesh: jax.sharding.Mesh, which: str = "best"
) -> tuple[dict, int]:
    """Parameters of a run, in the training form, on any mesh.

    Args:
      folder: the run's folder.
      run: its config.
      mesh: where to.
      which: `best` (see `Train.best_by`), `newest`, or a step.

    Returns:
      The parameters and their step.

    Raises:
      UserError: there is no such checkpoint, or none is whole.
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
                which.isdigit() and int(which) in steps,
                f"checkpoint {which!r} is not in {str(folder)!r}; it has best, newest, "
                f"{', '.join(map(str, steps))}.",
            )
            steps = [int(which)]
        for step in steps:
            try:
                return checkpoints.load_params(run, mesh, step), step
            except _NOT_DAMAGE:
                raise
            except Exception as error:  # whatever a damaged file makes the readers raise
                log.warning("checkpoint %d is damaged (%s: %s)", step, type(error).__name__, _first(error))
    raise UserError(
        f"no checkpoint in {str(folder)!r} could be read ({', '.join(map(str, steps))} are damaged); "
        "name another one or train it again."
    )
