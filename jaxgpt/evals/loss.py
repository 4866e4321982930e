"""Losses of a trained run on data of one's choice."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import jax

from jaxgpt.batch import Batch
from jaxgpt.config import Mesh
from jaxgpt.config.data import Data, Text
from jaxgpt.data.loader import validation_batches
from jaxgpt.data.tokenizer import load_tokenizer
from jaxgpt.data.vocabulary import Vocabulary
from jaxgpt.models import abstract_model, init_memory
from jaxgpt.objectives import make_objective
from jaxgpt.sharding import make_mesh
from jaxgpt.train.checkpoint import load_params, load_run
from jaxgpt.train.step import eval_step, evaluate


def validation_loss(
    folder: str | Path,
    data: Data | None = None,
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
      `loss` (nats a weighted target), `accuracy`, `targets` (their number), of text `bits_per_byte`.
    """
    run = load_run(folder)
    mesh = make_mesh(Mesh(data=1).resolve(1), jax.devices()[:1])
    params, _ = load_params(folder, run, mesh, which)
    tokenizer = load_tokenizer(Path(folder) / "tokenizer")
    chosen = data or run.data
    rows: Iterable[Batch] = validation_batches(
        chosen, tokenizer, model_length=run.model.row, batch_size=batch_size
    )
    graphdef, _ = abstract_model(run.model, replace(run.compute, remat="none"))
    objective = make_objective(run.objective, Vocabulary.of(tokenizer))
    step = jax.jit(functools.partial(eval_step, graphdef, objective))
    # Rows that do not go on from batch to batch have nothing to remember.
    carried = isinstance(chosen, Text) and chosen.contiguous
    memory = init_memory(run.model, run.compute, batch_size, evaluation=True) if carried else None
    with jax.set_mesh(mesh):
        return evaluate(step, params, itertools.islice(rows, batches or None), memory)
