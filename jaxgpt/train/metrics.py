"""Where numbers go: a progress line, `metrics.jsonl`, trackers; and how fast the hardware could be."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import TextIO

import jax
import jax.numpy as jnp
import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jaxgpt.config import Run
from jaxgpt.errors import UserError
from jaxgpt.files import Count, finite, parse_json, to_json, write_text
from jaxgpt.report import run_report
from jaxgpt.train.trackers import Tracker, start_trackers

log = logging.getLogger(__name__)

PEAK_FLOPS = {
    # dense bfloat16 FLOP/s of one chip, from the makers' data sheets; matched within device_kind
    "GB200": 2500e12,
    "B200": 2250e12,
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "V100": 125e12,
    "TPU v7": 2307e12,
    "TPU v6 lite": 918e12,
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v4": 275e12,
    "TPU v3": 123e12,
}


def peak_flops(device: jax.Device, dtype: str) -> float:
    """FLOP/s that one device can do: from the table, or measured once with a matrix product.

    Half the table's figure is used for float32 on accelerators (TF32 on NVIDIA).
    """
    for kind, flops in PEAK_FLOPS.items():
        if kind in device.device_kind:
            return flops if dtype == "bfloat16" else flops / 2
    return _measured_peak(dtype) / (jax.local_device_count() if device.platform == "cpu" else 1)


def _measured_peak(dtype: str, size: int = 1024, tries: int = 5) -> float:
    a = jax.device_put(jnp.ones((size, size), dtype), jax.local_devices()[0])
    product = jax.jit(jnp.matmul)
    product(a, a).block_until_ready()
    best = float("inf")
    for _ in range(tries):
        start = time.perf_counter()
        product(a, a).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


SHORTEST = 1e-9
"""Seconds that a record is taken to be about at least: the clock may not have moved."""


_KNOWN = ("loss", "nll", "accuracy", "weight", "bytes", "grad_norm", "bad_steps")
"""Figures of a step that a record holds in a place or form of their own, or not at all."""


class Meter:
    """Speed between two records: step time, tokens/s, MFU and the share spent waiting for data.

    Args:
      tokens: tokens per step over all devices.
      flops: model FLOPs per token, forward and backward.
      peak: FLOP/s of all devices together.
    """

    def __init__(self, tokens: int, flops: float, peak: float) -> None:
        self.tokens, self.flops, self.peak = tokens, flops, peak
        self.start(0)

    def start(self, step: int, now: float | None = None) -> None:
        """Begin to measure after this step, which was done `now`."""
        self.step, self.wait, self.last = step, 0.0, now or time.perf_counter()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside as waiting for data."""
        start = time.perf_counter()
        yield
        self.wait += time.perf_counter() - start

    def record(self, step: int, values: dict[str, float], now: float) -> dict[str, float]:
        """The numbers of one log record, whose step was done at the time `now`; measuring begins anew."""
        seconds = max(now - self.last, SHORTEST) / max(1, step - self.step)
        wait = self.wait / max(1, step - self.step)
        self.start(step, now)
        bits = values["nll"] * values["weight"] / math.log(2)
        return {
            "loss": values["loss"],
            # Labels and hidden tokens stand for no running text.
            **({"bits_per_byte": bits / values["bytes"]} if values["bytes"] else {}),
            **({"accuracy": values["accuracy"]} if "accuracy" in values else {}),
            "grad_norm": values["grad_norm"],
            "step_seconds": seconds,
            "tokens_per_second": self.tokens / seconds,
            "mfu": self.tokens * self.flops / seconds / self.peak,
            "data_wait": wait / seconds,
            **{name: value for name, value in values.items() if name not in _KNOWN},
        }


class Metrics:
    """The sinks of a run's numbers; only the first process of a cluster writes.

    Args:
      run: the config.
      steps: length of the run.
      start: first step of this process; records after it, of a run that was cut off, are dropped.
      progress: show a progress line on standard error.
    """

    def __init__(self, run: Run, steps: int, start: int, *, progress: bool = True) -> None:
        self.folder, self.steps, self.writes = run.folder, steps, jax.process_index() == 0
        path = self.folder / "metrics.jsonl"
        self.file: TextIO | None = None
        self.trackers: list[Tracker] = []
        if self.writes:
            self.trackers = start_trackers(run, start)
            drop_after(path, start)
            self.file = path.open("a", encoding="utf-8")
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=10),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[line]}"),
            console=Console(stderr=True),
            disable=not (self.writes and progress),
            refresh_per_second=4,
        )
        self.task = self.bar.add_task(run.name, total=steps, completed=start, line="compiling")
        self.bar.start()
        self.begin(start)

    def begin(self, step: int) -> None:
        """Count the time from here on: what is left is as long in proportion, evaluations included."""
        self.begun = (step, time.perf_counter())

    def note(self, line: str, done: int | None = None) -> None:
        """Change the words of the progress line; a log file gets a line of its own, with the time left."""
        self.bar.update(self.task, line=line, completed=done)
        if done is not None and not self.bar.disable and not self.bar.console.is_terminal:
            step, since = self.begun
            seconds = (time.perf_counter() - since) / max(1, done - step) * (self.steps - done)
            self.print(f"step {done} of {self.steps}: {line}, {timedelta(seconds=round(seconds))} left")

    def print(self, line: str) -> None:
        """A line that stays, above the progress line."""
        self.bar.console.print(line, highlight=False, soft_wrap=True)

    def write(self, step: int, record: Mapping[str, float | int | str]) -> None:
        """One record of `metrics.jsonl`, and its numbers to the trackers."""
        if self.file is None:
            return
        shown = finite(dict(record))
        try:
            self.file.write(to_json({"step": step, **shown}) + "\n")
            self.file.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, self.file.name) from None
        numbers = {name: value for name, value in shown.items() if isinstance(value, int | float)}
        for tracker in self.trackers if numbers else ():
            tracker.write(step, numbers)

    def draw(self) -> None:
        """Bring `report.html` up to date."""
        if self.writes:
            run_report(self.folder)

    def close(self) -> None:
        """Flush, draw and stop."""
        self.bar.stop()
        if self.file is not None:
            with contextlib.suppress(OSError):  # what could not be written was said when it was
                self.file.close()
        for tracker in self.trackers:
            tracker.close()
        self.draw()


class _Record(msgspec.Struct):
    """What matters of a record here."""

    step: Count
    event: str = ""


def drop_after(path: Path, step: int) -> None:
    """Remove the records of what will be done again, and a last line that was cut off."""
    if not path.exists():
        return
    kept, damaged = [], 0
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        try:
            record = parse_json(line, _Record, f"{path}, line {number}", "it is left out")
        except UserError:
            damaged += bool(line.strip())
            continue
        if record.step < step or (record.step == step and record.event != "compiled"):
            kept.append(line.decode() + "\n")
    if damaged > 1:  # one may be the last, cut off with the process
        log.warning("%s: %d lines are damaged and left out", path, damaged)
    write_text(path, "".join(kept))
