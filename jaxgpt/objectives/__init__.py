"""Objectives: functions of (model, batch, key) to sums of loss, weight and metrics.

Sums, never means: the caller divides the total over all devices and microbatches by the total
weight, so that accumulation by n equals the full batch.

Shapes: B batch, T length, D width, V vocabulary, N chunks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxgpt.batch import Batch, Features
from jaxgpt.config import CausalLM, Classification, MaskedLM, require
from jaxgpt.layers.linear import softcap, unembed
from jaxgpt.objectives.masking import mask_tokens
from jaxgpt.text.vocabulary import Vocabulary

Metrics = dict[str, jax.Array]


class Sums(NamedTuple):
    """What an objective makes of a batch.

    Attributes:
      loss: in nats, what is minimised.
      weight: of the targets.
      metrics: sums `nll` (nats without z-loss and balancing), `correct` (targets that were the most
        likely), `bytes` (of UTF-8 that the targets stand for, where that means something; else 0).
      memory: of a recurrent model, for the next batch.
    """

    loss: jax.Array
    weight: jax.Array
    metrics: Metrics
    memory: Any = None


Objective = Callable[[Any, Batch, jax.Array | None], Sums]


def causal_lm(config: CausalLM, vocabulary: Vocabulary) -> Objective:
    """Next-token cross-entropy, weighted by the batch's weights.

    With weights of 1 on all text it is pretraining; with weights on the answers alone it is the
    instruction objective.
    """
    bytes_V = jnp.asarray(vocabulary.bytes_V, jnp.float32)

    def objective(model: Any, batch: Batch, key: jax.Array | None) -> Sums:
        sums = score(model, model.hidden(batch, key), batch, config.z_loss)
        nbytes = jnp.sum(batch.weights_BT * jnp.take(bytes_V, batch.targets_BT, mode="clip"))
        return sums._replace(metrics=sums.metrics | {"bytes": nbytes})

    return objective


def masked_lm(config: MaskedLM, vocabulary: Vocabulary) -> Objective:
    """Cross-entropy of hidden tokens (Devlin et al. 2019, section 3.1), chosen anew for every key.

    Without a key, as in evaluation, the choice is a function of the batch alone: validation losses
    of one model are then the same each time, and those of two comparable.

    Raises:
      UserError: the tokenizer has no mask token.
    """
    require(
        vocabulary.mask is not None,
        "objective MaskedLM() needs a tokenizer with the control token '<|mask|>'; this one has none: "
        "train it again with `jaxgpt tokenizer train`.",
    )

    def objective(model: Any, batch: Batch, key: jax.Array | None) -> Sums:
        if key is None:
            mask_key = jax.random.fold_in(jax.random.key(0), jnp.sum(batch.tokens_BT))
        else:
            mask_key, key = jax.random.split(key)
        masked = mask_tokens(config, vocabulary, batch, mask_key)
        return score(model, model.hidden(masked, key), masked)

    return objective


def classification(config: Classification, vocabulary: Vocabulary) -> Objective:
    """Cross-entropy of labels at the weighted tokens; the batch's targets are label numbers."""

    def objective(model: Any, batch: Batch, key: jax.Array | None) -> Sums:
        return score(model, model.hidden(batch, key), batch)

    return objective


OBJECTIVES: dict[type, Callable[[Any, Vocabulary], Objective]] = {
    CausalLM: causal_lm,
    MaskedLM: masked_lm,
    Classification: classification,
}
"""The function of each objective's config."""


def make_objective(objective: Any, vocabulary: Vocabulary) -> Objective:
    """The function that an objective's config describes."""
    return OBJECTIVES[type(objective)](objective, vocabulary)


def score(model: Any, features: Features, batch: Batch, z_loss: float = 0.0) -> Sums:
    """Cross-entropy of the batch's targets under the model's output projection, and the balancing loss."""
    chunk = max(1, model.compute.loss_chunk // batch.tokens_BT.shape[0])
    x_BTD, targets_BT, weights_BT = model.transform(features.x_BTD), batch.targets_BT, batch.weights_BT
    if getattr(model, "adaptive", None) is not None:
        loss, nll, correct = _adaptive_losses(model, x_BTD, targets_BT, weights_BT, z_loss, chunk)
    else:
        how = (model.model.logit_softcap, z_loss, chunk)
        loss, nll, correct = cross_entropy(
            x_BTD, model.unembedding, model.output_bias, targets_BT, weights_BT, *how
        )
    weight = jnp.sum(weights_BT)
    metrics = {"nll": nll, "correct": correct, "bytes": jnp.zeros(())}
    return Sums(loss + features.balance * weight, weight, metrics, features.memory)


def _adaptive_losses(
    model: Any, x_BTD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, z_loss: float, chunk: int
) -> Losses:
    """As `cross_entropy`, of an `AdaptiveSoftmax`: each chunk is computed again in the backward pass."""
    require(
        z_loss == 0,
        f"objective.z_loss is {z_loss} but the adaptive softmax of model.cutoffs has no one log-partition; "
        "set it to 0.",
    )

    @jax.checkpoint
    def losses(part: tuple[jax.Array, ...]) -> Losses:
        x_BTD, targets_BT, weights_BT = part
        hit_BT, top_BT = model.scores(targets_BT, x_BTD)
        nll = -jnp.sum(weights_BT * hit_BT)
        return nll, nll, jnp.sum(weights_BT * (hit_BT >= top_BT))

    return _scan_sums(losses, _chunks(chunk, x_BTD, targets_BT, weights_BT))


Losses = tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def cross_entropy(
    x_BTD: Float[Array, "B T D"],
    w_VD: Float[Array, "V D"],
    bias_V: Float[Array, " V"] | None,
    targets_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"],
    cap: float | None,
    z_loss: float,
    chunk: int,
) -> Losses:
    """Output projection and cross-entropy together, `chunk` positions of every row at a time.

    Logits of the whole batch never exist at once. Under differentiation the gradients of x and w
    are made in the forward pass, chunk by chunk, so that no logits are computed twice.

    Args:
      x_BTD: features.
      w_VD: output projection.
      bias_V: its bias, or None.
      targets_BT: token ids.
      weights_BT: weight of each target; gets no gradient.
      cap: logit soft-cap or None.
      z_loss: weight of the squared log-partition (PaLM, section 5).
      chunk: positions a row whose logits are held at a time, lowered to a divisor of T.

    Returns:
      Sums over all targets of: the loss in nats, its part without z-loss, and correct predictions
      (the last two carry no gradient).
    """
    split = _chunks(chunk, x_BTD, targets_BT, weights_BT)
    return _scan_sums(lambda part: _chunk_losses(part, w_VD, bias_V, cap, z_loss)[0], split)


def _forward(x_BTD, w_VD, bias_V, targets_BT, weights_BT, cap, z_loss, chunk):  # noqa: ANN001, ANN202
    split = _chunks(chunk, x_BTD, targets_BT, weights_BT)
    w = w_VD.astype(x_BTD.dtype)

    def body(carry: Any, part: Any) -> Any:
        sums, dw_VD, db_V = carry
        losses, dlogits_BTV = _chunk_losses(part, w_VD, bias_V, cap, z_loss)
        db_V = None if db_V is None else db_V + jnp.sum(dlogits_BTV, (0, 1))
        dlogits_BTV = dlogits_BTV.astype(w.dtype)
        dx_BTD = dlogits_BTV @ w
        dims = (((0, 1), (0, 1)), ((), ()))
        dw_VD = dw_VD + jax.lax.dot_general(dlogits_BTV, part[0], dims, preferred_element_type=jnp.float32)
        return (jax.tree.map(jnp.add, sums, losses), dw_VD, db_V), dx_BTD

    zeros = None if bias_V is None else jnp.zeros(bias_V.shape)
    start = ((jnp.zeros(()),) * 3, jnp.zeros(w_VD.shape, jnp.float32), zeros)
    if len(split[0]) == 1:
        (sums, dw_VD, db_V), dx_BTD = body(start, jax.tree.map(lambda a: a[0], split))
    else:
        (sums, dw_VD, db_V), dx_NBTD = jax.lax.scan(body, start, split)
        dx_BTD = jnp.moveaxis(dx_NBTD, 0, 1).reshape(x_BTD.shape)
    return sums, (dx_BTD, dw_VD.astype(w_VD.dtype), db_V)


def _backward(cap, z_loss, chunk, saved, cotangents):  # noqa: ANN001, ANN202
    dx_BTD, dw_VD, db_V = saved
    scale = cotangents[0]
    return (
        (dx_BTD * scale).astype(dx_BTD.dtype),
        dw_VD * scale,
        None if db_V is None else db_V * scale,
        None,
        None,
    )


cross_entropy.defvjp(_forward, _backward)


def _chunks(chunk: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Each [B, T, ...] as [N, B, T / N, ...] with T / N the largest divisor of T up to `chunk`."""
    length = arrays[0].shape[1]
    size = max(c for c in range(1, min(chunk, length) + 1) if length % c == 0)

    def split(a: jax.Array) -> jax.Array:
        return jnp.moveaxis(a.reshape(a.shape[0], length // size, size, *a.shape[2:]), 1, 0)

    return tuple(split(a) for a in arrays)


def _scan_sums(f: Callable[[Any], Losses], split: tuple[jax.Array, ...]) -> Losses:
    def body(sums: Losses, part: Any) -> tuple[Losses, None]:
        return jax.tree.map(jnp.add, sums, f(part)), None

    return jax.lax.scan(body, (jnp.zeros(()),) * 3, split)[0]


def _chunk_losses(
    part: tuple[jax.Array, ...],
    w_VD: jax.Array,
    bias_V: jax.Array | None,
    cap: float | None,
    z_loss: float,
) -> tuple[Losses, jax.Array]:
    """Loss sums of one chunk, and the gradient of its loss by the uncapped logits [B, T, V]."""
    x_BTD, targets_BT, weights_BT = part
    logits_BTV = unembed(x_BTD, w_VD)
    logits_BTV = softcap(logits_BTV if bias_V is None else logits_BTV + bias_V, cap)
    top_BT = logits_BTV.max(-1)
    unnormalised_BTV = jnp.exp(logits_BTV - top_BT[..., None])
    total_BT = unnormalised_BTV.sum(-1)
    log_z_BT = top_BT + jnp.log(total_BT)
    hit_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    nll = jnp.sum(weights_BT * (log_z_BT - hit_BT))
    loss = nll + z_loss * jnp.sum(weights_BT * jnp.square(log_z_BT))
    correct = jnp.sum(weights_BT * (hit_BT >= top_BT))

    share_BT = weights_BT * (1 + 2 * z_loss * log_z_BT) / total_BT
    is_target_BTV = jnp.arange(logits_BTV.shape[-1]) == targets_BT[..., None]
    dlogits_BTV = unnormalised_BTV * share_BT[..., None] - weights_BT[..., None] * is_target_BTV
    if cap is not None:
        dlogits_BTV *= 1 - jnp.square(logits_BTV / cap)
    return (loss, nll, correct), dlogits_BTV
