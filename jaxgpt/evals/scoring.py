"""Log-probabilities of given tokens under a run's model: what perplexities and tasks are made of.

Shapes: B rows, T tokens per row, K scored targets per row, N tokens of one row, D width, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.progress import track

from jaxgpt.batch import Batch
from jaxgpt.config import ONE_DEVICE, Compute, Headed, Mesh, Model
from jaxgpt.errors import NotFinite, require
from jaxgpt.evals.loss import fetch_behind
from jaxgpt.models import abstract_model, assemble, context_of
from jaxgpt.sample.load import Trained, load_trained
from jaxgpt.sample.program import bucket
from jaxgpt.sample.strategies import argmax
from jaxgpt.sharding import row_shards, spec
from jaxgpt.target import Target
from jaxgpt.text.tokenizer import Tokenizer, before_text, text_ids

log = logging.getLogger(__name__)

Request = tuple[Sequence[int], Sequence[int]]
"""Token ids of a context, which is given, and of its continuation, which is scored."""


class Score(NamedTuple):
    """What a model makes of a continuation."""

    logprob: float
    """Sum over its tokens, in nats."""
    greedy: bool
    """Whether each of its tokens is the most likely one, so that greedy decoding would write it."""
    tokens: int
    bytes: int
    """Of UTF-8 that its tokens stand for."""


class Row(NamedTuple):
    """One forward pass's tokens."""

    ids_N: np.ndarray
    """At most one more than the model's context, for the last one is only predicted."""
    start: int
    """Place of the first token that is scored, at least 1; all after it are scored too."""
    given: int | None = None
    """Tokens before the first answer of a dialogue, where that is earlier; None means `start`."""


class Scored(NamedTuple):
    """A batch's numbers, on the device or fetched."""

    logprobs_BK: Any
    greedy_BK: Any
    counts_B: np.ndarray
    """Targets that were scored in each row."""

    def rows(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Of each row, fetched: the log-probabilities of its targets, and whether each is the likeliest."""
        return [(self.logprobs_BK[i, :n], self.greedy_BK[i, :n]) for i, n in enumerate(self.counts_B)]


class Scorer:
    """A causal language model that scores text.

    Args:
      model: the architecture.
      compute: types and kernels.
      params: in the training form (layers stacked), on the mesh.
      tokenizer: reads text; its ids are the ones that greedy decoding chooses from.
      mesh: where params live; rows are spread over its `data`, `fsdp` and `expert` axes.
      bos: whether a text begins with `<|bos|>`, as in training; None means as the tokenizer does.

    Raises:
      UserError: the model does not predict the next token.
    """

    def __init__(
        self,
        model: Model,
        compute: Compute,
        params: dict,
        tokenizer: Tokenizer,
        mesh: jax.sharding.Mesh,
        bos: bool | None = None,
    ) -> None:
        require(
            not isinstance(model, Headed) and model.causal,
            f"a {type(model).__name__}{'' if model.causal else ' that sees both sides'} does not predict "
            "the next token, so it gives texts no probability; give a run of a causal language model.",
        )
        self.model, self.compute, self.params = model, replace(compute, remat="none"), params
        self.target = Target.of(mesh)
        self.context = context_of(model, params)
        """Maximum number of tokens of a text."""
        self.tokenizer, self.mesh = tokenizer, mesh
        self.bos = tokenizer.adds_bos if bos is None else bos
        self.before = before_text(tokenizer, self.bos)
        """The id that a text follows of which even the first token is scored."""
        self.truncated = 0
        """Requests that lost the beginning of their context so far."""
        self._bytes_V = tokenizer.token_bytes()

    @classmethod
    def of(cls, trained: Trained) -> Scorer:
        """The scorer of a loaded run."""
        run = trained.run
        return cls(run.model, run.compute, trained.params, trained.tokenizer, trained.mesh, trained.bos)

    @classmethod
    def load(cls, folder: str | Path, *, which: str = "best", mesh: Mesh = ONE_DEVICE) -> Scorer:
        """The scorer of a run's folder; see `load_trained`."""
        return cls.of(load_trained(folder, which=which, mesh=mesh))

    def encode(self, text: str) -> list[int]:
        """The ids of a document that begins with this text."""
        return text_ids(self.tokenizer, text, self.bos)

    def pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The ids of a context and of its continuation, tokenized together as they are read.

        Spaces that end the context are scored with the continuation, since tokens begin with them
        (as lm-evaluation-harness does). Where nothing is given, `before` is.

        Args:
          context: what is given; may be empty.
          continuation: what is scored.
        """
        given = self.encode(context.rstrip())
        return given or [self.before], self.encode(context + continuation)[len(given) :]

    def token_logprobs(
        self,
        requests: Sequence[Request],
        batch_size: int = 32,
        about: str = "",
        prefix: Sequence[int] | None = None,
    ) -> list[Score]:
        """Scores of continuations, each given its context.

        A context too long for the model loses its beginning; that is counted in `truncated` and said.

        Args:
          requests: pairs of a context of at least one token and a continuation.
          batch_size: rows at a time.
          about: what the progress line says; nothing for none.
          prefix: tokens of each context that a prefix LM sees both ways, those before a dialogue's first
            answer; None means all.

        Raises:
          UserError: an empty context, or a continuation longer than the model's context.
        """
        context, cut, rows = self.context, 0, []
        for i, (given, scored) in enumerate(requests):
            require(len(given) > 0, f"the context of request {i} is empty; give at least one token.")
            require(
                len(scored) <= context,
                f"the continuation of request {i} has {len(scored)} tokens but the model's context is "
                f"{context}; shorten it.",
            )
            ids_N = np.asarray([*given, *scored][-(context + 1) :], np.int32)
            lost = len(given) + len(scored) - len(ids_N)
            seen = None if prefix is None else max(1, prefix[i] - lost)
            cut += len(given) + len(scored) > context + 1
            rows.append(Row(ids_N, len(ids_N) - len(scored), seen))
        if cut:
            self.truncated += cut
            log.warning(
                "%d of %d contexts lose their beginning, being longer than the model's context of %d tokens",
                cut, len(rows), context,
            )  # fmt: skip
        found = self.score_rows(rows, batch_size, about)
        return [
            Score(
                float(logprobs_K.sum(dtype=np.float64)),
                bool(greedy_K.all()),
                len(logprobs_K),
                int(self._bytes_V[row.ids_N[row.start :]].sum()),
            )
            for row, (logprobs_K, greedy_K) in zip(rows, found, strict=True)
        ]

    def score_rows(
        self, rows: Sequence[Row], batch_size: int = 32, about: str = ""
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each row the log-probabilities [K] of its scored tokens, and whether each is the likeliest.

        Rows are sorted by length, so that those of a batch need little padding.
        """
        require(batch_size >= 1, f"batch_size is {batch_size}; it must be at least 1.")
        order = sorted(range(len(rows)), key=lambda i: (len(rows[i].ids_N), -rows[i].start), reverse=True)
        parts = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        found: list[Any] = [None] * len(rows)
        B = self.batch_rows(len(rows), batch_size)

        def dispatch(part: list[int]) -> Scored:
            chosen = [rows[i] for i in part]
            T = bucket(max(1, *(len(row.ids_N) - 1 for row in chosen)), self.context)
            return self.score_batch(chosen, T, B)[0]

        for part, scores in zip(parts, fetch_behind(map(dispatch, progress(parts, about))), strict=True):
            for i, score in zip(part, scores.rows(), strict=True):
                found[i] = score
                require_finite(score[0])
        return found

    def batch_rows(self, count: int, batch_size: int) -> int:
        """Rows of every batch where there are `count` in all: few different sizes, that the mesh divides."""
        size = min(batch_size, 1 << (count - 1).bit_length())
        return size + -size % row_shards(self.mesh)

    def score_batch(self, rows: Sequence[Row], T: int, B: int, memory: Any = None) -> tuple[Scored, Any]:
        """One forward pass over `rows`, padded to B rows of T tokens; it may still be running.

        Args:
          rows: of at most T + 1 tokens; one of fewer than 2 is padding.
          T, B: shape.
          memory: of a recurrent model, B rows; None for others.

        Returns:
          What `Scored.rows` gives as `score_rows` does, once it is fetched; and the new memory.
        """
        counts = [max(0, len(row.ids_N) - row.start) for row in rows]
        batch, start_B = _to_batch(rows, T, B, memory)
        layout = NamedSharding(self.mesh, spec(("batch",)))
        K = bucket(max(1, *counts), T)
        with jax.set_mesh(self.mesh):
            batch, start_B = jax.device_put((batch, start_B), layout)
            statics = (self.model, self.compute, self.target, self.tokenizer.vocab_size, K)
            logprobs_BK, greedy_BK, memory = score(*statics, self.params, batch, start_B)
        return Scored(logprobs_BK, greedy_BK, np.asarray(counts)), memory


def _to_batch(rows: Sequence[Row], T: int, B: int, memory: Any) -> tuple[Batch, np.ndarray]:
    """The rows as a batch whose weights are on the scored targets, and each row's first place of them.

    The weights tell a prefix LM what is prompt: the tokens before the first answer, as in training.
    """
    arrays: Any = (*np.zeros((3, B, T), np.int32), np.zeros((B, T), np.float32))
    tokens_BT, targets_BT, segments_BT, weights_BT = arrays
    start_B = np.zeros(B, np.int32)
    for i, (ids_N, start, given) in enumerate(rows):
        n = max(0, len(ids_N) - 1)
        tokens_BT[i, :n], targets_BT[i, :n], segments_BT[i, :n] = ids_N[:n], ids_N[1:], 1
        weights_BT[i, (start if given is None else given) - 1 : n], start_B[i] = 1, start - 1
    positions_BT: Any = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    return Batch(tokens_BT, targets_BT, weights_BT, segments_BT, positions_BT, memory=memory), start_B


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def score(
    model: Model,
    compute: Compute,
    target: Target,
    vocab: int,
    K: int,
    params: dict,
    batch: Batch,
    start_B: jax.Array,
) -> tuple[jax.Array, jax.Array, Any]:
    """Log-probabilities [B, K] of the targets from place `start_B` on, whether each is the likeliest
    of the tokenizer's ids [B, K] (the lowest of a tie), and the memory.

    Logits are computed at those places alone, and `compute.loss_chunk` of them at a time.
    """
    module = assemble(abstract_model(model, compute, target)[0], params)
    features = module.hidden(batch)
    B, T = batch.tokens_BT.shape
    at_BK = jnp.minimum(start_B[:, None] + jnp.arange(K), T - 1)
    x_BKD = jnp.take_along_axis(features.x_BTD, at_BK[..., None], axis=1)
    targets_BK = jnp.take_along_axis(batch.targets_BT, at_BK, axis=1)

    def one(part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x_BD, targets_B = part
        logits_BV = module.logits(x_BD)
        hit_B = jnp.take_along_axis(logits_BV, targets_B[:, None], axis=-1)[:, 0]
        greedy_B = argmax(logits_BV[:, :vocab]) == targets_B
        return hit_B - jax.nn.logsumexp(logits_BV, axis=-1), greedy_B

    chunk = max(1, compute.loss_chunk // B)
    columns = (x_BKD.swapaxes(0, 1), targets_BK.T)
    logprobs_KB, greedy_KB = jax.lax.map(one, columns, batch_size=min(chunk, K))
    whole = jax.lax.with_sharding_constraint((logprobs_KB.T, greedy_KB.T), P())
    return *whole, features.memory


def require_finite(logprobs_K: np.ndarray) -> None:
    """Refuse log-probabilities that no score can be made of.

    Raises:
      NotFinite: one is NaN or infinite.
    """
    if not np.isfinite(logprobs_K).all():
        raise NotFinite("log-probabilities of tokens of the text are")


def progress(parts: Iterable[Any], about: str) -> Any:
    """The parts in turn, with a progress line on standard error while it is a terminal."""
    console = Console(stderr=True)
    return track(parts, about, console=console, transient=True, disable=not (about and console.is_terminal))
