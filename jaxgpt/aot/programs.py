"""The programs of a run, compiled for the devices of a mesh, absent or not."""

from __future__ import annotations

import dataclasses
import functools
import re
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from jaxgpt.aot import Decoding, Report, hlo
from jaxgpt.aot.topology import CHIPS
from jaxgpt.batch import Batch
from jaxgpt.checkpoint.checksum import jit_measure
from jaxgpt.config import GRPO, Compute, Run
from jaxgpt.layers.cache import cache_axes
from jaxgpt.layers.paged import POOL_AXES, init_pools
from jaxgpt.layers.product_type import with_type
from jaxgpt.models import abstract_model, flops_per_token, init_memory
from jaxgpt.objectives import extra_columns, make_objective
from jaxgpt.objectives.measures import measured
from jaxgpt.sample import lanes
from jaxgpt.sample import program as sampling
from jaxgpt.sample.beam import Knobs, Search, beam_search
from jaxgpt.sample.settings import Sampling
from jaxgpt.sample.strategies import Controls, Features
from jaxgpt.sharding import batch_sharding, param_shardings, spec
from jaxgpt.target import Target
from jaxgpt.text.vocabulary import Vocabulary
from jaxgpt.train.rollout import drawing, sampler
from jaxgpt.train.state import make_program
from jaxgpt.train.step import jit_eval_step, jit_train_step

BEAMS = 4


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
    """Compile one program for the devices of a mesh, absent or not, and analyse the result.

    Args:
      run: the config.
      mesh: the mesh that the run would create.
      program: a name in `PROGRAMS`.
      decoding: sizes for `prefill` and `decode`.
      target: what to build for, if not for the mesh's devices.
      where: name of the devices in the report.
      keep: see `compile_for`.
    """
    decoding = decoding or Decoding()
    kind = mesh.devices.flat[0].device_kind
    head: Any = (program, where or kind, kind, {axis: n for axis, n in mesh.shape.items() if n > 1})
    target = target or Target.of(mesh)
    function, arguments = _program(
        with_type(run, target), mesh, target, program, decoding
    )  # before the mesh is set, while new arrays are still created on this machine
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
    """Bytes that a program needs, if this is a compiler's out-of-memory message; else 0."""
    # libtpu says "Used 147G of 95.7G hbm" or "required for HLO temporaries (52G) exceeds available HBM".
    used = re.search(r"(?:[Uu]sed |required [^(]*\()([\d.]+)([KMGT]?)", message)
    if "RESOURCE_EXHAUSTED" not in message or used is None:
        return 0.0
    return float(used.group(1)) * 1024 ** " KMGT".index(used.group(2) or " ")


def _program(
    run: Run, mesh: jax.sharding.Mesh, target: Target, program: str, decoding: Decoding
) -> tuple[Any, tuple[Any, ...]]:
    """The function that the loop or the sampler calls, and the shapes of its arguments."""
    if program in ("train", "eval", "checksum"):
        parts = make_program(run, mesh, target)
        if program == "checksum":
            return jit_measure(mesh), (jax.tree.leaves(parts.abstract.params),)
        vocabulary = Vocabulary.plain(run.model.vocab_size)
        objective = make_objective(run.objective, vocabulary)
        base = [parts.base] if parts.base else []  # the frozen part of a model that is tuned
        layout = batch_sharding(mesh)
        columns: dict[str, Any] = {"types": run.typed, "extra": extra_columns(run)}
        batch = Batch.abstract(run.train.batch_size, run.length, layout, **columns)
        if program == "train":
            learned = measured(run.measures, objective, vocabulary)
            return jit_train_step(run, parts, learned), (parts.abstract, batch, *base)
        memory = jax.eval_shape(
            lambda: init_memory(run.model, run.compute, target, run.train.batch_size, evaluation=True)
        )
        batch = dataclasses.replace(batch, memory=_laid_out(memory, layout))
        return jit_eval_step(run, parts, objective), (parts.abstract.params, batch, *base)
    if program == "rollout":
        return _rollout(run, mesh, target, decoding)
    compute = Compute(dtype=run.compute.dtype, attention=run.compute.attention)
    static = sampling.Program(
        run.model, compute, target, decoding.slots, run.model.vocab_size, Features(True, True, False, False)
    )
    params, rows = _sampler_params(run, compute, target, mesh), _rows(decoding, mesh)
    if program in ("chunk", "step"):
        return _engine(run, compute, target, mesh, program, decoding, params)
    if program == "prefill":
        return sampling.prefill, (static, params, rows)
    if program == "beams":
        rows, one = _rows(dataclasses.replace(decoding, rows=BEAMS * decoding.rows), mesh), jnp.float32(1)
        search = Search(dataclasses.replace(static, group=BEAMS), 1, "heuristic")
        return beam_search, (search, params, rows, Knobs(one, one))
    state = jax.eval_shape(functools.partial(sampling.prefill, static), params, rows)[0]
    cache = NamedSharding(mesh, spec(cache_axes(state.cache)))
    by_row = NamedSharding(mesh, spec(("batch",)))
    state = _laid_out(state, by_row)._replace(cache=_laid_out(state.cache, cache))
    return sampling.decode, (static, params, rows, state, jax.ShapeDtypeStruct((), jnp.int32))


def _rollout(
    run: Run, mesh: jax.sharding.Mesh, target: Target, decoding: Decoding
) -> tuple[Any, tuple[Any, ...]]:
    """A rollout of a run of GRPO, with its sizes; of another run, of the sizes of a sampler call."""
    parts, config, how, group = make_program(run, mesh, target), run.objective, Sampling(), 1
    if isinstance(config, GRPO):
        how, group = drawing(config), config.group
        decoding = Decoding(run.train.batch_size, run.length - config.max_new_tokens, run.length)
    function = sampler(run, parts, run.model.vocab_size, how, group, decoding.slots)
    return function, (parts.abstract.params, parts.base or None, _rows(decoding, mesh))


def _engine(
    run: Run, compute: Compute, target: Target, mesh: Any, program: str, decoding: Decoding, params: Any
) -> tuple[Any, tuple[Any, ...]]:
    """A program of the serving engine, whose rows are the same on all devices and whose cache is split by
    heads.
    """
    lane = lanes.Lane(run.model, compute, target, run.model.vocab_size)
    rows, pages = decoding.rows, decoding.slots // decoding.page
    everywhere = NamedSharding(mesh, spec(()))
    how = (run.model, compute, target, rows * pages + 1, decoding.page)

    def empty() -> lanes.Lanes:
        return lanes.empty_lanes(lane, rows, decoding.slots, init_pools(*how), None)

    with jax.set_mesh(mesh):
        held = jax.eval_shape(empty)
    pools = jax.tree.map(lambda x: NamedSharding(mesh, spec(POOL_AXES[: x.ndim])), held.pools)
    held = _laid_out(held, everywhere)._replace(pools=_laid_out(held.pools, pools))

    def array(dtype: Any, *shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere)

    V = run.model.vocab_size
    if program == "chunk":
        more = (array(jnp.int32, 1, pages), array(jnp.bool_, 1, V), array(jnp.int32, 5))
        return lanes.chunk, (lane, decoding.prompt, (params, None), held, *more)
    more = (
        array(jnp.int32, rows),
        array(jnp.int32, rows, pages),
        array(jnp.bool_, rows),
        array(jnp.bool_, rows, V),
    )
    return lanes.step, (lane, (params, None), held, *more, array(jnp.int32))


def _sampler_params(run: Run, compute: Compute, target: Target, mesh: jax.sharding.Mesh) -> Any:
    """Parameters in decoding form, as made by `sample.program.prepare`."""
    trained = nnx.to_pure_dict(abstract_model(run.model, run.compute, target)[1])
    shapes = jax.eval_shape(functools.partial(sampling.prepare, run.model, compute, target), trained)
    layout = param_shardings(sampling.decoder(run.model, compute, target)[1], mesh)
    return _laid_out(shapes, layout)


def _rows(decoding: Decoding, mesh: jax.sharding.Mesh) -> sampling.Rows:
    """The prompts and settings of a call."""

    def column(dtype: Any, *more: int) -> Any:
        return jax.ShapeDtypeStruct(
            (decoding.rows, *more), dtype, sharding=NamedSharding(mesh, spec(("batch",)))
        )

    whole, real = column(jnp.int32), column(jnp.float32)
    controls = Controls(real, whole, real, real, real, column(jnp.uint32))
    tokens_BT, stop_BN = column(jnp.int32, decoding.prompt), column(jnp.int32, 8)
    return sampling.Rows(tokens_BT, whole, whole, whole, stop_BN, controls)


def _laid_out(shapes: Any, layout: Any) -> Any:
    """Shapes with shardings: a tree of the same structure, or one sharding for all."""
    if isinstance(layout, NamedSharding):
        layout = jax.tree.map(lambda _: layout, shapes)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, layout)
