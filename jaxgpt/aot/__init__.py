"""Any program of a run compiled for hardware that is not here: whether it fits, what it computes and moves.

    report, = compile_for(run, "v5p:4x4x4", ["train"])
    report = compile_for(run, "h100:2x8", ["decode"], Decoding(rows=64, prompt=1024, slots=8192))[0]

XLA's compilers need no device, only its description: libtpu knows TPU slices by name, the GPU compiler
takes the facts of a GPU as text. They are compiled in a process of their own, `python -m jaxgpt.aot`,
since the variables that say which TPU it is are read once, before jax is imported.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import logging
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx

from jaxgpt.aot import hlo
from jaxgpt.aot.topology import Topology
from jaxgpt.config import GPT, ROW_AXES, Run, to_json
from jaxgpt.errors import UserError, require, require_known
from jaxgpt.files import check_json, parse_json
from jaxgpt.models import abstract_params
from jaxgpt.sharding import TABLE

log = logging.getLogger(__name__)

PROGRAMS = ("train", "eval", "prefill", "decode")


@dataclass(frozen=True)
class Decoding:
    """The sizes of a call of the sampler: rows, tokens of the longest prompt, slots of the cache."""

    rows: int = 8
    prompt: int = 1024
    slots: int = 2048


@dataclass(frozen=True)
class Report:
    """What a program needs of each device; bytes and FLOPs are of one device and one run.

    Attributes:
      program: of `PROGRAMS`.
      where: the topology.
      device: its devices' kind.
      mesh: sizes of the axes.
      fits: the compiler found room for it; where it did not, all but `needed` is empty.
      needed: bytes of memory: arguments, results that take no argument's place, temporaries, code.
      memory: its parts.
      model_flops: `models.flops_per_token` (a third of it for evaluation); 0 for the sampler's programs.
      product_flops, kernel_flops, kernels, uncounted, collectives, unknown_loops: see `hlo.Program`.
      largest: arrays, what makes each, their number.
      squares: arrays with two axes of the run's (the prompt's) length, as attention's scores have.
      seconds: of tracing, lowering and compiling.
    """

    program: str
    where: str
    device: str
    mesh: dict[str, int]
    fits: bool
    needed: float
    memory: dict[str, float] = dataclasses.field(default_factory=dict)
    model_flops: float = 0.0
    product_flops: float = 0.0
    kernel_flops: float = 0.0
    kernels: dict[str, int] = dataclasses.field(default_factory=dict)
    uncounted: tuple[str, ...] = ()
    collectives: tuple[hlo.Collective, ...] = ()
    unknown_loops: int = 0
    largest: tuple[tuple[str, str, int], ...] = ()
    squares: tuple[str, ...] = ()
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def flops_ratio(self) -> float:
        """FLOPs over those of the model: what remat, padding and dense experts cost."""
        return (self.product_flops + self.kernel_flops) / self.model_flops if self.model_flops else math.nan

    @property
    def sent(self) -> float:
        """Bytes that each device sends to others."""
        return sum(one.sent * one.runs for one in self.collectives)

    @property
    def moved(self) -> float:
        """Bytes of the arrays that are gathered, scattered or summed, each once."""
        return sum(one.size * one.runs for one in self.collectives)

    @classmethod
    def of(cls, record: dict[str, Any]) -> Report:
        """From its JSON."""
        return check_json(record, cls, "a report", "compile the program again")


@dataclass(frozen=True)
class Request:
    """What the other process is asked for: see `compile_for`."""

    run: dict[str, Any]
    where: str
    programs: tuple[str, ...]
    decoding: Decoding
    keep: str


@dataclass(frozen=True)
class Answer:
    """What it says: a sentence for the user, or the reports."""

    mistake: str = ""
    reports: list[dict[str, Any]] = dataclasses.field(default_factory=list)


def compile_for(
    run: Run,
    where: str,
    programs: Sequence[str] = ("train",),
    decoding: Decoding | None = None,
    *,
    keep: str | Path = "",
) -> list[Report]:
    """Compile programs of a run for devices that are not here, in a process of its own.

    Args:
      run: the config; its mesh must fit the topology.
      where: see `Topology`.
      programs: of `PROGRAMS`.
      decoding: sizes for `prefill` and `decode`.
      keep: a folder into which the text of each compiled program is written, `PROGRAM.hlo`.

    Raises:
      UserError: no such topology or program, the run's mesh does not fit it, or its compiler is not
        installed.
      RuntimeError: the compiler failed for another reason than memory; with its last words.
    """
    for program in programs:
        require_known(program, PROGRAMS, f"program {program!r} is not known")
    topology = Topology(where)
    _require_compiler(topology)
    folder = str(keep and Path(keep).absolute())
    request = Request(to_json(run), where, tuple(programs), decoding or Decoding(), folder)
    # What a test or a user set for programs that run here must not change those compiled for there.
    dropped = ("JAX_DISABLE_MOST_OPTIMIZATIONS", "JAX_NUM_CPU_DEVICES", "XLA_FLAGS")
    environment = {k: v for k, v in os.environ.items() if k not in dropped} | topology.environment
    environment |= {
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }
    with _alone(topology):
        done = subprocess.run(
            [sys.executable, "-m", "jaxgpt.aot"],
            input=json.dumps(dataclasses.asdict(request)),
            capture_output=True,
            text=True,
            env=environment,
        )
    last = done.stdout.splitlines()[-1:]  # a compiler may have said something before
    if done.returncode or not last:
        words = "\n".join(done.stderr.splitlines()[-25:])
        raise RuntimeError(f"compiling {run.name} for {where} ended with code {done.returncode}:\n{words}")
    answer = parse_json(last[0], Answer, "the compiler's answer", "try again with JAXGPT_LOG=DEBUG")
    require(not answer.mistake, answer.mistake)
    return [Report.of(record) for record in answer.reports]


def step_traffic(run: Run, axes: Mapping[str, int]) -> float:
    """Bytes that each device must send in a training step of a dense decoder: the least to aim at.

    Over `fsdp` each matrix of a layer is gathered twice in the compute type (forward, and backward or
    recomputed) and its float32 gradient scattered once, in each microbatch; embedding and output
    projection are gathered once, since the loss makes its gradient beside its value. The embedding's
    gradient may travel as that of its tokens where they are fewer than its rows. Over `data`
    gradients are summed once. Over `tensor` the residual stream is summed twice a layer forward, twice
    backward and once where layers are recomputed (the last sum of a layer is not needed again), once
    for the embedding and once for the loss. Norms and biases are summed whole. Sums of numbers a row
    or a token, as the loss has, are left out.

    Args:
      run: the config.
      axes: sizes of the mesh's axes.

    Raises:
      UserError: the model is no dense GPT.
    """
    dense = run.model
    if not isinstance(dense, GPT) or dense.moe:
        raise UserError("step_traffic knows dense GPTs alone; give it a run with such a model.")
    model = abstract_params(run.model)
    width = jnp.dtype(run.compute.dtype).itemsize
    share = {axis: (n - 1) / n for axis, n in axes.items()}
    tokens = run.train.batch_size * run.length / math.prod(axes[axis] for axis in ROW_AXES)
    sent = 0.0
    for path, variable in nnx.to_flat_state(model):
        names = {axis for name in variable.get_metadata()["axes"] for axis in TABLE[name]}
        others = math.prod(axes[axis] for axis in names - {"fsdp"})
        held = math.prod(variable.shape) / others  # by all devices of an fsdp group
        if "fsdp" in names:
            moved = held * ((2 if "blocks" in path else 1) * width + 4)
            if "embed" in path:
                kept = min(1.0, tokens / run.train.accumulate * others / variable.shape[0])
                moved = held * (width + 4 * kept) + (held * (width + 4) if dense.tied else 0)
            sent += run.train.accumulate * share["fsdp"] * moved
            sent += 2 * share["data"] * 4 * held / axes["fsdp"]
        else:
            rows = axes["data"] * axes["fsdp"]
            sent += 2 * (rows - 1) / rows * 4 * held
    sums = (5 if run.compute.remat == "full" else 4) * run.model.layers + 2
    return sent + 2 * share["tensor"] * sums * tokens * run.model.width * width


def installed(platform: str) -> bool:
    """Whether the compiler for `tpu` or `cuda` is there."""
    module = {"tpu": "libtpu", "cuda": "jax_plugins.xla_cuda13"}[platform]
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even jax_plugins
        return False


def _require_compiler(topology: Topology) -> None:
    extra = {"tpu": "tpu", "cuda": "cuda"}[topology.chip.platform]
    require(
        installed(topology.chip.platform),
        f"topology {topology.name!r} needs XLA's compiler for {extra}, which is not installed; "
        f"pip install 'jaxgpt[{extra}]' (no device is needed).",
    )


@contextlib.contextmanager
def _alone(topology: Topology) -> Iterator[None]:
    """Wait until no other process of jaxgpt compiles for TPU: libtpu serves one process of a machine."""
    if topology.chip.platform != "tpu":
        yield
        return
    import fcntl  # of Unix alone, as libtpu is

    # A user's own: another user's file could not be opened.
    path = Path(tempfile.gettempdir()) / f"jaxgpt_libtpu_{os.getuid()}.lock"
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.warning("another process compiles for TPU (it holds %s); waiting for its end", path)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
