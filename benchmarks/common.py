"""Shared code of the benchmarks: alternating runs, medians, machine and versions, JSON and a table.

Each benchmark compares this code base with PyTorch, which is installed in another environment
(`--torch-python`). The PyTorch side is a worker process that runs one round per line it receives. Rounds
alternate and never overlap, so a change of the machine's speed affects both sides.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Round = Callable[[], float]
"""Runs once and returns the figure of that run."""


class TorchWorker:
    """A Python process of the other environment: one round per line.

    Args:
      python: its interpreter.
      source: a program that defines `ready() -> dict` (versions) and `round() -> float`.
    """

    LOOP = (
        "\nimport json, sys\n"
        "print(json.dumps(ready()), flush=True)\n"
        "for _ in sys.stdin: print(json.dumps(round()), flush=True)\n"
    )

    def __init__(self, python: str, source: str) -> None:
        # -c and another working directory: nothing of this repository is on its path.
        self.process = subprocess.Popen(
            [python, "-c", source + self.LOOP],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd="/",
        )
        self.versions: dict[str, str] = self._read()

    def _read(self) -> Any:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(("{", "[")) or line[:1].isdigit():
                return json.loads(line)
        raise RuntimeError("the PyTorch process ended early; its error is printed above")

    def round(self) -> float:
        """Run one round in the worker."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def alternate(ours: Round, theirs: Round, rounds: int) -> tuple[list[float], list[float]]:
    """Figures of `rounds` alternating rounds of each side, after one uncounted round of each."""
    figures: tuple[list[float], list[float]] = ([], [])
    for i in range(rounds + 1):
        for side, run in zip(figures, (ours, theirs), strict=True):
            figure = run()
            if i:
                side.append(figure)
    return figures


def row(name: str, unit: str, ours: list[float], theirs: list[float], **more: Any) -> dict[str, Any]:
    """A result: medians, their ratio and all figures."""
    a, b = statistics.median(ours), statistics.median(theirs)
    figures = {"all_ours": [round(x, 2) for x in ours], "all_torch": [round(x, 2) for x in theirs]}
    return {"name": name, "unit": unit, "ours": a, "torch": b, "ratio": a / b, **figures, **more}


def machine() -> dict[str, Any]:
    """The machine and versions with which the figures were measured."""
    names = ("jax", "jaxlib", "flax", "optax")
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "load": [round(x, 2) for x in os.getloadavg()],
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in names},
    }


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    return next((s.split(":")[1].strip() for s in lines if s.startswith("model name")), platform.machine())


def report(rows: list[dict[str, Any]], about: dict[str, Any], out: str | None) -> None:
    """Print a table and the command, and append both to `out` as one JSON line."""
    record = {"command": " ".join(sys.argv), **about, "rows": rows}
    print(f"\n`{record['command']}`  load at the start {about['load']}\n")
    print("| what | unit | ours | PyTorch | ratio |\n| --- | --- | ---: | ---: | ---: |")
    for r in rows:
        print(f"| {r['name']} | {r['unit']} | {r['ours']:.1f} | {r['torch']:.1f} | {r['ratio']:.2f} |")
    if out:
        with Path(out).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
