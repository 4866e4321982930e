"""Policy optimisation from rewards of groups (GRPO, Dr. GRPO, DAPO)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxgpt.batch import Batch
from jaxgpt.config import GRPO
from jaxgpt.layers.unembedding import Drawn
from jaxgpt.objectives.sums import Largest, Mean, Metrics, Objective, Sums
from jaxgpt.text.vocabulary import Vocabulary


def drawn_by(config: GRPO, vocabulary: Vocabulary) -> Drawn:
    """How rollouts are drawn."""
    return Drawn(config.temperature, len(vocabulary.bytes_V))


def grpo(config: GRPO, vocabulary: Vocabulary) -> Objective:
    """The clipped surrogate of Shao et al. 2024, equation 3, over completions: one document per row, whose
    targets with weight 1 were drawn.

    Columns in `Batch.extra`: `advantage` [B]; `logprob` [B, T], the sampler's log-probability of each target;
    `kept` [B, T], how many tokens truncation left, where there is truncation; `reference` [B, T],
    log-probabilities of the model to stay close to, where there is one.

    `nll` is the mean of the completions' negative log-probabilities as the loss weighs them. Means over
    tokens are `entropy` (nats), `clip_share`, `kl_rollout` and `kl` (from the policy of the rollout and from
    the reference, by the estimator of Schulman 2020). `logprob_gap` is the largest difference between the
    sampler's and the trainer's log-probability of a token; from the second update on a rollout on, it holds
    what the updates changed, too.
    """
    drawn = drawn_by(config, vocabulary)

    def objective(model: Any, batch: Batch, key: jax.Array | None) -> Sums:
        features, extra, mask_BT = model.hidden(batch, key), batch.extra, batch.weights_BT
        score = (features.x_BTD, batch.targets_BT)
        logprob_BT, entropy_BT = model.drawn_logprobs(*score, extra.get("kept"), drawn)
        change_BT = jnp.where(mask_BT > 0, logprob_BT - extra["logprob"], 0)
        ratio_BT, advantage_B1 = jnp.exp(change_BT), extra["advantage"][:, None]
        bounded_BT = jnp.clip(ratio_BT, 1 - config.clip_low, 1 + config.clip_high)
        gain_BT, safe_BT = ratio_BT * advantage_B1, bounded_BT * advantage_B1
        loss_BT = -jnp.minimum(gain_BT, safe_BT)

        def mean(x_BT: jax.Array) -> Mean:
            return Mean(jnp.sum(mask_BT * jax.lax.stop_gradient(x_BT)), jnp.sum(mask_BT))

        own: Metrics = {
            "entropy": mean(entropy_BT),
            "clip_share": mean((safe_BT < gain_BT).astype(jnp.float32)),
            "kl_rollout": mean(divergence(-change_BT)),
            "logprob_gap": Largest(jnp.max(jnp.abs(jax.lax.stop_gradient(change_BT)))),
        }
        if config.kl is not None:
            whole_BT = logprob_BT
            if config.truncates:  # the divergence is of whole distributions: of others it may be infinite
                whole_BT, _ = model.drawn_logprobs(*score, None, drawn)
            kl_BT = divergence(jnp.where(mask_BT > 0, extra["reference"] - whole_BT, 0))
            loss_BT = loss_BT + config.kl * kl_BT
            own["kl"] = mean(kl_BT)
        share_BT, weight = shares(config, mask_BT)
        nll = -jnp.sum(share_BT * jax.lax.stop_gradient(logprob_BT))
        stats = {name: value * weight for name, value in (features.stats or {}).items()}
        loss = jnp.sum(share_BT * loss_BT) + features.balance * weight
        return Sums(loss, weight, {"nll": nll, "bytes": jnp.zeros(()), **stats, **own}, features.memory)

    return objective


def grpo_columns(config: GRPO, length: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and types of one row's columns in `Batch.extra`; see `grpo`."""
    by_token: dict[str, Any] = {"logprob": jnp.float32}
    by_token |= {"kept": jnp.int32} if config.truncates else {}
    by_token |= {"reference": jnp.float32} if config.kl is not None else {}
    shapes = {name: jax.ShapeDtypeStruct((length,), dtype) for name, dtype in by_token.items()}
    return shapes | {"advantage": jax.ShapeDtypeStruct((), jnp.float32)}


def divergence(toward: jax.Array) -> jax.Array:
    """An estimate of KL(p || q) at a token drawn from p, given log q - log p: unbiased, never negative."""
    return jnp.expm1(toward) - toward


def shares(config: GRPO, mask_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What each token counts in the loss [B, T], and the weight of the rows: the loss is the total of the
    step over the total weight of the step.
    """
    if config.per == "token":
        return mask_BT, jnp.sum(mask_BT)
    tokens_B1 = jnp.sum(mask_BT, axis=1, keepdims=True)
    whole = jnp.maximum(tokens_B1, 1) if config.per == "completion" else config.max_new_tokens
    return mask_BT / whole, jnp.sum(tokens_B1 > 0).astype(jnp.float32)
