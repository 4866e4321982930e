"""Other programs that show a run's numbers: a table from the name in `train.track` to what writes to it."""

from __future__ import annotations

import importlib.util
import logging
import os
import secrets
import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from jaxgpt.config import Run, code, to_json
from jaxgpt.errors import UserError, require
from jaxgpt.files import write_text

log = logging.getLogger(__name__)


class Tracker(Protocol):
    """Where numbers go beside `metrics.jsonl`."""

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """The numbers of a record."""

    def close(self) -> None:
        """Write what is left and free the threads."""


class TensorBoard:
    """Event files in the run's folder `tensorboard`; those of steps that are done again are purged."""

    def __init__(self, run: Run, start: int) -> None:
        from tensorboardX import SummaryWriter

        self.run = run
        before = set(threading.enumerate())
        self.board: Any = SummaryWriter(str(run.folder / "tensorboard"), purge_step=start + 1)
        self.writers = set(threading.enumerate()) - before
        _end_quietly(self.writers)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        if self.board is not None and not all(thread.is_alive() for thread in self.writers):
            log.warning("TensorBoard events cannot be written to %s any more", self.run.folder)
            self.board = None  # adding to them would wait for ever
        if self.board is not None:
            for name, value in numbers.items():
                self.board.add_scalar(name, value, step)

    def close(self) -> None:
        if self.board is not None:
            self.board.close()


def _end_quietly(threads: set[threading.Thread]) -> None:
    """Threads that end with an error, as on a full disk, print no trace: it is said when it is noticed."""
    others = threading.excepthook

    def hook(error: Any) -> None:
        if error.thread not in threads:
            others(error)

    threading.excepthook = hook


class Wandb:
    """A run of Weights & Biases, whose files are in the run's folder `wandb`.

    Its id is kept there, so that a resumed run goes on in the same one, wherever its folder was moved. The
    x axis of every chart is a column `step` of ours: their own step counter would drop, with a warning, the
    records of steps that are done again. WANDB_PROJECT, WANDB_ENTITY and WANDB_MODE work as documented there.
    """

    def __init__(self, run: Run, start: int) -> None:
        import wandb

        self.run = run
        path = run.folder / "wandb" / "id"
        if not path.exists():
            write_text(path, secrets.token_hex(4))
        try:
            self.wandb: Any = wandb.init(  # None when it has failed later
                project=os.environ.get("WANDB_PROJECT", "jaxgpt"),
                name=run.name,
                id=path.read_text("utf-8").strip(),
                resume="allow",
                dir=str(run.folder),
                config=code.portable(to_json(run)),
                allow_val_change=True,
                settings=wandb.Settings(
                    silent=True, console="off", disable_git=True, disable_code=True, save_code=False
                ),
            )
        except wandb.Error as error:
            why = " ".join(str(error).split())
            raise UserError(
                f"wandb cannot start ({why:.200}); log in with `wandb login`, set WANDB_MODE=offline (then "
                "`wandb sync`), or leave 'wandb' out of train.track."
            ) from None
        self.wandb.define_metric("step", hidden=True)
        self.wandb.define_metric("*", step_metric="step")

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        self._call("log", {"step": step, **numbers})

    def close(self) -> None:
        self._call("finish")

    def _call(self, name: str, *args: Any) -> None:
        try:
            if self.wandb is not None:
                getattr(self.wandb, name)(*args)
        except Exception as error:  # of a process of its own that has ended: training goes on
            log.warning("wandb gets no more numbers (%s); %s has them all", error, self.run.folder)
            self.wandb = None


class Kind(NamedTuple):
    """A tracker and the package that it needs."""

    package: str
    make: Callable[[Run, int], Tracker]


TRACKERS = {"tensorboard": Kind("tensorboardX", TensorBoard), "wandb": Kind("wandb", Wandb)}
"""Every name that `train.track` takes."""


def chosen(run: Run) -> tuple[str, ...]:
    """The trackers of a run: those that it names, else TensorBoard where that is installed.

    Raises:
      UserError: one that it names is not installed.
    """
    if run.train.track is None:
        return ("tensorboard",) if _installed("tensorboard") else ()
    for name in run.train.track:
        require(
            _installed(name),
            f"train.track names {name!r}, but {TRACKERS[name].package} is not installed; "
            f"pip install 'jaxgpt[track]', or leave it out.",
        )
    return run.train.track


def _installed(name: str) -> bool:
    return importlib.util.find_spec(TRACKERS[name].package) is not None


def start_trackers(run: Run, start: int) -> list[Tracker]:
    """The trackers of a run that goes on after the step `start`.

    Raises:
      UserError: one cannot start.
    """
    started: list[Tracker] = []
    if run.train.track is None and not chosen(run):
        log.info("no TensorBoard events: pip install 'jaxgpt[track]' to have them")
    try:
        for name in chosen(run):
            started.append(TRACKERS[name].make(run, start))
    except BaseException:
        for tracker in started:
            tracker.close()
        raise
    return started
