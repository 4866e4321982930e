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
import functools
import importlib.util
import json
import logging
import math
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from jaxgpt import hlo
from jaxgpt.batch import Batch
from jaxgpt.config import GPT, ROW_AXES, Compute, Run, UserError, from_json, require, require_known, to_json
from jaxgpt.layers.cache import cache_axes
from jaxgpt.models import abstract_model, flops_per_token, init_memory
from jaxgpt.objectives import make_objective
from jaxgpt.sample import program as sampling
from jaxgpt.sample.strategies import Controls, Features
from jaxgpt.sharding import TABLE, batch_sharding, make_mesh, param_shardings, spec
from jaxgpt.target import Target
from jaxgpt.text.vocabulary import Vocabulary
from jaxgpt.topology import CHIPS, Topology
from jaxgpt.train.state import make_program
from jaxgpt.train.step import jit_eval_step, jit_train_step

log = logging.getLogger(__name__)

PROGRAMS = ("train", "eval", "prefill", "decode")
GIB = 2**30


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
        lists: dict[str, Any] = {name: tuple(record[name]) for name in ("uncounted", "squares")}
        lists["largest"] = tuple((array, kind, number) for array, kind, number in record["largest"])
        lists["collectives"] = tuple(map(hlo.Collective.of, record["collectives"]))
        return cls(**{**record, **lists})


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
    request = {
        "run": to_json(run),
        "where": where,
        "programs": list(programs),
        "decoding": dataclasses.asdict(decoding or Decoding()),
        "keep": str(keep and Path(keep).absolute()),
    }
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
            input=json.dumps(request),
            capture_output=True,
            text=True,
            env=environment,
        )
    last = done.stdout.splitlines()[-1:]  # a compiler may have said something before
    if done.returncode or not last:
        words = "\n".join(done.stderr.splitlines()[-25:])
        raise RuntimeError(f"compiling {run.name} for {where} ended with code {done.returncode}:\n{words}")
    answer = json.loads(last[0])
    require("mistake" not in answer, answer.get("mistake", ""))
    return [Report.of(record) for record in answer["reports"]]


def step_traffic(run: Run, axes: Mapping[str, int]) -> float:
    """Bytes that each device must send in a training step of a dense decoder: the least to aim at.

    Over `fsdp` each matrix of a layer is gathered twice in the compute type (forward, and backward or
    recomputed) and its float32 gradient scattered once, in each microbatch; embedding and output
    projection are gathered once, since the loss makes its gradient beside its value. Over `data`
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
    _, model = abstract_model(run.model, run.compute, Target.of())
    width = jnp.dtype(run.compute.dtype).itemsize
    share = {axis: (n - 1) / n for axis, n in axes.items()}
    sent = 0.0
    for path, variable in nnx.to_flat_state(model):
        names = {axis for name in variable.get_metadata()["axes"] for axis in TABLE[name]}
        others = math.prod(axes[axis] for axis in names - {"fsdp"})
        held = math.prod(variable.shape) / others  # by all devices of an fsdp group
        table = "blocks" not in path
        uses = 2 if table and dense.tied else 1
        if "fsdp" in names:
            moved = (1 if table else 2) * width + 4
            sent += run.train.accumulate * uses * share["fsdp"] * held * moved
            sent += 2 * share["data"] * 4 * held / axes["fsdp"]
        else:
            rows = axes["data"] * axes["fsdp"]
            sent += 2 * (rows - 1) / rows * 4 * held
    rows = run.train.batch_size / math.prod(axes[axis] for axis in ROW_AXES)
    sums = (5 if run.compute.remat == "full" else 4) * run.model.layers + 2
    return sent + 2 * share["tensor"] * sums * rows * run.length * run.model.width * width


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

    path = Path(tempfile.gettempdir()) / "jaxgpt_libtpu.lock"
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.warning("another process compiles for TPU (it holds %s); waiting for its end", path)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


# The other process --------------------------------------------------------------------------------


def main() -> None:
    """Read a request from standard input and answer it with one line of JSON."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    request = json.load(sys.stdin)
    try:
        run, topology = from_json(Run, request["run"]), Topology(request["where"])
        decoding = Decoding(**request["decoding"])
        devices = topology.describe()
        mesh = make_mesh(run.check_mesh(len(devices)), devices)
        reports = [
            compile_on(run, mesh, name, decoding, where=topology.name, keep=request["keep"])
            for name in request["programs"]
        ]
        answer: dict[str, Any] = {"reports": [dataclasses.asdict(report) for report in reports]}
    except UserError as error:
        answer = {"mistake": str(error)}
    print(json.dumps(answer))


def _end_with(parent: int) -> None:
    """End this process when the one that asked is gone: a compile may take an hour and holds libtpu."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def compile_on(
    run: Run,
    mesh: jax.sharding.Mesh,
    program: str,
    decoding: Decoding | None = None,
    *,
    target: Target | None = None,
    where: str = "",
    keep: str | Path = "",
) -> Report:
    """Compile one program for the devices of a mesh, absent or not, and read what came out.

    Args:
      run: the config.
      mesh: as the run would make it.
      program: of `PROGRAMS`.
      decoding: sizes for `prefill` and `decode`.
      target: what to build for, if not for the mesh's devices.
      where: what to call the devices.
      keep: see `compile_for`.
    """
    decoding = decoding or Decoding()
    kind = mesh.devices.flat[0].device_kind
    head: Any = (program, where or kind, kind, {axis: n for axis, n in mesh.shape.items() if n > 1})
    function, arguments = _program(
        run, mesh, target or Target.of(mesh), program, decoding
    )  # while new arrays still live here
    clock = [time.perf_counter()]
    with jax.set_mesh(mesh):
        traced = function.trace(*arguments)
        clock.append(time.perf_counter())
        lowered = traced.lower()
        clock.append(time.perf_counter())
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if not (wanted := _wanted(str(error))):
                raise
            return Report(*head, fits=False, needed=wanted)
    clock.append(time.perf_counter())
    text = compiled.as_text()
    if keep:
        Path(keep).mkdir(parents=True, exist_ok=True)
        (Path(keep) / f"{program}.hlo").write_text(text)
    read = hlo.read(text, mesh.shape)
    sizes = compiled.memory_analysis()
    memory = {
        "arguments": sizes.argument_size_in_bytes,
        "results": sizes.output_size_in_bytes - sizes.alias_size_in_bytes,
        "temporaries": sizes.temp_size_in_bytes,
        "code": sizes.generated_code_size_in_bytes,
    }
    room = next((chip.memory for chip in CHIPS.values() if chip.title == kind), 0)
    share = {"train": 1.0, "eval": 1 / 3}.get(program, 0.0) / mesh.size
    seconds = [round(b - a, 1) for a, b in pairwise(clock)]
    return Report(
        *head,
        fits=not room or sum(memory.values()) <= room,
        needed=sum(memory.values()),
        memory=memory,
        model_flops=share * flops_per_token(run.model, run.length) * run.train.batch_size * run.length,
        product_flops=read.product_flops,
        kernel_flops=read.kernel_flops,
        kernels=read.kernels,
        uncounted=read.uncounted,
        collectives=read.collectives,
        unknown_loops=read.unknown_loops,
        largest=tuple((str(array), kind, number) for array, kind, number in read.largest()),
        squares=tuple(map(str, read.squares(run.length if share else decoding.prompt))),
        seconds=dict(zip(("trace", "lower", "compile"), seconds, strict=True)),
    )


def _wanted(message: str) -> float:
    """Bytes that a program wanted, if this is a compiler's word that they were too many."""
    used = re.search(r"[Uu]sed ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? \w*hbm", message)
    if "RESOURCE_EXHAUSTED" not in message or used is None:
        return 0.0
    return float(used.group(1)) * 1024 ** " KMGT".index(used.group(2) or " ")


def _program(
    run: Run, mesh: jax.sharding.Mesh, target: Target, program: str, decoding: Decoding
) -> tuple[Any, tuple[Any, ...]]:
    """What the loop or the sampler calls, and shapes in place of the arrays it is called with."""
    if program in ("train", "eval"):
        parts = make_program(run, mesh, target)
        objective = make_objective(run.objective, Vocabulary.plain(run.model.vocab_size))
        layout = batch_sharding(mesh)
        batch = Batch.abstract(run.train.batch_size, run.length, layout, types=run.typed)
        if program == "train":
            return jit_train_step(run, parts, objective), (parts.abstract, batch)
        memory = jax.eval_shape(
            lambda: init_memory(run.model, run.compute, target, run.train.batch_size, evaluation=True)
        )
        batch = dataclasses.replace(batch, memory=_laid_out(memory, layout))
        return jit_eval_step(parts, objective), (parts.abstract.params, batch)
    compute = Compute(dtype=run.compute.dtype, attention="xla")
    static = sampling.Program(
        run.model, compute, target, decoding.slots, run.model.vocab_size, Features(True, True, False, False)
    )
    params, rows = _sampler_params(run, compute, target, mesh), _rows(decoding, mesh)
    if program == "prefill":
        return sampling.prefill, (static, params, rows)
    state = jax.eval_shape(functools.partial(sampling.prefill, static), params, rows)[0]
    cache = NamedSharding(mesh, spec(cache_axes(state.cache)))
    by_row = NamedSharding(mesh, spec(("batch",)))
    state = _laid_out(state, by_row)._replace(cache=_laid_out(state.cache, cache))
    return sampling.decode, (static, params, rows, state, jax.ShapeDtypeStruct((), jnp.int32))


def _sampler_params(run: Run, compute: Compute, target: Target, mesh: jax.sharding.Mesh) -> Any:
    """Parameters in the form decoding wants, as `sample.program.prepare` makes them."""
    trained = nnx.to_pure_dict(abstract_model(run.model, run.compute, target)[1])
    shapes = jax.eval_shape(functools.partial(sampling.prepare, run.model, compute, target), trained)
    layout = param_shardings(sampling.decoder(run.model, compute, target)[1], mesh)
    return _laid_out(shapes, layout)


def _rows(decoding: Decoding, mesh: jax.sharding.Mesh) -> sampling.Rows:
    """A call's prompts and settings."""

    def column(dtype: Any, *more: int) -> Any:
        return jax.ShapeDtypeStruct(
            (decoding.rows, *more), dtype, sharding=NamedSharding(mesh, spec(("batch",)))
        )

    whole, real = column(jnp.int32), column(jnp.float32)
    controls = Controls(real, whole, real, real, real, column(jnp.uint32))
    tokens_BT, stop_BN = column(jnp.int32, decoding.prompt), column(jnp.int32, 8)
    return sampling.Rows(tokens_BT, whole, whole, whole, stop_BN, controls)


def _laid_out(shapes: Any, layout: Any) -> Any:
    """Shapes with their layout: a tree alike, or one for all."""
    if isinstance(layout, NamedSharding):
        layout = jax.tree.map(lambda _: layout, shapes)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, layout)


if __name__ == "__main__":
    main()
