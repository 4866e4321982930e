"""Compiles any program of a run for absent hardware: whether it fits, and what it computes and communicates.

    report, = compile_for(run, "v5p:4x4x4", ["train"])
    report = compile_for(run, "h100:2x8", ["decode"], Decoding(rows=64, prompt=1024, slots=8192))[0]

XLA's compilers need no device, only its description: libtpu knows TPU slices by name, and the GPU compiler
takes a GPU's properties as text. Programs are compiled in a separate process, `python -m jaxgpt.aot`, because
the environment variables that select the TPU are read only once, before jax is imported.
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
from jaxgpt.config import GPT, ROW_AXES, Run, code, to_json
from jaxgpt.errors import UserError, require, require_known
from jaxgpt.files import check_json, parse_json
from jaxgpt.models import abstract_params
from jaxgpt.sharding import TABLE

log = logging.getLogger(__name__)

PROGRAMS = ("train", "eval", "prefill", "decode", "beams", "rollout", "chunk", "step", "checksum")
"""`chunk` and `step` are those of the serving engine; `beams` is a whole beam search with four beams for each
row; `rollout` is prefill and the whole loop of decoding from the parameters of training, as GRPO calls it."""


@dataclass(frozen=True)
class Decoding:
    """The sizes of a sampler call: rows, tokens of the longest prompt, slots of the cache."""

    rows: int = 8
    prompt: int = 1024
    slots: int = 2048
    page: int = 16
    """Tokens of a page of the serving engine's cache, of which there are enough for all slots."""


@dataclass(frozen=True)
class Report:
    """What a program needs; bytes and FLOPs are per device and execution.

    Attributes:
      program: a name in `PROGRAMS`.
      where: the topology.
      device: the kind of its devices.
      mesh: sizes of the axes.
      fits: whether the program fits in memory; if not, the fields after `needed` may be empty.
      needed: bytes of memory: arguments, results that do not reuse an argument's memory, temporaries, code.
      memory: the parts of `needed`.
      model_flops: from `models.flops_per_token` (a third of it for evaluation); 0 for the sampler's programs.
      product_flops, kernel_flops, kernels, uncounted, collectives, unknown_loops: see `hlo.Program`.
      largest: the largest arrays, with the operation that makes each and their number.
      squares: arrays with two axes of the run's (or the prompt's) length, like attention scores.
      seconds: time of tracing, lowering and compiling.
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
        """FLOPs divided by the model's own: the cost of remat, padding and dense experts."""
        return (self.product_flops + self.kernel_flops) / self.model_flops if self.model_flops else math.nan

    @property
    def sent(self) -> float:
        """Bytes that each device sends to others."""
        return sum(one.sent * one.runs for one in self.collectives)

    @property
    def moved(self) -> float:
        """Bytes of the arrays that are gathered, scattered or summed, counted once per execution."""
        return sum(one.size * one.runs for one in self.collectives)

    @classmethod
    def of(cls, record: dict[str, Any]) -> Report:
        """Read a report from its JSON record."""
        return check_json(record, cls, "a report", "compile the program again")


@dataclass(frozen=True)
class Request:
    """The request to the other process; see `compile_for`."""

    run: dict[str, Any]
    where: str
    programs: tuple[str, ...]
    decoding: Decoding
    keep: str


@dataclass(frozen=True)
class Answer:
    """Its answer: an error message for the user, or the reports."""

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
    """Compile programs of a run for absent devices, in a separate process.

    Args:
      run: the config; its mesh must fit the topology.
      where: see `Topology`.
      programs: names in `PROGRAMS`.
      decoding: sizes for `prefill`, `decode` and `beams`, and for `rollout` of runs other than GRPO's.
      keep: folder in which to save the text of each compiled program, as `PROGRAM.hlo`.

    Raises:
      UserError: the topology or program is unknown, the run's mesh does not fit the topology, or its compiler
        is not installed.
      RuntimeError: the compiler failed for a reason other than memory; contains the end of its output.
    """
    for program in programs:
        require_known(program, PROGRAMS, f"program {program!r} is not known")
    topology = Topology(where)
    _require_compiler(topology)
    folder = str(keep and Path(keep).absolute())
    request = Request(to_json(run), where, tuple(programs), decoding or Decoding(), folder)
    # Settings for programs that run on this machine must not change those compiled for another one.
    dropped = ("JAX_DISABLE_MOST_OPTIMIZATIONS", "JAX_NUM_CPU_DEVICES", "XLA_FLAGS")
    environment = {k: v for k, v in os.environ.items() if k not in dropped} | topology.environment
    environment[code.TRUST] = "1"  # this process has run it already
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
    last = done.stdout.splitlines()[-1:]  # a compiler may have printed something before
    if done.returncode or not last:
        words = "\n".join(done.stderr.splitlines()[-25:])
        raise RuntimeError(f"compiling {run.name} for {where} ended with code {done.returncode}:\n{words}")
    answer = parse_json(last[0], Answer, "the compiler's answer", "try again with JAXGPT_LOG=DEBUG")
    require(not answer.mistake, answer.mistake)
    return [Report.of(record) for record in answer.reports]


def step_traffic(run: Run, axes: Mapping[str, int]) -> float:
    """Lower bound on the bytes that each device sends in a training step of a dense decoder.

    Over `fsdp`, each microbatch gathers every matrix of a layer twice in the compute type (forward, and
    backward or recomputed) and scatters its float32 gradient once. Embedding and output projection are
    gathered once, because the loss computes its gradient along with its value. The embedding's gradient may
    be sent as that of its tokens if they are fewer than its rows. Over `data`, gradients are summed once.
    Over `tensor`, the residual stream is summed per layer twice forward, twice backward, and once if layers
    are recomputed (the last sum of a layer is not needed again); plus once for the embedding and once for the
    loss. Norms and biases are summed whole. Sums of one number per row or token, as in the loss, are not
    counted.

    Args:
      run: the config.
      axes: sizes of the mesh's axes.

    Raises:
      UserError: the model is not a dense GPT.
    """
    dense = run.model
    if not isinstance(dense, GPT) or dense.moe:
        raise UserError("step_traffic supports only dense GPT models; give it a run with such a model.")
    model = abstract_params(run.model)
    width = jnp.dtype(run.compute.dtype).itemsize
    share = {axis: (n - 1) / n for axis, n in axes.items()}
    tokens = run.train.batch_size * run.length / math.prod(axes[axis] for axis in ROW_AXES)
    sent = 0.0
    for path, variable in nnx.to_flat_state(model):
        names = {axis for name in variable.get_metadata()["axes"] for axis in TABLE[name]}
        others = math.prod(axes[axis] for axis in names - {"fsdp"})
        held = math.prod(variable.shape) / others  # by all devices of an fsdp group together
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
    """Whether the compiler for `tpu` or `cuda` is installed."""
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
    """Wait until no other jaxgpt process compiles for TPU: libtpu allows one process per machine."""
    if topology.chip.platform != "tpu":
        yield
        return
    import fcntl  # Unix only, like libtpu

    # One file per user: another user's file could not be opened.
    path = Path(tempfile.gettempdir()) / f"jaxgpt_libtpu_{os.getuid()}.lock"
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.warning("another process compiles for TPU (it holds %s); waiting for it to finish", path)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
