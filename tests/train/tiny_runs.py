"""Tiny runs as commands: their configs, in this process or in one of their own, and what they leave.

A run of its own process can be ended at an exact moment without a clock: its config is a Python
file that sends the process a signal when the moment named by FAULT has come.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import pytest
from tiny import FLOAT32, mesh

import jaxgpt
from jaxgpt.checkpoint import Checkpoints
from jaxgpt.config import GPT, CausalLM, Chat, Mesh, Optim, Run, Text, Train, load, to_json
from jaxgpt.files import write_json, write_text
from jaxgpt.train.state import State, make_program

STEPS = 12
MODEL = GPT(vocab_size=264, context=32, layers=2, width=32, heads=4)
OPTIM = Optim(peak_lr=3e-3, final_lr=3e-4, warmup_steps=3)
TRAIN = Train(steps=STEPS, batch_size=8, log_every=1, eval_every=4, save_every=3)
COMPUTE = replace(FLOAT32, unroll=1)  # compiles in half the time
FSDP = Mesh(data=1, fsdp=8)

FAULTY = '''"""The run {run}; FAULT is `EVENT|TEXT|WHAT`: at that audit event the signal WHAT is sent,
or no file can grow beyond 30 kB any more (FULL), as on a disk that is nearly full.

`record` is an event of ours: a line of metrics.jsonl was written.
"""

import os
import resource
import signal
import sys

from jaxgpt.config import load
from jaxgpt.train import signals
from jaxgpt.train.metrics import Metrics

plain = Metrics.write


def write(self, step, record):
    plain(self, step, record)
    sys.audit("record", f"step {{step}} {{' '.join(record)}}")


def strike(happened, args):
    if happened != event or not any(text in str(a) for a in args):
        return
    if name == "FULL":
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
    else:
        os.kill(os.getpid(), signal.Signals[name])


def config():
    if os.environ.get("FAULT"):
        global event, text, name
        event, text, name = os.environ["FAULT"].split("|")
        Metrics.write, signals.ONE_PRESS = write, 0.0
        sys.addaudithook(strike)
    return load({run!r})
'''


def text_run(corpus: Path, runs: Path, name: str = "text", **parts: Any) -> Run:
    """Pretraining; parts replace those of the run."""
    given = {"model": MODEL, "optim": OPTIM, "train": TRAIN, "compute": COMPUTE, "mesh": FSDP}
    return Run(name=name, data=Text(path=str(corpus)), runs=str(runs), **(given | parts))


def chat_run(dialogues: Path, tokenizer: Path, runs: Path, **parts: Any) -> Run:
    """Instruction tuning with dropout and two microbatches a step."""
    given = {
        "model": GPT(vocab_size=264, context=48, layers=2, width=32, heads=4, dropout=0.1),
        "optim": OPTIM,
        "train": Train(steps=STEPS, batch_size=16, accumulate=2, log_every=1, eval_every=4, save_every=3),
        "objective": CausalLM(z_loss=1e-4),
        "compute": COMPUTE,
        "mesh": FSDP,
    }
    data = Chat(train=(str(dialogues),), tokenizer=str(tokenizer))
    return Run(name="chat", data=data, runs=str(runs), **(given | parts))


def write_config(run: Run, folder: Path) -> Path:
    """A config file of the run that can end its process; see `FAULTY`."""
    write_json(folder / f"{run.name}.json", to_json(run))
    path = folder / f"{run.name}.py"
    write_text(path, FAULTY.format(run=str(folder / f"{run.name}.json")))
    return path


def command(config: Path, *args: str, devices: int = 8, fault: str = "") -> subprocess.CompletedProcess:
    """`jaxgpt train CONFIG ARGS` in a process of its own."""
    process = start("train", str(config), *args, devices=devices, fault=fault)
    out, err = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def start(
    *words: str, devices: int, fault: str = "", env: Mapping[str, str] | None = None
) -> subprocess.Popen:
    """`jaxgpt WORDS`, begun in a process of its own."""
    own = {
        "PYTHONPATH": str(Path(jaxgpt.__file__).parents[1]),
        "JAX_NUM_CPU_DEVICES": str(devices),
        "FAULT": fault,
        "PYTHONDONTWRITEBYTECODE": "",
        "COLUMNS": "500",  # log lines are not wrapped
    }
    if kept := jax.config.jax_compilation_cache_dir:  # what one of them compiles, the others need not
        own |= {"JAX_COMPILATION_CACHE_DIR": str(kept), "PYTHONPYCACHEPREFIX": f"{kept}/bytecode"}
    line = [sys.executable, "-m", "jaxgpt.cli", *words]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(line, env=os.environ | own | dict(env or {}), text=True, **pipes)


def start_cluster(
    *words: str, count: int = 2, faults: Mapping[int, str] | None = None, last: Sequence[str] = ()
) -> list[subprocess.Popen]:
    """A command in several processes of one device each, connected over loopback.

    Args:
      words: of the command.
      count: how many.
      faults: by process; see `FAULTY`.
      last: more words, for the last process alone.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    numbers = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)}
    return [
        start(
            *words,
            *(last if i == count - 1 else ()),
            devices=1,
            fault=(faults or {}).get(i, ""),
            env=numbers | {"JAX_PROCESS_ID": str(i)},
        )
        for i in range(count)
    ]


def ends(processes: Iterable[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """(exit code, output, errors) of each process, when all have ended."""
    said = [process.communicate() for process in processes]
    return [(process.returncode, *texts) for process, texts in zip(processes, said, strict=True)]


def strict(line: str) -> dict[str, Any]:
    """A line of JSON in which NaN and Infinity are errors."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON: {line}")

    return json.loads(line, parse_constant=refuse)


def records(folder: Path, field: str = "loss") -> list[dict[str, Any]]:
    """The records of a run that hold this field."""
    lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
    return [record for record in map(strict, lines) if field in record]


def curve(folder: Path) -> list[tuple[int, str, Any]]:
    """What a run measured, without what the clock did: (step, name, value) of all records in order."""
    names = ("loss", "bits_per_byte", "accuracy", "grad_norm", "learning_rate", "skipped")
    names += tuple(f"val_{name}" for name in names)
    return [(r["step"], name, r[name]) for r in records(folder, "step") for name in names if name in r]


def restore(folder: Path, sizes: dict[str, int] | None = None) -> tuple[State, dict[str, Any]]:
    """The newest checkpoint of a run, on a mesh of these sizes or its own."""
    run = load(folder)
    program = make_program(run, mesh(sizes or run.mesh.resolve(8)))
    checkpoints = Checkpoints(folder, keep=run.train.keep)
    found = checkpoints.restore(program.abstract)
    checkpoints.close()
    assert found is not None
    return found


def saved(folder: Path) -> list[int]:
    """The steps whose checkpoints are on disk."""
    return sorted(int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit())


def copy(folder: Path, runs: Path) -> Path:
    """A copy of a run's folder, for a test to damage."""
    return shutil.copytree(folder, runs / folder.name)


def tree(folder: Path) -> dict[str, bytes]:
    """All files of a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int, number: int) -> None:
    """Send this process a signal when the numbers of a step are on record."""
    from jaxgpt.train.metrics import Metrics

    plain = Metrics.write

    def write(self: Metrics, at: int, record: dict[str, Any]) -> None:
        plain(self, at, record)
        if at == step and "loss" in record:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Metrics, "write", write)
