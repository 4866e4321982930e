"""How much each token of a text does for a prediction: three attributions, and how far they agree.

All three are of log-probabilities, in nats. The first two compare the text with a baseline, where the
embedding of every token is replaced by another one. Control tokens, the frame around a text, stay as they are
and get nothing.

- Gradient x input (Shrikumar et al. 2016): the gradient at the text, times embedding less baseline.
- Integrated gradients (Sundararajan et al. 2017, section 3): the same with the mean gradient on the straight
  line from baseline to text, so that attributions sum to the difference (completeness).
- Leave-one-out (Li et al. 2016): what the log-probability loses when the token is masked or deleted.

Shapes: B points of the line, T tokens, D hidden size, C outputs.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxgpt.batch import Batch
from jaxgpt.errors import NotFinite, UserError
from jaxgpt.evals.explain.question import ROWS, Question, Static, answers, batch_of, logprobs_at
from jaxgpt.layers.perturb import perturbing
from jaxgpt.sample.load import Trained

POINTS = ROWS - 2
"""Points inside a panel of the integral; with its ends they fill a batch."""
MOST = 64
"""Panels at most."""
SMALLEST = 0.1
"""Differences below this many nats are held to the error of one of this size."""


class Attribution(NamedTuple):
    """What the tokens of a text do for one output, in nats of its log-probability.

    Attributes:
      output: id of the token or number of the label.
      logprob: for the text.
      baseline: for the baseline.
      gradient_x_input_T, integrated_gradients_T, leave_one_out_T: of each token; 0 where it is fixed.
      steps: points of the integral.
      error: of its sum, as a share of the difference.
    """

    output: int
    logprob: float
    baseline: float
    gradient_x_input_T: np.ndarray
    integrated_gradients_T: np.ndarray
    leave_one_out_T: np.ndarray
    steps: int
    error: float


@dataclass(frozen=True)
class _Panel:
    """A part of the way from the baseline to the text.

    Attributes:
      start, end: of it, as shares of the way.
      ends_2C: log-probabilities there.
      integral_CT: of the gradient times (text less baseline).
      slope_CT: the same product at the end alone.
    """

    start: float
    end: float
    ends_2C: np.ndarray
    integral_CT: np.ndarray
    slope_CT: np.ndarray

    @property
    def error_C(self) -> np.ndarray:
        """What the integral lacks of the difference between the ends."""
        return np.abs(self.integral_CT.sum(-1) - (self.ends_2C[1] - self.ends_2C[0]))


def attribute(
    trained: Trained, question: Question, baseline: int | None = None, bound: float = 0.01
) -> list[Attribution]:
    """Attributions of each of the question's outputs to its tokens.

    The integral is taken over panels of 14 Gauss-Legendre points. What a panel must sum to is known, as the
    difference between its ends: the worst is cut in two until the errors of all add up to at most `bound` of
    every output's difference (or of 0.1 nats, where it is smaller), or there are 64. So points crowd where
    the gradient changes fast, as a norm makes it do near zeros. The error is in the result either way.

    Args:
      trained: the run, in float32.
      question: what is asked.
      baseline: id of the token whose embedding is the baseline; None means zeros.
      bound: of the completeness error.

    Raises:
      UserError: the model's embeddings cannot be reached.
      NotFinite: the model gives NaN.
    """
    panels = [_panel(trained, question, baseline, 0.0, 1.0)]
    low_C, high_C = panels[0].ends_2C
    gradient_CT, scale_C = panels[0].slope_CT, np.maximum(np.abs(high_C - low_C), SMALLEST)
    while (error_C := sum(p.error_C for p in panels) / scale_C).max() > bound and len(panels) < MOST:
        worst = max(panels, key=lambda p: (p.error_C / scale_C).max())
        panels.remove(worst)
        middle = (worst.start + worst.end) / 2
        panels.append(_panel(trained, question, baseline, worst.start, middle))
        panels.append(_panel(trained, question, baseline, middle, worst.end))
    integral_CT, steps = np.sum([p.integral_CT for p in panels], axis=0), POINTS * len(panels)
    left_CT = leave_one_out(trained, question)
    return [
        Attribution(
            output,
            float(high_C[i]),
            float(low_C[i]),
            gradient_CT[i],
            integral_CT[i],
            left_CT[i],
            steps,
            float(error_C[i]),
        )
        for i, output in enumerate(question.outputs)
    ]


def _panel(trained: Trained, question: Question, baseline: int | None, start: float, end: float) -> _Panel:
    """The integral over a part of the way."""
    static, T = Static.of(trained), len(question.tokens)
    points, weights = np.polynomial.legendre.leggauss(POINTS)
    alphas = np.array([start, *(start + (end - start) * (points + 1) / 2), end], np.float32)
    with jax.set_mesh(trained.mesh):
        batch = batch_of(trained, [question] * ROWS)
        alphas_B, free_T = (
            np.zeros(len(batch.tokens_BT), np.float32),
            np.zeros(batch.tokens_BT.shape[1], bool),
        )
        alphas_B[:ROWS], free_T[:T] = alphas, ~np.asarray(question.fixed)
        how = (jnp.asarray(alphas_B), jnp.asarray(free_T), jnp.int32(question.at))
        other = None if baseline is None else jnp.int32(baseline)
        made = _gradients(static, trained.params, batch, other, *how, jnp.asarray(question.outputs))
    logprob_BC, share_CBT = (np.asarray(x, np.float64) for x in made)
    logprob_BC, share_CBT = logprob_BC[:ROWS], share_CBT[:, :ROWS, :T]
    if not (np.isfinite(logprob_BC).all() and np.isfinite(share_CBT).all()):
        raise NotFinite("gradients by the embeddings are")
    integral_CT = np.einsum("b,cbt->ct", weights / 2 * (end - start), share_CBT[:, 1:-1])
    return _Panel(start, end, logprob_BC[[0, -1]], integral_CT, share_CBT[:, -1])


@partial(jax.jit, static_argnums=0)
def _gradients(
    static: Static,
    params: dict,
    batch: Batch,
    baseline: jax.Array | None,
    alphas_B: jax.Array,
    free_T: jax.Array,
    at: jax.Array,
    outputs_C: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities [B, C] at points of the line, and gradients times (text less baseline) [C, B, T]."""
    module = static.build(params)

    def embedded(batch: Batch) -> jax.Array:
        seen: list[jax.Array] = []

        def note(x_BTD: jax.Array) -> jax.Array:
            seen.append(x_BTD)
            return x_BTD

        with perturbing(note):
            module.hidden(batch)  # what follows the embedding is not used, and not compiled
        if len(seen) != 1:
            raise UserError(
                f"a {type(static.model).__name__} looks up {len(seen)} tables of tokens by layers.linear."
                "Embedding, so the way from its one embedding to the prediction is not known; embed once."
            )
        return seen[0]

    text_BTD = embedded(batch)
    base_BTD = jnp.zeros_like(text_BTD)
    if baseline is not None:
        base_BTD = embedded(Batch(jnp.full_like(batch.tokens_BT, baseline), *_rest(batch)))
    way_BTD = jnp.where(free_T[:, None], text_BTD - base_BTD, 0)
    start_BTD = text_BTD - way_BTD
    at_B = jnp.full(len(alphas_B), at)

    def predict(x_BTD: jax.Array) -> jax.Array:
        with perturbing(lambda _: x_BTD.astype(text_BTD.dtype)):
            return logprobs_at(module, batch, at_B)[:, outputs_C]

    logprob_BC, pull = jax.vjp(predict, start_BTD + alphas_B[:, None, None] * way_BTD)

    def share(one_C: jax.Array) -> jax.Array:
        (slope_BTD,) = pull(jnp.broadcast_to(one_C, logprob_BC.shape))
        return jnp.sum(slope_BTD * way_BTD, axis=-1)

    share_CBT = jax.lax.map(share, jnp.eye(len(outputs_C), dtype=logprob_BC.dtype))
    return jax.lax.with_sharding_constraint((logprob_BC, share_CBT), P())


def _rest(batch: Batch) -> tuple[Any, ...]:
    return batch.targets_BT, batch.weights_BT, batch.segments_BT, batch.positions_BT, batch.types_BT


def leave_one_out(trained: Trained, question: Question) -> np.ndarray:
    """What each output's log-probability loses without each token [C, T]; 0 of fixed tokens."""
    alone = question.mask is None and len(question.tokens) == 1  # of which nothing would be left
    places = [t for t, fixed in enumerate(question.fixed) if not (fixed or alone)]
    found = list(answers(trained, [question, *(question.without(t) for t in places)]))
    outputs = list(question.outputs)
    loss_CT = np.zeros((len(outputs), len(question.tokens)))
    for t, made_V in zip(places, found[1:], strict=True):
        loss_CT[:, t] = found[0][outputs] - made_V[outputs]
    return loss_CT


def agreement(methods: dict[str, np.ndarray], fixed: Sequence[bool]) -> list[dict[str, Any]]:
    """Rank correlations of each pair of methods over the tokens that are not fixed.

    Returns:
      `methods` (two names), `spearman` (Spearman 1904) and `kendall` (tau-b; Kendall 1945), each None for
      fewer than three tokens, or where a method tells none apart.
    """
    from scipy import stats

    free_T = ~np.asarray(fixed)
    found = []
    for (a, x_T), (b, y_T) in combinations(methods.items(), 2):
        x, y = x_T[free_T], y_T[free_T]
        told = len(x) > 2 and np.ptp(x) > 0 and np.ptp(y) > 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numbers that differ by rounding alone
            spearman = float(stats.spearmanr(x, y).statistic) if told else None
            kendall = float(stats.kendalltau(x, y).statistic) if told else None
        found.append({"methods": [a, b], "spearman": spearman, "kendall": kendall})
    return found
