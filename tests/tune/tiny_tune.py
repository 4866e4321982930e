"""Tiny models under every tuning method, and how to train them for a few steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import jax
from tiny import FLOAT32, GPT2, HERE, MODERN, ONE, VOCABULARY, make_run, mesh, sharp_params, text_batches

from jaxgpt.batch import Batch
from jaxgpt.config import (
    GPT,
    IA3,
    BitFit,
    BottleneckAdapters,
    DoRA,
    LastLayers,
    LoRA,
    Optim,
    PrefixTuning,
    PromptTuning,
    Run,
)
from jaxgpt.models import abstract_model, assemble
from jaxgpt.objectives import make_objective
from jaxgpt.sharding import batch_sharding, param_shardings
from jaxgpt.train.state import Program, State, freeze, init_state, make_program
from jaxgpt.train.step import jit_train_step

SMALL, LATEST = replace(GPT2, context=24), replace(MODERN, context=24)
"""With room for virtual tokens beside rows of 16."""
METHODS: dict[str, Any] = {
    "lora": LoRA(rank=3),
    "rslora": LoRA(rank=3, rank_stabilized=True, targets=("blocks.attention.*", "blocks.mlp.down")),
    "pissa": LoRA(rank=3, init="pissa"),
    "qlora": LoRA(rank=3, base="nf4"),
    "dora": DoRA(rank=3),
    "prompt": PromptTuning(tokens=5),
    "prefix": PrefixTuning(tokens=5),
    "projected": PrefixTuning(tokens=5, projection=7),
    "houlsby": BottleneckAdapters(size=3),
    "parallel": BottleneckAdapters(size=3, place="parallel", norms=False, scale=4.0),
    "ia3": IA3(),
    "bitfit": BitFit(),
    "last": LastLayers(layers=1),
}
NOTHING_AT_FIRST = ("lora", "rslora", "pissa", "dora", "houlsby", "parallel", "ia3", "bitfit", "last")
"""Methods that change nothing before the first step."""
MERGED = ("lora", "rslora", "pissa", "qlora", "dora", "ia3", "bitfit", "last")
"""Methods that leave nothing beside weights."""


@dataclass(frozen=True)
class Tuned:
    """A run of a method: its program, and the parameters of the model that it tunes."""

    run: Run
    program: Program
    whole: dict
    base: dict
    state: State

    def train(self, batches: Iterable[Batch]) -> tuple[State, list[dict[str, float]]]:
        """Train on these batches; the last state and each step's numbers."""
        step = jit_train_step(self.run, self.program, make_objective(self.run.objective, VOCABULARY))
        layout, state, seen = batch_sharding(self.program.mesh), self.state, []
        state = jax.tree.map(lambda x: x.copy(), state)  # the step takes its memory
        with jax.set_mesh(self.program.mesh):
            for batch in batches:
                state, metrics = step(state, jax.device_put(batch, layout), self.base)
                seen.append({name: float(value) for name, value in metrics.items()})
        return state, seen

    def model(self, learned: dict) -> Any:
        """The model with what was trained, in traced code."""
        return self.program.model(learned, self.base)


def tuned(
    tune: Any, model: Any = SMALL, sizes: Mapping[str, int] = ONE, params: dict | None = None, **parts: Any
) -> Tuned:
    """A method over a model with large random parameters."""
    optim = parts.pop("optim", Optim(peak_lr=1e-2, final_lr=1e-2, schedule="constant", warmup_steps=0))
    run = make_run(model, tune=tune, init_from="base", optim=optim, **parts)
    program = make_program(run, mesh(sizes))
    layout = param_shardings(abstract_model(model, FLOAT32, HERE)[1], program.mesh)
    whole = jax.device_put(params or sharp_params(model), layout)
    return Tuned(run, program, whole, freeze(program, whole), init_state(run, program, whole))


BATCHES = text_batches(3, 8)


@cache
def trained(name: str) -> tuple[Tuned, State, list[dict[str, float]]]:
    """A method after six steps: its case, the last state and each step's numbers."""
    case = tuned(METHODS[name], SMALL if name == "bitfit" else LATEST)
    return case, *case.train(BATCHES * 2)


@cache
def graph(model: GPT, scanned: bool = True) -> Any:
    """A model's graph."""
    return abstract_model(model, FLOAT32, HERE, scanned=scanned)[0]


def logits_of(model: Any, params: dict, batch: Batch) -> jax.Array:
    """Logits [B, T, V] of parameters that `assemble` takes."""

    @jax.jit
    def run(params: dict, batch: Batch) -> jax.Array:
        module = assemble(graph(model), params)
        return module.logits(module.hidden(batch).x_BTD)

    return run(params, batch)
