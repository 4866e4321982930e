"""Traces steps of a run: the hook of the training loop behind `jaxgpt train CONFIG --profile A:B`.

In a run's folder, `profile/steps_A-B/` then holds

    plugins/profile/TIME/   the trace: `tensorboard --logdir` reads it (with the package xprof), and
                            ui.perfetto.dev opens its *.trace.json.gz
    operations.json         every operation of a step, with its time, bytes and FLOPs
    operations.txt          the ten costliest, as they are printed

Of several processes the first one traces its own devices.
"""

from __future__ import annotations

import contextlib
import logging
import re
import shutil
import time
from pathlib import Path
from typing import Any

from jaxgpt.errors import UserError, require, shown

log = logging.getLogger(__name__)

OPTION = "--profile"


def take_steps(args: list[str]) -> tuple[list[str], Profiler | None]:
    """The arguments of a command without `--profile A:B`, and what traces these steps."""
    for i, word in enumerate(args):
        if word == OPTION or word.startswith(f"{OPTION}="):
            value = word[len(OPTION) + 1 :] if "=" in word else "".join(args[i + 1 : i + 2])
            return args[:i] + args[i + (1 if "=" in word else 2) :], Profiler.of(value)
    return args, None


class Profiler:
    """Traces the steps `first` to `last` of a run, counted from 1."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last
        self.folder: Path | None = None
        self._begun: float | None = None

    @classmethod
    def of(cls, value: str) -> Profiler:
        """From `A:B`.

        Raises:
          UserError: it is something else.
        """
        found = re.fullmatch(r"(\d{1,18}):(\d{1,18})", value)
        steps = tuple(map(int, found.groups())) if found else (0, 0)
        if not 1 <= steps[0] <= steps[1]:
            raise UserError(
                f"{OPTION} is {shown(value)}; it must be A:B, the first and the last step to trace with "
                "1 <= A <= B, such as 10:12."
            )
        return cls(*steps)

    @property
    def asked(self) -> str:
        """As on the command line."""
        return f"{OPTION} {self.first}:{self.last}"

    def check(self, steps: int, done: int = 0) -> None:
        """Refuse steps that the run has not, or has done.

        Args:
          steps: of the run.
          done: the last step done so far.
        """
        require(
            self.last <= steps,
            f"{self.asked} ends after the run's last step, {steps}; name steps from 1 to {steps}.",
        )
        rest = f"name steps from {done + 1} to {steps}" if done < steps else "it has done all its steps"
        require(done < self.first, f"{self.asked} begins before the run's next step, {done + 1}; {rest}.")

    def begin(self, run_folder: Path) -> None:
        """Start the trace; nothing may be running on the devices."""
        import jax

        if jax.process_index() == 0:
            self.folder = run_folder / "profile" / f"steps_{self.first}-{self.last}"
            shutil.rmtree(self.folder, ignore_errors=True)  # of an earlier try
            start_trace(self.folder)
            self._begun = time.perf_counter()

    def end(self, compiled: Any) -> list[str]:
        """Stop the trace, save the table; returns its costliest operations as lines of text.

        A table that cannot be made is a warning: it must not stop a training run.

        Args:
          compiled: the training step.
        """
        import jax

        if self._begun is None or self.folder is None:
            return []
        seconds, self._begun = time.perf_counter() - self._begun, None
        jax.profiler.stop_trace()
        try:
            said = self._table(compiled, seconds)
        except Exception as error:
            log.warning("no table of the trace in %s: %s", self.folder, error)
            return []
        return [*said, f"the trace and the table are in {self.folder}"]

    def _table(self, compiled: Any, seconds: float) -> list[str]:
        """Save the table of the trace; returns its first lines."""
        import jax

        from jaxgpt.files import write_json, write_text
        from jaxgpt.profile.table import traced_steps
        from jaxgpt.report.profiled import Profiled, lines

        assert self.folder is not None
        found = traced_steps(self.folder, compiled.as_text() or "", seconds, self.last - self.first + 1)
        record: Profiled = {
            "first": self.first,
            "last": self.last,
            "device": jax.local_devices()[0].device_kind,
            "devices": found.devices,
            "seconds": found.seconds,
            "idle": found.idle,
            "others": found.others,
            "operations": found.operations,
        }
        said = lines(record)
        write_json(self.folder / "operations.json", record)
        write_text(self.folder / "operations.txt", "\n".join(said) + "\n")
        return said

    def close(self) -> None:
        """Stop a trace that is running, where training has ended between the two steps."""
        import jax

        if self._begun is not None:
            self._begun = None
            with contextlib.suppress(RuntimeError):
                jax.profiler.stop_trace()
            log.warning("training ended before step %d: the trace in %s has no table", self.last, self.folder)
        elif self.folder is None and jax.process_index() == 0:
            log.warning("training ended before step %d: nothing was traced", self.first)


def start_trace(folder: Path) -> None:
    """Trace what the devices do, and the host but not each call of Python, which would slow it down."""
    import jax

    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    jax.profiler.start_trace(folder, profiler_options=options)
