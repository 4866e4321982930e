"""What a config costs, found out without running it: `jaxgpt info`."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx
from jax.extend.core import Var
from rich.console import Console
from rich.table import Table

from jaxgpt.batch import Batch
from jaxgpt.config import ROW_AXES, Compute, Mesh, Run
from jaxgpt.layers.product_type import with_type
from jaxgpt.models import (
    abstract_model,
    abstract_params,
    assemble,
    flops_per_token,
    init_memory,
    parameter_counts,
    trainable,
)
from jaxgpt.objectives import extra_columns, make_objective
from jaxgpt.objectives.measures import measured, measured_optimizer
from jaxgpt.optim import join, make_optimizer, split_trainable
from jaxgpt.target import Target
from jaxgpt.text.vocabulary import Vocabulary
from jaxgpt.train.command import read_args
from jaxgpt.tune import Tuning, make_tuning


@dataclass(frozen=True)
class Cost:
    """Sizes of a run; bytes are of all devices together unless said otherwise.

    Attributes:
      parameters, non_embedding: counts.
      flops_per_token: training, forward and backward.
      tokens_per_step: over all devices and microbatches.
      devices: of the mesh, an axis of -1 counted as 1.
      parameter_bytes, optimizer_bytes, gradient_bytes: float32, split over `fsdp` and `tensor`.
      activation_bytes: what the backward pass keeps from the forward pass, for one device's rows
        of one microbatch; `tensor` is not counted, so it is an upper bound.
    """

    parameters: int
    trained_parameters: int
    non_embedding: int
    flops_per_token: float
    tokens_per_step: int
    devices: int
    split: int
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int

    @property
    def device_bytes(self) -> float:
        """Memory one device needs at least; the compiler's temporaries come on top."""
        held = self.parameter_bytes + self.gradient_bytes + self.optimizer_bytes
        return held / self.split + self.activation_bytes


def cost(run: Run) -> Cost:
    """The cost of a run on its mesh; nothing of it is computed or allocated.

    Raises:
      UserError: batch or model do not divide over the mesh.
    """
    axes = {name: max(1, size) for name, size in dataclasses.asdict(run.mesh).items()}
    run = with_type(dataclasses.replace(run, mesh=Mesh(**axes)))
    devices = math.prod(axes.values())
    run.check_mesh(devices)
    model = abstract_params(run.model)
    params = nnx.to_pure_dict(model)
    chosen, tuning = trainable(run.model), _tuning(run)
    optimizer = make_optimizer(run.optim, run.train.steps, tuning.learned, chosen)
    optimizer = measured_optimizer(run.measures, optimizer, tuning.learned)
    saved = nnx.to_pure_dict(tuning.learned)
    learned, _ = split_trainable(saved, tuning.learned, chosen)
    frozen = jax.eval_shape(tuning.freeze, params)
    counts = parameter_counts(run.model)
    rows = run.train.batch_size // run.train.accumulate // math.prod(axes[a] for a in ROW_AXES)
    return Cost(
        parameters=counts["total"],
        trained_parameters=sum(leaf.size for leaf in jax.tree.leaves(learned)),
        non_embedding=counts["non_embedding"],
        flops_per_token=flops_per_token(run.model, run.length),
        tokens_per_step=run.train.batch_size * run.length,
        devices=devices,
        split=axes["fsdp"] * axes["tensor"],
        parameter_bytes=nbytes((saved, frozen)),
        gradient_bytes=nbytes(learned),
        optimizer_bytes=nbytes(jax.eval_shape(optimizer.init, learned)),
        activation_bytes=_residual_bytes(run, saved, frozen, rows),
    )


def _tuning(run: Run) -> Tuning:
    compute: Compute = dataclasses.replace(run.compute, attention="xla", unroll=1)
    return make_tuning(run.tune, run.model, compute, Target.of())


def nbytes(tree: Any) -> int:
    """Bytes of all arrays of a tree, abstract ones included."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _residual_bytes(run: Run, params: dict, base: dict, rows: int) -> int:
    """Bytes that reverse-mode differentiation keeps, beside the parameters, for these rows."""
    compute: Compute = dataclasses.replace(run.compute, attention="xla", unroll=1)
    target = Target.of()
    graphdef, _ = abstract_model(run.model, compute, target)
    vocabulary = Vocabulary.plain(run.model.vocab_size)
    objective = measured(run.measures, make_objective(run.objective, vocabulary), vocabulary)
    memory = jax.eval_shape(lambda: init_memory(run.model, compute, target, rows))
    batch = Batch.abstract(rows, run.length, types=run.typed, extra=extra_columns(run, computed=True))
    batch = dataclasses.replace(batch, memory=memory)

    tuning = _tuning(run)

    def backward(params: dict, base: dict, batch: Batch, key: jax.Array) -> Any:
        learned, frozen = split_trainable(params, tuning.learned, trainable(run.model))

        def loss(learned: dict) -> jax.Array:
            whole = tuning.enter(join(learned, frozen), base, key)
            return objective(assemble(graphdef, whole), batch, key).loss

        return jax.vjp(loss, learned)[1]  # the function is a pytree of what it keeps

    program = jax.make_jaxpr(backward)(params, base, batch, jax.random.key(0)).jaxpr
    # By identity: a parameter that is kept is no new array, but one of its shape is.
    given = set(program.invars)
    for equation in program.eqns:  # nor is one seen in another shape, as layers of several kinds are
        if equation.primitive.name == "reshape" and equation.invars[0] in given:
            given |= set(equation.outvars)
    made = {v for v in program.outvars if isinstance(v, Var)} - given
    arrays: list[Any] = [v.aval for v in made]
    # The loss makes the output projection's gradient in the forward pass; gradient_bytes has it.
    gradient = (run.model.vocab_size, run.model.width)
    return nbytes([a for a in arrays if a.shape != gradient])


def info(args: list[str]) -> int:
    """Print what a config costs."""
    run = read_args(args, "info")
    found = cost(run)
    table = Table(title=f"{run.name}: {type(run.model).__name__}", show_header=False, title_justify="left")
    epochs = run.train.epochs
    later = "" if epochs is None else f"those of train.epochs {epochs:g}, counted when training starts"
    total_flops = found.flops_per_token * found.tokens_per_step * run.train.steps
    for name, value in (
        ("parameters", f"{found.parameters:,}"),
        (
            "trained parameters",
            f"{found.trained_parameters:,} ({found.trained_parameters / found.parameters:.2%} of these)",
        ),
        ("without embeddings", f"{found.non_embedding:,}"),
        ("training FLOPs per token", f"{found.flops_per_token:.3e}"),
        ("tokens per step", f"{found.tokens_per_step:,}"),
        ("tokens in all", later or f"{found.tokens_per_step * run.train.steps:,}"),
        ("training FLOPs in all", later or f"{total_flops:.3e}"),
        (
            "devices",
            f"{found.devices} ({', '.join(f'{k} {max(1, v)}' for k, v in vars(run.mesh).items())})",
        ),
        ("memory of parameters", human(found.parameter_bytes)),
        ("of gradients", human(found.gradient_bytes)),
        (f"of the optimizer ({run.optim.name})", human(found.optimizer_bytes)),
        ("of activations per device", f"{human(found.activation_bytes)} (remat {run.compute.remat})"),
        ("memory per device, at least", human(found.device_bytes)),
    ):
        table.add_row(name, value)
    Console().print(table)
    return 0


def human(size: float) -> str:
    """Bytes in the unit that suits them."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"
