"""One prediction that is to be explained, as rows of a batch and a program that reads it.

Shapes: B rows, T tokens per row, D hidden size, V vocabulary or labels, C outputs that are explained.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxgpt.batch import Batch
from jaxgpt.config import Compute, Model
from jaxgpt.errors import NotFinite
from jaxgpt.models import abstract_model, assemble, context_of
from jaxgpt.sample.load import Trained
from jaxgpt.sample.program import bucket
from jaxgpt.sharding import row_shards, spec
from jaxgpt.target import Target

ROWS = 16
"""Rows of a batch at a time."""


@dataclass(frozen=True)
class Question:
    """One prediction to be explained.

    Attributes:
      tokens: ids that the model reads [T].
      at: the token at which it predicts.
      outputs: ids of tokens, or numbers of labels, whose log-probabilities are explained [C].
      fixed: whether a token stays as it is [T]: control tokens, the frame around the text.
      given: how many tokens at the beginning a prefix LM sees both ways; 0 for none.
      types: type of each token, where there are two texts.
      mask: id that takes a token's place when it is left out; None where it is deleted.
    """

    tokens: tuple[int, ...]
    at: int
    outputs: tuple[int, ...]
    fixed: tuple[bool, ...]
    given: int = 0
    types: tuple[int, ...] | None = None
    mask: int | None = None

    def without(self, place: int) -> Question:
        """The same question with one token left out."""
        if self.mask is not None:
            return replace(self, tokens=(*self.tokens[:place], self.mask, *self.tokens[place + 1 :]))

        def cut(values: tuple[Any, ...]) -> tuple[Any, ...]:
            return values[:place] + values[place + 1 :]

        return replace(
            self,
            tokens=cut(self.tokens),
            at=max(0, self.at - (place <= self.at)),
            fixed=cut(self.fixed),
            given=self.given - (place < self.given),
            types=None if self.types is None else cut(self.types),
        )


class Static(NamedTuple):
    """What a program is compiled for."""

    model: Model
    compute: Compute
    target: Target

    @classmethod
    def of(cls, trained: Trained) -> Static:
        """That of a loaded run."""
        return cls(trained.run.model, trained.run.compute, Target.of(trained.mesh))

    def build(self, params: dict) -> Any:
        """The module, in traced code."""
        return assemble(abstract_model(*self)[0], params)


def in_float32(trained: Trained) -> Trained:
    """The run with float32 everywhere, as differences of log-probabilities need."""
    plain: dict[str, Any] = {"dtype": "float32", "remat": "none", "attention": "xla", "strict": False}
    compute = replace(trained.run.compute, **plain)
    return trained._replace(run=replace(trained.run, compute=compute))


def batch_of(trained: Trained, questions: Sequence[Question], rows: int | None = None) -> Batch:
    """The questions as rows, on the mesh, padded to few different shapes.

    Args:
      trained: the run.
      questions: at least one.
      rows: B at least.
    """
    B = max(len(questions), rows or 0)
    B += -B % row_shards(trained.mesh)
    longest = max(len(q.tokens) for q in questions)
    T = bucket(longest, context_of(trained.run.model, trained.params))
    tokens_BT, segments_BT, types_BT = np.zeros((3, B, T), np.int32)
    weights_BT = np.zeros((B, T), np.float32)
    for i, question in enumerate(questions):
        n = len(question.tokens)
        tokens_BT[i, :n], segments_BT[i, :n] = question.tokens, 1
        weights_BT[i, max(question.given - 1, 0) : n] = 1  # what comes before is prompt to a prefix LM
        if question.types is not None:
            types_BT[i, :n] = question.types
    positions_BT = np.tile(np.arange(T, dtype=np.int32), (B, 1))
    columns: Any = (tokens_BT, tokens_BT, weights_BT, segments_BT, positions_BT)
    typed: Any = types_BT if questions[0].types is not None else None
    return jax.device_put(Batch(*columns, types_BT=typed), NamedSharding(trained.mesh, spec(("batch",))))


@partial(jax.jit, static_argnums=0)
def _logprobs(static: Static, params: dict, batch: Batch, at_B: jax.Array) -> jax.Array:
    module = static.build(params)
    return jax.lax.with_sharding_constraint(logprobs_at(module, batch, at_B), P())


def logprobs_at(module: Any, batch: Batch, at_B: jax.Array) -> jax.Array:
    """Log-probabilities [B, V] of what each row predicts at one token, in traced code."""
    x_BTD = module.hidden(batch).x_BTD
    x_BD = jnp.take_along_axis(x_BTD, at_B[:, None, None], axis=1)[:, 0]
    return jax.nn.log_softmax(module.logits(x_BD), axis=-1)


def answers(trained: Trained, questions: Sequence[Question]) -> Iterator[np.ndarray]:
    """Log-probabilities [V] of the prediction that each question is about, in order.

    Raises:
      NotFinite: the model gives NaN.
    """
    static = Static.of(trained)
    for start in range(0, len(questions), ROWS):
        part = questions[start : start + ROWS]
        with jax.set_mesh(trained.mesh):
            batch = batch_of(trained, part, ROWS)
            at_B = np.zeros(len(batch.tokens_BT), np.int32)
            at_B[: len(part)] = [question.at for question in part]
            made_BV = np.asarray(_logprobs(static, trained.params, batch, jnp.asarray(at_B)))
        if np.isnan(made_BV).any():
            raise NotFinite("log-probabilities are")
        yield from made_BV[: len(part)]
