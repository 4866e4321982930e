"""Log-probabilities of the model that a run starts from: computed once, before training, and kept with it.

Objectives such as DPO compare the model with this reference. `RUN/reference/SPLIT.npz` holds its
log-probability of every target of the split's documents, in their order, and what it was computed from. Rows
then have them as the column `reference`. Of a frozen model the step can compute that column itself.

Shapes: N tokens of all documents of a split, B rows, T tokens per row.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console
from rich.progress import track

from jaxgpt.alive import alive
from jaxgpt.batch import Batch
from jaxgpt.checkpoint.whole import load_params, params_digest
from jaxgpt.config import Run, load_run
from jaxgpt.data.loader import ValidationBatches
from jaxgpt.data.packing import PackedExamples, Rows
from jaxgpt.errors import library_errors, require
from jaxgpt.files import parse_json, to_json, write_bytes
from jaxgpt.models import abstract_model, assemble
from jaxgpt.sharding import batch_sharding, place_rows, process_rows, replicated
from jaxgpt.target import Target

log = logging.getLogger(__name__)

FOLDER, COLUMN = "reference", "reference"


class About(TypedDict):
    """What a file was computed from: digests of the documents and of the parameters."""

    data: str
    base: str


def has_reference(run: Run) -> bool:
    """Whether rows need the column."""
    return getattr(run.objective, "reference", "") == "stored"


def add_reference(
    run: Run,
    mesh: jax.sharding.Mesh,
    splits: Mapping[str, Rows],
    base: dict | None = None,
    *,
    verify: bool = True,
    progress: bool = True,
) -> None:
    """Give the rows of a run's data the column `reference`: what is stored, or else computed now and stored.

    Args:
      run: the config; the reference is the model of `init_from`.
      mesh: to compute on.
      splits: rows by the name of their split.
      base: the parameters of `init_from`, where they are here already.
      verify: compare the checksums of what is loaded.
      progress: show a progress line on standard error.

    Raises:
      UserError: a stored file is damaged; or something is to be computed, but the model of `init_from` is not
        the one that the rest was computed from.
    """
    stored = {name: _read(run.folder, name) for name in splits}
    digest = ""
    for name, rows in splits.items():
        assert isinstance(rows, PackedExamples), "preferences are packed whole"
        about, logprobs_N = stored[name] or (None, np.zeros(0, np.float32))
        if about is None or about["data"] != rows.digest:
            if base is None:
                base, step = load_params(run.init_from, load_run(run.init_from), mesh, verify=verify)
                log.info("the reference is %s, step %d", run.init_from, step)
            digest = digest or params_digest(base)
            _require_same(run, digest, [one[0] for one in stored.values() if one])
            logprobs_N = _compute(run, mesh, base, rows, name, progress)
            if jax.process_index() == 0:
                _write(run.folder, name, {"data": rows.digest, "base": digest}, logprobs_N)
        rows.columns[COLUMN] = logprobs_N


def frozen_reference(graphdef: nnx.GraphDef, base: Any) -> Callable[[Batch], Batch]:
    """Gives batches the column in traced code, from a frozen model."""

    def change(batch: Batch) -> Batch:
        model: Any = assemble(graphdef, base)
        logprob_BT = model.target_logprobs(model.hidden(batch, None).x_BTD, batch.targets_BT)
        return replace(batch, extra=batch.extra | {COLUMN: jax.lax.stop_gradient(logprob_BT)})

    return change


def add_stored(folder: Path, split: str, rows: Rows) -> None:
    """Give rows the column from a run's folder.

    Raises:
      UserError: it is not there, is damaged, or was computed from other data.
    """
    assert isinstance(rows, PackedExamples), "preferences are packed whole"
    found, path = _read(folder, split), _path(folder, split)
    require(
        found is not None and found[0]["data"] == rows.digest,
        f"{path} {'was computed from other data' if found else 'does not exist'}; bring back what the run "
        "was trained with.",
    )
    if found is not None:
        rows.columns[COLUMN] = found[1]


def _require_same(run: Run, base: str, stored: list[About]) -> None:
    require(
        all(about["base"] == base for about in stored),
        f"init_from {run.init_from!r} is no longer the model that {run.folder / FOLDER} was computed from; "
        "bring it back, or give this run another name.",
    )


def _compute(
    run: Run, mesh: jax.sharding.Mesh, params: dict, rows: PackedExamples, name: str, progress: bool
) -> np.ndarray:
    """The reference's log-probability of each target of the documents [N]."""
    size, layout = run.train.batch_size // run.train.accumulate, batch_sharding(mesh)
    part = process_rows(layout, size)
    found_N = np.zeros(len(rows.columns["tokens"]), np.float32)
    batches = ValidationBatches(rows.in_order(place=np.arange(len(found_N), dtype=np.int32)), size, part)
    step = _step(run, mesh)
    words = f"reference's log-probabilities ({name})"
    show = jax.process_index() == 0 and progress
    console = Console(stderr=True)
    with alive(f"computing the {words}"), jax.set_mesh(mesh):
        for batch in track(batches, words, len(batches), console=console, disable=not show):
            if jax.process_count() > 1:
                batch = jax.tree.map(lambda a: place_rows(layout, size, part, a), batch)
            logprob_BT, place_BT, used_BT = jax.device_get(step(params, batch))
            found_N[place_BT[used_BT]] = logprob_BT[used_BT]
    require(bool(np.isfinite(found_N).all()), f"init_from {run.init_from!r} gives log-probabilities of NaN.")
    return found_N


def _step(run: Run, mesh: jax.sharding.Mesh) -> Callable[[dict, Batch], tuple[jax.Array, ...]]:
    graphdef, _ = abstract_model(run.model, replace(run.compute, remat="none"), Target.of(mesh))

    def step(params: dict, batch: Batch) -> tuple[jax.Array, ...]:
        model: Any = assemble(graphdef, params)
        logprob_BT = model.target_logprobs(model.hidden(batch, None).x_BTD, batch.targets_BT)
        used_BT = batch.segments_BT > 0
        return jnp.where(batch.weights_BT > 0, logprob_BT, 0), batch.extra["place"], used_BT

    return jax.jit(step, out_shardings=replicated(mesh))


def _path(folder: Path, split: str) -> Path:
    return folder / FOLDER / f"{split}.npz"


def _write(folder: Path, split: str, about: About, logprobs_N: np.ndarray) -> None:
    whole = io.BytesIO()
    np.savez(whole, about=np.frombuffer(to_json(about).encode(), np.uint8), logprobs=logprobs_N)
    write_bytes(_path(folder, split), whole.getvalue())


def _read(folder: Path, split: str) -> tuple[About, np.ndarray] | None:
    path, fix = _path(folder, split), "remove it, and it is computed anew"
    if not path.is_file():
        return None
    with library_errors(f"{path} is damaged", fix), np.load(io.BytesIO(path.read_bytes())) as held:
        about, logprobs_N = held["about"].tobytes(), held["logprobs"]
    found = parse_json(about, About, path, fix)
    require(
        logprobs_N.dtype == np.float32 and logprobs_N.ndim == 1 and bool(np.isfinite(logprobs_N).all()),
        f"{path} is damaged (no finite float32 of one axis); {fix}.",
    )
    return found, logprobs_N
