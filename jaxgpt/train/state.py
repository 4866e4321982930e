"""What training carries from step to step, and how it lies on the mesh."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxgpt.checkpoint import State
from jaxgpt.config import Full, Run
from jaxgpt.models import abstract_model, assemble, init_memory, init_params, trainable
from jaxgpt.objectives.measures import measured_optimizer
from jaxgpt.optim import make_optimizer, split_trainable, state_shardings
from jaxgpt.sharding import param_shardings, replicated, spec
from jaxgpt.target import Target
from jaxgpt.tune import Tuning, make_tuning
from jaxgpt.tune.base import flatten, unflatten


@dataclass(frozen=True)
class Program:
    """The static parts of a run: what is traced, never passed across a jit boundary.

    Attributes:
      graphdef: the model's graph; `nnx.merge(graphdef, params)` gives the model.
      optimizer: the optax chain.
      tuning: what is trained of the model, and how it enters the model.
      base: what is not trained and not saved: shapes with shardings; empty where all is.
      split: a tree of parameters as those trained and those frozen, see `optim.split_trainable`.
      shardings: a `State` of shardings.
      abstract: a `State` of `ShapeDtypeStruct`s with shardings, the target of a restore.
      mesh: the mesh.
      target: what it is built for.
      refers: whether the objective compares with the frozen base, computed in the step.
      noise: whether a step also measures the gradients of its microbatches, see `noise.NoiseScale`.
      teacher: the graph of a teacher, whose parameters the step is given; None for none.
    """

    graphdef: nnx.GraphDef
    optimizer: optax.GradientTransformation
    tuning: Tuning
    base: dict
    split: Callable[[Any], tuple[Any, Any]]
    shardings: State
    abstract: State
    mesh: jax.sharding.Mesh
    target: Target
    refers: bool = False
    noise: bool = False
    teacher: nnx.GraphDef | None = None

    def model(self, params: Any, base: Any, key: jax.Array | None = None, teacher: Any = None) -> Any:
        """The model, in traced code, of what is saved and the frozen base; a key turns their dropout on.

        With a teacher's parameters it has that as `teacher`.
        """
        module = assemble(self.graphdef, self.tuning.enter(params, {} if base is None else base, key))
        if teacher is not None:
            assert self.teacher is not None
            module.teacher = nnx.data(assemble(self.teacher, teacher))
        return module


def make_program(
    run: Run, mesh: jax.sharding.Mesh, target: Target | None = None, *, text: Sequence[int] = ()
) -> Program:
    """Build everything about a run that needs no arrays.

    Args:
      run: the config.
      mesh: of devices that are here or absent.
      target: what to build for, if not for the mesh's devices: an accelerator's program runs on a CPU, too.
      text: token ids of `tune.text`, which virtual tokens begin with.
    """
    target = target or Target.of(mesh)
    graphdef, whole_model = abstract_model(run.model, run.compute, target)
    tuning = make_tuning(run.tune, run.model, run.compute, target, text=text)
    model = tuning.learned
    chosen, params = trainable(run.model), nnx.to_pure_dict(model)
    optimizer = make_optimizer(run.optim, run.train.steps, model, chosen)
    optimizer = measured_optimizer(run.measures, optimizer, model)

    def split(params: Any) -> tuple[Any, Any]:
        return split_trainable(params, model, chosen)

    layout = param_shardings(model, mesh)
    whole: Any = replicated(mesh)
    memory = jax.eval_shape(lambda: init_memory(run.model, run.compute, target, run.train.batch_size))
    rows = jax.tree.map(lambda _: NamedSharding(mesh, spec(("batch",))), memory)
    shardings = State(
        whole, whole, layout, state_shardings(optimizer, split(params)[0], split(layout)[0], whole), rows
    )
    count: Any = jax.ShapeDtypeStruct((), jnp.int32)
    shapes = State(count, count, params, jax.eval_shape(optimizer.init, split(params)[0]), memory)
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )
    base = {} if isinstance(run.tune, Full) else frozen_part(tuning, whole_model, mesh)
    refers = getattr(run.objective, "reference", "") == "frozen"
    flags = refers, run.train.noise_scale
    return Program(graphdef, optimizer, tuning, base, split, shardings, abstract, mesh, target, *flags)


def init_state(run: Run, program: Program, params: dict | None = None) -> State:
    """A fresh state, born in its layout.

    Args:
      run: the config.
      program: of the run.
      params: parameters in place of fresh ones, all of them or those of some first names.
    """

    def fresh(key: jax.Array, given: dict) -> State:
        whole = init_params(run.model, run.compute, program.target, key) | given
        params = program.tuning.init(jax.random.fold_in(key, 1), whole)
        zero = jnp.zeros((), jnp.int32)
        memory = init_memory(run.model, run.compute, program.target, run.train.batch_size)
        return State(zero, zero, params, program.optimizer.init(program.split(params)[0]), memory)

    # It runs once: on a CPU optimising it takes longer than what it then saves.
    here = Target.of(program.mesh).platform  # where it runs, whatever it is built for
    options = {"xla_backend_optimization_level": 1} if here == "cpu" else None
    with jax.set_mesh(program.mesh):
        born = jax.jit(
            fresh,
            out_shardings=program.shardings,
            compiler_options=options,
        )
        return born(jax.random.key(run.train.seed), params or {})


def frozen_part(tuning: Tuning, model: nnx.State, mesh: jax.sharding.Mesh) -> dict:
    """What stays as it is, beside what is trained: shapes with shardings.

    What stands for a parameter is sharded like it, as far as it is as long.
    """
    layouts = flatten(param_shardings(model, mesh))
    shapes = jax.eval_shape(tuning.freeze, nnx.to_pure_dict(model))

    def one(leaf: jax.ShapeDtypeStruct, like: NamedSharding) -> jax.ShapeDtypeStruct:
        axes = [*like.spec, *[None] * (leaf.ndim - len(like.spec))]
        fits = [
            axis if size % math.prod(mesh.shape[a] for a in _names(axis)) == 0 else None
            for axis, size in zip(axes, leaf.shape, strict=False)
        ]
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, P(*fits)))

    return unflatten(
        {
            path: jax.tree.map(lambda leaf, like=layouts[path]: one(leaf, like), part)
            for path, part in flatten(shapes).items()
        }
    )


def _names(axis: Any) -> tuple[str, ...]:
    return axis if isinstance(axis, tuple) else () if axis is None else (axis,)


def freeze(program: Program, params: dict) -> dict:
    """The frozen part of a model's parameters, in its layout."""
    if not program.base:
        return {}
    layouts = jax.tree.map(lambda leaf: leaf.sharding, program.base)
    with jax.set_mesh(program.mesh):
        return jax.jit(program.tuning.freeze, out_shardings=layouts)(params)


def state_bytes(program: Program) -> dict[jax.Device, int]:
    """Bytes that each device of this process needs at least: the state, gradients, and the frozen base."""
    learned, _ = program.split(program.abstract.params)
    size = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves((program.abstract, learned, program.base))
    )
    return dict.fromkeys(program.mesh.local_devices, size)
