"""What the layers of a model make of a text: attention maps, their rollout, and the logit lens.

Shapes: T tokens, D hidden size, V vocabulary or labels, L layers, H heads, N hidden states, K likeliest
outputs.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxgpt.batch import Batch
from jaxgpt.errors import NotFinite
from jaxgpt.evals.explain.question import Question, Static, batch_of
from jaxgpt.layers.tape import Tape, recording
from jaxgpt.models import backbone
from jaxgpt.sample.load import Trained

MOST_MAPS = 2**18
"""Numbers of attention maps that are kept of each head; of more, the mean over the heads."""


class Reading(NamedTuple):
    """What is predicted at each token, from one hidden state.

    Attributes:
      top_TK: the likeliest outputs.
      top_logprob_TK: their log-probabilities.
      logprob_T: of the target.
      rank_T: of the target, from 1: how many outputs are likelier, plus one.
      entropy_T: of the distribution, in nats.
    """

    top_TK: np.ndarray
    top_logprob_TK: np.ndarray
    logprob_T: np.ndarray
    rank_T: np.ndarray
    entropy_T: np.ndarray


class Inside(NamedTuple):
    """What is inside the forward pass of one text.

    Attributes:
      own: what the model predicts.
      lens: the same from each hidden state [N = L + 1], 0 being the embedding, as its head would read them
        (nostalgebraist 2020); empty where the module does not say how, or runs no layers by `run_layers`.
      maps_LHTT: attention probabilities; None where there are too many, or none.
      mean_LTT: their mean over the heads; None where there are none.
    """

    own: Reading
    lens: list[Reading]
    maps_LHTT: np.ndarray | None
    mean_LTT: np.ndarray | None


def look_inside(trained: Trained, question: Question, targets_T: list[int], top: int = 5) -> Inside:
    """One forward pass with the tape open.

    Args:
      trained: the run, in float32.
      question: of whose tokens.
      targets_T: the output whose probability and rank are wanted at each token.
      top: K at most.

    Raises:
      NotFinite: the model gives NaN.
    """
    T, model = len(question.tokens), trained.run.model
    with jax.set_mesh(trained.mesh):
        batch = batch_of(trained, [question])
        padded = np.zeros(batch.tokens_BT.shape[1], np.int32)
        padded[:T] = targets_T
        per_head = model.layers * model.heads * T * T <= MOST_MAPS
        statics = (Static.of(trained), top, per_head)
        found = jax.tree.map(np.asarray, _inside(*statics, trained.params, batch, jnp.asarray(padded)))
    lens_N, own = found["lens"], Reading(*(x[0, :T] for x in found["own"]))
    if not np.isfinite(own.logprob_T).all():
        raise NotFinite("log-probabilities of tokens of the text are")
    lens = [] if lens_N is None else [Reading(*(x[i, :T] for x in lens_N)) for i in range(len(lens_N[0]))]
    # A module of the user's may not say what follows its layers; then this lens would be another model's.
    if lens and not np.allclose(lens[-1].logprob_T, own.logprob_T, rtol=1e-3, atol=1e-3):
        lens = []
    maps, mean = (None if x is None else x[..., :T, :T] for x in (found["maps"], found["mean"]))
    return Inside(own, lens, maps, mean)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _inside(
    static: Static, top: int, per_head: bool, params: dict, batch: Batch, targets_T: jax.Array
) -> dict[str, Any]:
    module, layers = static.build(params), static.model.layers
    with recording(Tape(range(layers + 1), range(layers))) as seen:
        x_BTD = module.hidden(batch).x_BTD

    def read(logits_TV: jax.Array) -> Reading:
        logprob_TV = jax.nn.log_softmax(logits_TV, axis=-1)
        best_TK, top_TK = jax.lax.top_k(logprob_TV, min(top, logits_TV.shape[-1]))
        logprob_T = jnp.take_along_axis(logprob_TV, targets_T[:, None], axis=-1)[:, 0]
        rank_T = 1 + jnp.sum(logprob_TV > logprob_T[:, None], axis=-1)
        product_TV = jnp.where(logprob_TV > -jnp.inf, jnp.exp(logprob_TV) * logprob_TV, 0)
        made: Any = (top_TK, best_TK, logprob_T, rank_T, -product_TV.sum(-1))
        return Reading(*made)

    def through_head(x_BTD: jax.Array) -> Reading:
        inner = backbone(module)
        x_BTD = inner.last(x_BTD)
        if inner is not module:
            x_BTD = module.pooled(x_BTD, batch)
        return read(module.logits(x_BTD)[0])

    made: dict[str, Any] = {"lens": None, "maps": None, "mean": None}
    made["own"] = jax.tree.map(lambda x: x[None], read(module.logits(x_BTD)[0]))
    if len(seen.hidden_BTD) == layers + 1:
        made["lens"] = jax.lax.map(through_head, jnp.stack([seen.hidden_BTD[i] for i in range(layers + 1)]))
    if len(seen.attention_BHTS) == layers:
        maps = [seen.attention_BHTS[i][0] for i in range(layers)]
        made["mean"] = jnp.stack([x_HTT.mean(0) for x_HTT in maps])
        made["maps"] = jnp.stack(maps) if per_head else None
    return jax.lax.with_sharding_constraint(made, P())


def rollout(mean_LTT: np.ndarray) -> np.ndarray:
    """How much of each input token reaches each token through all layers [T, T].

    Attention rollout (Abnar & Zuidema 2020, section 3): a layer passes on half of what it attends to and half
    of what the token was; rows sum to one, and layers multiply.
    """
    T = mean_LTT.shape[-1]
    joint_TT = np.eye(T)
    for layer_TT in mean_LTT.astype(np.float64):
        mixed_TT = 0.5 * layer_TT + 0.5 * np.eye(T)
        joint_TT = mixed_TT / mixed_TT.sum(-1, keepdims=True) @ joint_TT
    return joint_TT
