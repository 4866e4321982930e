"""Learning-rate schedules and optax chains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax
from flax import nnx
from jax.sharding import PartitionSpec as P
from optax.contrib import MuonDimensionNumbers

from jaxgpt.config import Optim


def schedule(optim: Optim, steps: int, peak: float | None = None) -> optax.Schedule:
    """Linear warm-up to the peak, then `optim.schedule` down to `final_lr` at the last step that is run.

    Where the warm-up takes all steps, the last one is at the peak. A constant schedule stays there.

    Args:
      optim: shape of the schedule.
      steps: number of steps of the run.
      peak: a peak other than `optim.peak_lr`; the final learning rate keeps its ratio to the peak.
    """
    top = optim.peak_lr if peak is None else peak
    final = top * optim.final_lr / optim.peak_lr
    # optax counts updates from 0: the warm-up's last one is at the peak, and the run's last one is steps - 1.
    peak_at = max(0, optim.warmup_steps - 1)
    rest = max(1, steps - 1 - peak_at)
    decay = min(rest, max(1, round(optim.decay_fraction * steps)))
    after = {
        "constant": optax.constant_schedule(top),
        "linear": optax.linear_schedule(top, final, rest),
        "cosine": optax.cosine_decay_schedule(top, rest, alpha=final / top),
        "range": optax.exponential_decay(final or 1e-30, rest, top / (final or 1e-30)),
        "wsd": optax.linear_schedule(top, final, decay, transition_begin=rest - decay),
    }[optim.schedule]
    # Starts at peak / warm-up, not at 0: the first step is not wasted.
    warmup = optax.linear_schedule(top / max(1, optim.warmup_steps), top, max(1, peak_at))
    return optax.join_schedules([warmup, after], [peak_at])


def stable_until(optim: Optim, steps: int) -> int:
    """The last step (counted from 1) up to which a longer run has the same learning rates.

    All steps of a constant schedule, those before the decay of wsd; none of the others.
    """
    if optim.schedule == "constant":
        return steps
    if optim.schedule != "wsd":
        return 0
    rest = max(1, steps - 1 - max(0, optim.warmup_steps - 1))
    return steps - min(rest, max(1, round(optim.decay_fraction * steps)))


DECAYED = ("matrix", "embedding", "position")
"""Roles of the parameters with weight decay."""
Trainable = Callable[[tuple[Any, ...], Mapping[str, Any]], bool]
"""Whether a parameter is trained, by its path and its metadata."""


def make_optimizer(
    optim: Optim, steps: int, abstract: nnx.State, trainable: Trainable | None = None
) -> optax.GradientTransformation:
    """The optax chain: global-norm clipping, then AdamW, or Muon with AdamW for the rest.

    Weight decay applies only to matrices and tables. Muon (Jordan et al. 2024) updates the matrices inside
    the layers; AdamW updates embeddings, output projection and vectors.

    Args:
      optim: the config.
      steps: number of steps of the run, for the schedule.
      abstract: the model's state, whose metadata gives each parameter's role, and a matrix's axes.
      trainable: what is trained; None means all. The chain works on the trees from `split_trainable`: frozen
        parameters have no state and no gradient.
    """
    flat = [(path, variable, variable.get_metadata()) for path, variable in nnx.to_flat_state(abstract)]
    learned = [(p, v, about) for p, v, about in flat if trainable is None or trainable(p, about)]

    def tree(leaf: Any) -> dict:
        leaves = {path: optax.MaskedNode() for path, _, _ in flat}
        leaves |= {path: leaf(variable, about) for path, variable, about in learned}
        return nnx.to_pure_dict(nnx.from_flat_state(leaves))

    def dims(variable: nnx.Variable, about: Mapping[str, Any]) -> MuonDimensionNumbers | None:
        if about["role"] != "matrix" or about["axes"][0] != "layers":
            return None
        axes = range(1 + about.get("lead", 0), variable.ndim)  # the axes after layer and expert
        return MuonDimensionNumbers(tuple(axes[: about["inputs"]]), tuple(axes[about["inputs"] :]))

    clip = optax.clip_by_global_norm(optim.clip_norm) if optim.clip_norm else optax.identity()
    adamw = optax.adamw(
        schedule(optim, steps),
        optim.b1,
        optim.b2,
        optim.eps,
        weight_decay=optim.weight_decay,
        mask=tree(lambda _, about: about["role"] in DECAYED),
    )
    faster = [about["rate"] for _, _, about in learned if about.get("rate", 1.0) != 1.0]
    rates = scale_each(tree(lambda _, about: about.get("rate", 1.0))) if faster else optax.identity()
    if optim.name == "adamw" and len(learned) == len(flat):
        return optax.chain(clip, adamw, rates) if faster else optax.chain(clip, adamw)
    muon = spread_layers(
        optax.contrib.muon(
            schedule(optim, steps, optim.muon_lr),
            weight_decay=optim.weight_decay,
            muon_weight_dimension_numbers=tree(dims),
        )
    )

    # Other parameters use our own AdamW: the one inside optax's muon decays vectors too.
    def group(variable: nnx.Variable, about: Mapping[str, Any]) -> str:
        return "muon" if optim.name == "muon" and dims(variable, about) else "adamw"

    # The third group is empty because frozen parameters are split off; older checkpoints contain it.
    parts: Any = {"muon": muon, "adamw": adamw, "frozen": optax.set_to_zero()}
    return optax.chain(clip, optax.partition(parts, tree(group)), *([rates] if faster else []))


def scale_each(factors: Any) -> optax.GradientTransformation:
    """Multiply each parameter's update by its own factor (LoRA+ gives B a higher learning rate than A)."""

    def update(updates: Any, params: Any = None) -> Any:
        return jax.tree.map(lambda u, factor: u * factor, updates, factors)

    return optax.stateless(update)


def spread_layers(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Distribute the layers of stacked matrices [L, ...] over the mesh in a transformation.

    Otherwise, devices that hold the same matrices would all iterate on them, and devices that hold parts of a
    matrix would exchange products in every iteration. A mesh axis takes part if it divides the layers.
    """

    def by_layer(x: jax.Array) -> jax.Array:
        mesh, axes, parts = jax.sharding.get_abstract_mesh(), list[str](), 1
        if mesh.empty or x.ndim < 3:
            return x
        for axis, size in mesh.shape.items():
            if size > 1 and x.shape[0] % (parts * size) == 0:
                axes, parts = [*axes, axis], parts * size
        if not axes:
            return x
        return jax.lax.with_sharding_constraint(x, P(tuple(axes), *[P.UNCONSTRAINED] * (x.ndim - 1)))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = jax.tree.map(by_layer, (updates, state))
        return inner.update(updates, state, params)

    return optax.GradientTransformation(inner.init, update)


def split_trainable(params: Any, abstract: nnx.State, trainable: Trainable) -> tuple[Any, Any]:
    """Split a tree of parameters into trained and frozen ones; each tree has empty nodes for the rest."""
    flat = nnx.to_flat_state(abstract)
    learned = nnx.to_pure_dict(
        nnx.from_flat_state({path: trainable(path, v.get_metadata()) for path, v in flat})
    )
    none = optax.MaskedNode()
    return (
        jax.tree.map(lambda keep, p: p if keep else none, learned, params),
        jax.tree.map(lambda keep, p: none if keep else p, learned, params),
    )


def join(learned: Any, frozen: Any) -> Any:
    """Join the two trees from `split_trainable`."""
    empty = lambda x: isinstance(x, optax.MaskedNode)  # noqa: E731
    return jax.tree.map(lambda a, b: b if empty(a) else a, learned, frozen, is_leaf=empty)


def state_shardings(
    optimizer: optax.GradientTransformation,
    params: Any,
    shardings: Any,
    other: jax.sharding.Sharding,
) -> Any:
    """Shardings of the optimizer state: every copy of a parameter is sharded like the parameter.

    Args:
      optimizer: the chain.
      params: abstract parameters (pure dict).
      shardings: their shardings, in the same structure.
      other: sharding of leaves that are not copies of a parameter (counters).
    """
    layouts = {_dict_keys(path): sharding for path, sharding in jax.tree.leaves_with_path(shardings)}

    def layout(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.sharding.Sharding:
        keys = _dict_keys(path)  # (wrappers..., path of the parameter)
        found = [layouts[keys[i:]] for i in range(len(keys)) if keys[i:] in layouts]
        if leaf.ndim > 1 and not found:
            raise ValueError(
                f"optimizer leaf {keys} {leaf.shape} is not a copy of a parameter: give it a layout"
            )
        return found[0] if found and leaf.ndim else other

    return jax.tree.map_with_path(layout, jax.eval_shape(optimizer.init, params))


def _dict_keys(path: Any) -> tuple:
    return tuple(entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey))
