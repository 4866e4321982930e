"""Losses of a trained run on data of one's choice."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from jaxgpt.batch import Batch
from jaxgpt.checkpoint.whole import load_base
from jaxgpt.config.data import Data, Text
from jaxgpt.data.loader import validation_parts
from jaxgpt.errors import NotFinite
from jaxgpt.models import abstract_model, assemble, init_memory
from jaxgpt.objectives import before, make_objective
from jaxgpt.sample.load import Trained, load_trained
from jaxgpt.sharding import row_shards
from jaxgpt.target import Target
from jaxgpt.text.vocabulary import Vocabulary
from jaxgpt.train.reference import add_stored, frozen_reference, has_reference
from jaxgpt.train.step import eval_step, evaluation_sums, loss_means


def fetch_behind(running: Iterable[Any]) -> Iterator[Any]:
    """Results as numpy arrays, each fetched after the next one was dispatched, so that no device waits.

    Args:
      running: pytrees of arrays that may still be computed; advancing it dispatches the next.
    """
    last: list[Any] = []
    for result in running:
        yield from map(jax.device_get, last)
        last = [result]
    yield from map(jax.device_get, last)


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
      batches: how many batches, of each source of a mixture; 0 means all of the data once.

    Returns:
      `loss` (nats a weighted target), `accuracy`, `targets` (their number), of text `bits_per_byte`.
    """
    return loss_of(load_trained(folder, which=which), data, batch_size=batch_size, batches=batches)


def loss_of(
    trained: Trained, data: Data | None = None, *, batch_size: int = 32, batches: int = 0
) -> dict[str, float]:
    """As `validation_loss`, of a run that is loaded already."""
    run, tokenizer, mesh = trained.run, trained.tokenizer, trained.mesh
    batch_size += -batch_size % row_shards(mesh)
    chosen = data or run.data
    by_source = validation_parts(
        chosen, tokenizer, model_length=run.row, batch_size=batch_size, task=run.task
    )
    frozen = getattr(run.objective, "reference", "") == "frozen"
    if has_reference(run):
        add_stored(trained.folder, "validation", by_source[""].rows)
    target = Target.of(mesh)
    graphdef, _ = abstract_model(run.model, replace(run.compute, remat="none"), target)
    objective = make_objective(run.objective, Vocabulary.of(tokenizer))
    # As in training, so that masked LM hides the same tokens; what does not divide so is taken whole.
    parts = run.train.accumulate if batch_size == run.train.batch_size else 1
    parts = 1 if batch_size // parts % row_shards(mesh) else parts

    def step(params: dict, batch: Batch, base: dict | None = None) -> Any:
        own = before(objective, frozen_reference(graphdef, base)) if frozen else objective
        return eval_step(lambda: assemble(graphdef, params), own, parts, batch)

    step, base = jax.jit(step), load_base(trained.folder, mesh) if frozen else None
    # Rows that do not go on from batch to batch have nothing to remember.
    carried = isinstance(chosen, Text) and chosen.contiguous
    memory = init_memory(run.model, run.compute, target, batch_size, evaluation=True) if carried else None
    with jax.set_mesh(mesh):
        found = loss_means(  # of a mixture each source by itself, as in training
            [
                part
                for rows in by_source.values()
                for part in evaluation_sums(
                    step, trained.params, itertools.islice(rows, batches or None), memory, base
                )
            ]
        )
    if not math.isfinite(found["loss"]):
        raise NotFinite("the loss on validation data is")
    return found
