"""Losses of a trained run on data of one's choice."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from jaxgpt.batch import Batch
from jaxgpt.config import Chat, Mesh, Text
from jaxgpt.data.loader import validation_batches
from jaxgpt.data.tokenizer import load_tokenizer
from jaxgpt.models import abstract_model
from jaxgpt.objectives import causal_lm
from jaxgpt.sharding import batch_sharding, make_mesh
from jaxgpt.train.checkpoint import load_params, load_run
from jaxgpt.train.step import eval_step, loss_means


def validation_loss(
    folder: str | Path,
    data: Text | Chat | None = None,
    *,
    which: str = "best",
    batch_size: int = 32,
    batches: int = 0,
) -> dict[str, float]:
    """Loss of a run's checkpoint over validation data.

    Args:
      folder: the run's folder.
      data: whose validation part to use; None means the run's own.
      which: `best`, `newest` or a step.
      batch_size: rows at a time.
      batches: how many batches; 0 means all of the data once.

    Returns:
      `loss` (nats a weighted target), `bits_per_byte`, `accuracy`, `targets` (their number).
    """
    run = load_run(folder)
    mesh = make_mesh(Mesh(data=1).resolve(1), jax.devices()[:1])
    params, _ = load_params(folder, run, mesh, which)
    tokenizer = load_tokenizer(Path(folder) / "tokenizer")
    chosen = data or run.data
    rows: Iterable[Batch] = validation_batches(
        chosen, tokenizer, model_length=run.model.context, batch_size=batch_size
    )
    graphdef, _ = abstract_model(run.model, replace(run.compute, remat="none"))
    objective = causal_lm(run.objective, tokenizer.token_bytes())
    step = jax.jit(functools.partial(eval_step, graphdef, objective))
    layout = batch_sharding(mesh)
    with jax.set_mesh(mesh):
        sums = [
            step(params, jax.tree.map(lambda a: jax.device_put(np.asarray(a), layout), batch))
            for batch in itertools.islice(rows, batches or None)
        ]
    return loss_means(sums)
