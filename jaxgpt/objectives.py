"""Objectives: functions of (model, batch, key) to a loss sum, a weight sum and metric sums.

Sums, never means: the caller divides the total over all devices and microbatches by the total
weight, so that accumulation by n equals the full batch.

Shapes: B batch, T length, D width, V vocabulary, N chunks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxgpt.batch import Batch
from jaxgpt.config import CausalLM
from jaxgpt.layers.linear import softcap, unembed
from jaxgpt.models.gpt import Decoder

Sums = dict[str, jax.Array]
Objective = Callable[[Decoder, Batch, jax.Array | None], tuple[jax.Array, jax.Array, Sums]]


def causal_lm(config: CausalLM, token_bytes_V: np.ndarray) -> Objective:
    """Next-token cross-entropy, weighted by the batch's weights.

    With weights of 1 on all text it is pretraining; with weights on the answers alone it is the
    instruction objective.

    Args:
      config: its z-loss.
      token_bytes_V: UTF-8 bytes that each token stands for (0 for control tokens), for bits per byte.

    Returns:
      A function to the loss sum in nats (z-loss included), the weight sum, and the sums `nll` (nats
      without z-loss), `correct` (targets that were the most likely token), `bytes`.
    """
    table_V = jnp.asarray(token_bytes_V, jnp.float32)

    def objective(model: Decoder, batch: Batch, key: jax.Array | None) -> tuple[jax.Array, jax.Array, Sums]:
        x_BTD = model.hidden(batch.tokens_BT, batch.positions_BT, batch.segments_BT, key)
        chunk = max(1, model.compute.loss_chunk // batch.tokens_BT.shape[0])
        loss, nll, correct = cross_entropy(
            x_BTD,
            model.unembedding,
            batch.targets_BT,
            batch.weights_BT,
            model.model.logit_softcap,
            config.z_loss,
            chunk,
        )
        nbytes = jnp.sum(batch.weights_BT * jnp.take(table_V, batch.targets_BT, mode="clip"))
        return loss, jnp.sum(batch.weights_BT), {"nll": nll, "correct": correct, "bytes": nbytes}

    return objective


Losses = tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def cross_entropy(
    x_BTD: Float[Array, "B T D"],
    w_VD: Float[Array, "V D"],
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
    return _scan_sums(lambda part: _chunk_losses(part, w_VD, cap, z_loss)[0], split)


def _forward(x_BTD, w_VD, targets_BT, weights_BT, cap, z_loss, chunk):  # noqa: ANN001, ANN202
    split = _chunks(chunk, x_BTD, targets_BT, weights_BT)
    w = w_VD.astype(x_BTD.dtype)

    def body(carry: Any, part: Any) -> Any:
        sums, dw_VD = carry
        losses, dlogits_BTV = _chunk_losses(part, w_VD, cap, z_loss)
        dlogits_BTV = dlogits_BTV.astype(w.dtype)
        dx_BTD = dlogits_BTV @ w
        dims = (((0, 1), (0, 1)), ((), ()))
        dw_VD = dw_VD + jax.lax.dot_general(dlogits_BTV, part[0], dims, preferred_element_type=jnp.float32)
        return (jax.tree.map(jnp.add, sums, losses), dw_VD), dx_BTD

    start = ((jnp.zeros(()),) * 3, jnp.zeros(w_VD.shape, jnp.float32))
    if len(split[0]) == 1:
        (sums, dw_VD), dx_BTD = body(start, jax.tree.map(lambda a: a[0], split))
        return sums, (dx_BTD, dw_VD.astype(w_VD.dtype))
    (sums, dw_VD), dx_NBTD = jax.lax.scan(body, start, split)
    return sums, (jnp.moveaxis(dx_NBTD, 0, 1).reshape(x_BTD.shape), dw_VD.astype(w_VD.dtype))


def _backward(cap, z_loss, chunk, saved, cotangents):  # noqa: ANN001, ANN202
    dx_BTD, dw_VD = saved
    scale = cotangents[0]
    return (dx_BTD * scale).astype(dx_BTD.dtype), dw_VD * scale, None, None


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
    part: tuple[jax.Array, ...], w_VD: jax.Array, cap: float | None, z_loss: float
) -> tuple[Losses, jax.Array]:
    """Loss sums of one chunk, and the gradient of its loss by the uncapped logits [B, T, V]."""
    x_BTD, targets_BT, weights_BT = part
    logits_BTV = softcap(unembed(x_BTD, w_VD), cap)
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
