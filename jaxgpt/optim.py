"""Learning-rate schedules and optax chains."""

from __future__ import annotations

from typing import Any

import jax
import optax
from flax import nnx
from optax.contrib import MuonDimensionNumbers

from jaxgpt.config import Optim


def schedule(optim: Optim, steps: int, peak: float | None = None) -> optax.Schedule:
    """Linear warm-up to the peak, then `optim.schedule` down to `final_lr` at the last step.

    Args:
      optim: shape of the schedule.
      steps: length of the run.
      peak: a peak other than `optim.peak_lr`; the final rate keeps its ratio to the peak.
    """
    top = optim.peak_lr if peak is None else peak
    final = top * optim.final_lr / optim.peak_lr
    rest = max(1, steps - optim.warmup_steps)
    decay = max(1, round(optim.decay_fraction * rest))
    after = {
        "constant": optax.constant_schedule(top),
        "linear": optax.linear_schedule(top, final, rest),
        "cosine": optax.cosine_decay_schedule(top, rest, alpha=final / top),
        "wsd": optax.linear_schedule(top, final, decay, transition_begin=rest - decay),
    }[optim.schedule]
    # Starts at peak / warm-up, not at 0: the first step is not wasted.
    warmup = optax.linear_schedule(top / max(1, optim.warmup_steps), top, max(1, optim.warmup_steps - 1))
    return optax.join_schedules([warmup, after], [optim.warmup_steps])


def make_optimizer(
    optim: Optim, steps: int, abstract: nnx.State, frozen: tuple[str, ...] = ()
) -> optax.GradientTransformation:
    """The optax chain: global-norm clipping, then AdamW, or Muon with AdamW for the rest.

    Weight decay falls on matrices only. Muon (Jordan et al. 2024) takes the matrices inside the
    layers; embeddings, output projection and vectors stay with AdamW.

    Args:
      optim: the config.
      steps: length of the run, for the schedule.
      abstract: the model's state, whose metadata tells a matrix's input and output axes.
      frozen: first names of parameters that stay as they are and cost no memory here.
    """
    flat = nnx.to_flat_state(abstract)

    def tree(leaf: Any) -> dict:
        return nnx.to_pure_dict(nnx.from_flat_state({path: leaf(path, v) for path, v in flat}))

    def dims(path: tuple, variable: nnx.Variable) -> MuonDimensionNumbers | None:
        about = variable.get_metadata()
        inputs = about.get("inputs")
        if "blocks" not in path or inputs is None:
            return None
        axes = range(1 + about.get("lead", 0), variable.ndim)  # before them the layer, the expert
        return MuonDimensionNumbers(tuple(axes[:inputs]), tuple(axes[inputs:]))

    clip = optax.clip_by_global_norm(optim.clip_norm) if optim.clip_norm else optax.identity()
    adamw = optax.adamw(
        schedule(optim, steps),
        optim.b1,
        optim.b2,
        optim.eps,
        weight_decay=optim.weight_decay,
        mask=tree(lambda path, _: path[-1] == "weight"),
    )
    if optim.name == "adamw" and not frozen:
        return optax.chain(clip, adamw)
    muon = optax.contrib.muon(
        schedule(optim, steps, optim.muon_lr),
        weight_decay=optim.weight_decay,
        muon_weight_dimension_numbers=tree(dims),
    )

    # What is no matrix goes to our own AdamW: that inside optax's muon decays vectors, too.
    def group(path: tuple, variable: nnx.Variable) -> str:
        if path[0] in frozen:
            return "frozen"
        return "muon" if optim.name == "muon" and dims(path, variable) else "adamw"

    parts: Any = {"muon": muon, "adamw": adamw, "frozen": optax.set_to_zero()}
    return optax.chain(clip, optax.partition(parts, tree(group)))


def state_shardings(
    optimizer: optax.GradientTransformation,
    params: Any,
    shardings: Any,
    other: jax.sharding.Sharding,
) -> Any:
    """Shardings of the optimizer's state: every copy of a parameter is laid out as the parameter.

    Args:
      optimizer: the chain.
      params: abstract parameters (pure dict).
      shardings: their shardings, of the same structure.
      other: layout of what is no copy of a parameter (counters).
    """
    layouts = {_dict_keys(path): sharding for path, sharding in jax.tree.leaves_with_path(shardings)}

    def layout(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.sharding.Sharding:
        keys = _dict_keys(path)  # (wrappers..., path of the parameter)
        found = [layouts[keys[i:]] for i in range(len(keys)) if keys[i:] in layouts]
        if leaf.ndim > 1 and not found:
            raise ValueError(
                f"optimizer leaf {keys} {leaf.shape} is no copy of a parameter: give it a layout"
            )
        return found[0] if found and leaf.ndim else other

    return jax.tree.map_with_path(layout, jax.eval_shape(optimizer.init, params))


def _dict_keys(path: Any) -> tuple:
    return tuple(entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey))
