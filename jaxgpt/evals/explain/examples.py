"""Training examples that speak for a prediction, and those that resemble its text.

Influence is the dot product of two gradients by the output projection: of the example's mean loss, and of the
predicted output's (TracIn at one checkpoint and one layer; Pruthi et al. 2020, sections 3.1 and 3.4). Above
0, a step of gradient descent on the example makes the output likelier. It is one forward derivative along the
question's gradient, so no example's own gradient is ever held. Similarity is the cosine of mean final
features.

Shapes: B examples, T tokens, D hidden size, V vocabulary or labels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxgpt.batch import Batch
from jaxgpt.data.packing import Row, Rows
from jaxgpt.errors import NotFinite
from jaxgpt.evals.explain.question import ROWS, Question, Static, batch_of
from jaxgpt.layers.unembedding import Head
from jaxgpt.sample.encode import pooled
from jaxgpt.sample.load import Trained
from jaxgpt.sample.program import bucket
from jaxgpt.sharding import row_shards, spec

MOST_LOGITS = 2**25
"""Of a batch of examples at a time."""
NAMES = ("tokens", "targets", "weights", "segments", "positions")


class Example(NamedTuple):
    """A training example beside a question.

    Attributes:
      row, document: where it is: number of the row that the run read, and of the document in it from 1.
      tokens: its ids.
      influence: on the question's output; None where the loss is not that of its rows' targets.
      similarity: cosine of its features and the question's.
    """

    row: int
    document: int
    tokens: list[int]
    influence: float | None
    similarity: float


def documents(rows: Rows, most: int) -> Iterator[tuple[int, int, Row]]:
    """(row, document, its columns) of the first documents that training read, none without a target."""
    count = 0
    for number in range(len(rows)):
        row = rows[number]
        for document in dict.fromkeys(row["segments"][row["segments"] > 0].tolist()):
            here = row["segments"] == document
            if row["weights"][here].any():
                yield number, document, {k: v[here] for k, v in row.items() if np.ndim(v)}
                count += 1
                if count == most:
                    return
        if number + 1 >= rows.epoch_rows:  # later epochs hold the same examples
            return


def compare_examples(
    trained: Trained, question: Question, rows: Rows, most: int, *, influence: bool
) -> list[Example]:
    """The first examples that training read, beside the question's first output.

    Args:
      trained: the run, in float32.
      question: what is asked.
      rows: of its training data.
      most: number of examples.
      influence: whether the loss is that of the rows' targets, so that gradients can be compared.

    Raises:
      NotFinite: the model gives NaN.
    """
    static, found = Static.of(trained), list[Example]()
    with jax.set_mesh(trained.mesh):
        at = (batch_of(trained, [question]), jnp.int32(question.at), jnp.int32(question.outputs[0]))
        slope, mine_D = _question(static, trained.params, *at)
        for part in _parts(documents(rows, most), trained):
            batch = _batch(trained, [columns for _, _, columns in part])
            made = _examples(static, influence, trained.params, slope, mine_D, batch)
            dots_B, cosines_B = jax.tree.map(np.asarray, made)
            for i, (row, document, columns) in enumerate(part):
                dot = None if dots_B is None else float(dots_B[i])
                one = Example(row, document, columns["tokens"].tolist(), dot, float(cosines_B[i]))
                found.append(one)
    if not np.isfinite([(one.influence or 0.0, one.similarity) for one in found]).all():
        raise NotFinite("features or gradients of training examples are")
    return found


Part = list[tuple[int, int, Row]]


def _parts(found: Iterator[tuple[int, int, Row]], trained: Trained) -> Iterator[Part]:
    """Documents in their order, as many at a time as their logits fit."""
    part, longest = list[tuple[int, int, Row]](), 0
    for one in found:
        longer = max(longest, bucket(len(one[2]["tokens"]), trained.run.length))
        full = (len(part) + 1) * longer * _outputs(trained) > MOST_LOGITS
        if part and (full or len(part) == ROWS):
            yield part
            part, longer = [], bucket(len(one[2]["tokens"]), trained.run.length)
        part.append(one)
        longest = longer
    if part:
        yield part


def _outputs(trained: Trained) -> int:
    return len(trained.run.task.labels) if trained.run.task else trained.run.model.vocab_size


def _batch(trained: Trained, parts: Sequence[Row]) -> Batch:
    """Documents as rows of their own."""
    B = 1 << (len(parts) - 1).bit_length()
    B += -B % row_shards(trained.mesh)
    T = bucket(max(len(part["tokens"]) for part in parts), trained.run.length)
    names = (*NAMES, "types") if "types" in parts[0] else NAMES
    columns = {
        f"{name}_BT": np.zeros((B, T), np.float32 if name == "weights" else np.int32) for name in names
    }
    for i, part in enumerate(parts):
        for name in names:
            columns[f"{name}_BT"][i, : len(part[name])] = 1 if name == "segments" else part[name]
    made: dict[str, Any] = columns
    return jax.device_put(Batch(**made), NamedSharding(trained.mesh, spec(("batch",))))


@partial(jax.jit, static_argnums=0)
def _question(
    static: Static, params: dict, batch: Batch, at: jax.Array, output: jax.Array
) -> tuple[Head, jax.Array]:
    """The gradient of the output's loss by the output projection, and the text's features [D]."""
    module = static.build(params)
    x_BTD = module.hidden(batch).x_BTD
    x_D = module.transform(x_BTD)[0, at]

    def loss(head: Head) -> jax.Array:
        return -jax.nn.log_softmax(head(x_D))[output]

    mean_D = pooled(x_BTD.astype(jnp.float32), batch.segments_BT, "mean")[0]
    return jax.lax.with_sharding_constraint((jax.grad(loss)(module.unembedding), mean_D), P())


@partial(jax.jit, static_argnums=(0, 1))
def _examples(
    static: Static, influence: bool, params: dict, slope: Head, mine_D: jax.Array, batch: Batch
) -> tuple[jax.Array | None, jax.Array]:
    """Dot products of each example's gradient with the question's [B], and cosines of features [B]."""
    module = static.build(params)
    x_BTD = module.hidden(batch).x_BTD
    # a row of padding has no token to take the mean of
    real_BT = jnp.where(jnp.arange(batch.segments_BT.shape[1]) == 0, 1, batch.segments_BT)
    mean_BD = pooled(x_BTD.astype(jnp.float32), real_BT, "mean")
    size_B = jnp.linalg.norm(mean_BD, axis=-1) * jnp.linalg.norm(mine_D)
    cosine_B = mean_BD @ mine_D / jnp.maximum(size_B, 1e-30)
    dots_B = None
    if influence:
        inner_BTD = module.transform(x_BTD)

        def losses(head: Head) -> jax.Array:
            logprob_BTV = jax.nn.log_softmax(head(inner_BTD), axis=-1)
            hit_BT = jnp.take_along_axis(logprob_BTV, batch.targets_BT[..., None], axis=-1)[..., 0]
            total_B = jnp.maximum(batch.weights_BT.sum(1), 1e-30)
            return -(hit_BT * batch.weights_BT).sum(1) / total_B

        _, dots_B = jax.jvp(losses, (module.unembedding,), (slope,))
    return jax.lax.with_sharding_constraint((dots_B, cosine_B), P())
