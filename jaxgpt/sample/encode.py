"""Texts to vectors by any run: the mean of a text's last hidden states. Retrieval compares them.

Shapes: N texts, B rows, T tokens per row, D width.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxgpt.batch import Batch
from jaxgpt.checkpoint.whole import params_digest
from jaxgpt.config import Compute, Headed, Model
from jaxgpt.errors import NotFinite
from jaxgpt.models import abstract_model, assemble, context_of
from jaxgpt.sample.load import Trained, load_trained
from jaxgpt.sample.program import bucket
from jaxgpt.sharding import row_shards, spec
from jaxgpt.target import Target
from jaxgpt.text.tokenizer import before_text, text_ids

log = logging.getLogger(__name__)

Pooling = Literal["mean", "first", "last"]
ROWS = 32
"""Texts encoded at a time."""


def reading_ids(trained: Trained, text: str) -> list[int]:
    """The ids that a model reads for a text: as in training, between `<|bos|>` and `<|eos|>` where it sees
    both sides.
    """
    if trained.run.model.causal:
        return text_ids(trained.tokenizer, text, trained.bos)
    control = trained.tokenizer.control
    return [control["<|bos|>"], *trained.tokenizer.encode(text), control["<|eos|>"]]


def pooled(x_BTD: jax.Array, real_BT: jax.Array, pooling: Pooling) -> jax.Array:
    """One vector [B, D] of each row: the mean over its tokens, or its first or last token's features.

    Args:
      x_BTD: features.
      real_BT: 1 on a row's tokens, 0 on the padding after them.
      pooling: which.
    """
    count_B1 = real_BT.sum(axis=1, keepdims=True)
    if pooling == "mean":
        return (x_BTD * real_BT[..., None]).sum(axis=1) / count_B1
    place_B1 = jnp.zeros_like(count_B1) if pooling == "first" else count_B1 - 1
    return jnp.take_along_axis(x_BTD, place_B1[..., None], axis=1)[:, 0]


class RunEncoder:
    """A trained run as an encoder of texts; those beyond its context count up to there (said once).

    Args:
      trained: the run.
    """

    def __init__(self, trained: Trained) -> None:
        self._trained, self._told = trained, False
        self.identity = params_digest(trained.params)

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """One vector for each text [N, D], float32.

        Raises:
          NotFinite: the model gives NaN or infinity.
        """
        trained = self._trained
        context = context_of(trained.run.model, trained.params)
        nothing = [before_text(trained.tokenizer, trained.bos)]
        rows = [reading_ids(trained, text) or nothing for text in texts]
        if not self._told and max(map(len, rows), default=0) > context:
            self._told = True
            log.warning("texts are encoded up to the model's context of %d tokens", context)
        found_ND = np.zeros((len(rows), trained.run.model.width), np.float32)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        size = ROWS + -ROWS % row_shards(trained.mesh)
        for start in range(0, len(order), size):
            part = order[start : start + size]
            found_ND[part] = self._batch([rows[i][:context] for i in part], context)
        if not np.isfinite(found_ND).all():
            raise NotFinite("what the encoder computes for a text is")
        return found_ND

    def _batch(self, rows: Sequence[Sequence[int]], context: int) -> np.ndarray:
        run, mesh = self._trained.run, self._trained.mesh
        B = 1 << (len(rows) - 1).bit_length()
        B, T = B + -B % row_shards(mesh), bucket(max(map(len, rows)), context)
        tokens_BT, segments_BT = np.zeros((2, B, T), np.int32)
        for i, row in enumerate(rows):
            tokens_BT[i, : len(row)], segments_BT[i, : len(row)] = row, 1
        places_BT = np.tile(np.arange(T, dtype=np.int32), (B, 1))
        columns: Any = (tokens_BT, tokens_BT, segments_BT.astype(np.float32), segments_BT, places_BT)
        compute = replace(run.compute, remat="none")
        with jax.set_mesh(mesh):
            batch = jax.device_put(Batch(*columns), NamedSharding(mesh, spec(("batch",))))
            made_BD = _encode(run.model, compute, Target.of(mesh), self._trained.params, batch)
        return np.asarray(made_BD)[: len(rows)]


def load_encoder(folder: str | Path, *, which: str = "best", verify: bool = True) -> RunEncoder:
    """The encoder of a run's folder; see `load_trained`."""
    return RunEncoder(load_trained(folder, which=which, verify=verify))


@partial(jax.jit, static_argnums=(0, 1, 2))
def _encode(model: Model, compute: Compute, target: Target, params: dict, batch: Batch) -> jax.Array:
    module: Any = assemble(abstract_model(model, compute, target)[0], params)
    if isinstance(model, Headed):
        module = module.backbone
    x_BTD = module.hidden(batch).x_BTD.astype(jnp.float32)
    mean_BD = pooled(x_BTD, batch.segments_BT, "mean")
    return jax.lax.with_sharding_constraint(mean_BD, P())
