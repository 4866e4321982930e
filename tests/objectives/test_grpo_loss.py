"""GRPO's loss against its formula, token by token. Shapes: B rows, T tokens per row, V ids."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import FLOAT32, GPT2, MODERN, VOCABULARY, V, make_run, model_of, plain, sharp_params, steps

from jaxgpt.batch import Batch
from jaxgpt.config import GPT, GRPO, Optim, Prompts, Train
from jaxgpt.layers.unembedding import Drawn
from jaxgpt.objectives import Largest, Mean, Sums, add, make_objective

CONFIG = GRPO(rewards=("rewards.py:f",), group=2, max_new_tokens=4, clip_low=0.1, clip_high=0.3)
SIZES = (2, 4)  # completions' tokens
ADVANTAGES = (1.5, -0.5)


def batch_of(model: GPT, temperature: float, shift: float = 0.25, rows: int = 2) -> tuple[Batch, np.ndarray]:
    """Rows with a prompt of three tokens and a completion, drawn by a policy that gave each token another
    probability; and the model's log-probabilities [B, T, V] under the temperature.
    """
    random = np.random.default_rng(3)
    tokens_BT = random.integers(1, V, (rows, 8))
    batch = plain(jnp.asarray(tokens_BT))
    made = model_of(model)(sharp_params(model))
    logits_BTV = np.asarray(made.logits(made.hidden(batch).x_BTD), np.float64) / temperature
    top_BTV = logits_BTV - np.log(np.exp(logits_BTV).sum(-1, keepdims=True))
    targets_BT = np.roll(tokens_BT, -1, 1)
    weights_BT = np.zeros((rows, 8), np.float32)
    for b in range(rows):
        weights_BT[b, 2 : 2 + SIZES[b % 2]] = 1
    now_BT = np.take_along_axis(top_BTV, targets_BT[..., None], -1)[..., 0]
    old_BT = now_BT + random.uniform(-shift, shift, now_BT.shape)
    extra = {
        "logprob": jnp.asarray(old_BT * weights_BT, jnp.float32),
        "advantage": jnp.asarray([ADVANTAGES[b % 2] * (1 + b // 2) for b in range(rows)], jnp.float32),
    }
    batch = replace(
        batch, targets_BT=jnp.asarray(targets_BT), weights_BT=jnp.asarray(weights_BT), extra=extra
    )
    return batch, top_BTV


def sums(config: GRPO, batch: Batch, model: GPT = GPT2) -> Sums:
    return make_objective(config, VOCABULARY)(model_of(model)(sharp_params(model)), batch, None)


def by_hand(config: GRPO, batch: Batch, top_BTV: np.ndarray) -> float:
    """The loss, written as in the papers."""
    rows, tokens = [], 0
    for b, size in enumerate(SIZES):
        terms = []
        for t in range(2, 2 + size):
            now = top_BTV[b, t, batch.targets_BT[b, t]]
            ratio = math.exp(now - float(batch.extra["logprob"][b, t]))
            clipped = min(max(ratio, 1 - config.clip_low), 1 + config.clip_high)
            terms.append(-min(ratio * ADVANTAGES[b], clipped * ADVANTAGES[b]))
        tokens += size
        rows.append(terms)
    if config.per == "token":
        return sum(map(sum, rows)) / tokens
    if config.per == "constant":
        return sum(sum(terms) / config.max_new_tokens for terms in rows) / 2
    return sum(sum(terms) / len(terms) for terms in rows) / 2


@pytest.mark.parametrize("per", ["completion", "token", "constant"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_loss_of_two_rows_is_that_of_the_papers(per: Any, temperature: float) -> None:
    config = replace(CONFIG, per=per, temperature=temperature)
    batch, top_BTV = batch_of(GPT2, temperature)
    found = sums(config, batch)
    assert float(found.loss / found.weight) == pytest.approx(by_hand(config, batch, top_BTV), rel=1e-5)


def test_the_log_of_two_rows() -> None:
    batch, top_BTV = batch_of(GPT2, 1.0)
    found = sums(CONFIG, batch).metrics
    at = [(b, t) for b, size in enumerate(SIZES) for t in range(2, 2 + size)]
    now = np.array([top_BTV[b, t, batch.targets_BT[b, t]] for b, t in at])
    old = np.array([batch.extra["logprob"][b, t] for b, t in at], np.float64)
    ratio, gain = np.exp(now - old), np.array([ADVANTAGES[b] for b, _ in at])
    beyond = np.where(gain > 0, ratio > 1.3, ratio < 0.9)
    assert 0 < beyond.mean() < 1
    entropy = [-np.sum(np.exp(top_BTV[b, t]) * top_BTV[b, t]) for b, t in at]
    expected = {
        "clip_share": beyond.mean(),
        "entropy": np.mean(entropy),
        "kl_rollout": np.mean(np.exp(old - now) - 1 - (old - now)),
        "logprob_gap": np.abs(now - old).max(),
    }
    for name, value in expected.items():
        kind = Largest if name == "logprob_gap" else Mean
        assert isinstance(found[name], kind)
        assert float(found[name].mean()) == pytest.approx(value, rel=1e-4), name


def test_the_divergence_from_a_reference_is_added_with_its_weight() -> None:
    batch, top_BTV = batch_of(GPT2, 1.0)
    reference_BT = batch.extra["logprob"] - 0.3 * batch.weights_BT
    batch = replace(batch, extra=batch.extra | {"reference": reference_BT})
    without, measured, pulled = (sums(replace(CONFIG, kl=kl), batch) for kl in (None, 0.0, 0.5))
    at = np.asarray(batch.weights_BT) > 0
    now_BT = np.take_along_axis(top_BTV, np.asarray(batch.targets_BT)[..., None], -1)[..., 0]
    toward_BT = np.asarray(reference_BT) - now_BT
    kl_BT = np.where(at, np.exp(toward_BT) - 1 - toward_BT, 0)
    each = np.mean([kl_BT[b].sum() / size for b, size in enumerate(SIZES)])
    assert float(measured.loss) == pytest.approx(float(without.loss), rel=1e-6)
    assert float(pulled.loss - measured.loss) / 2 == pytest.approx(0.5 * each, rel=1e-4)
    assert float(measured.metrics["kl"].mean()) == pytest.approx(kl_BT[at].mean(), rel=1e-4)


@pytest.mark.parametrize("model", [GPT2, MODERN], ids=["gpt2", "modern, logits capped"])
@pytest.mark.parametrize("truncated", [False, True])
def test_gradients_of_the_drawn_distribution_are_those_of_its_plain_form(model: GPT, truncated: bool) -> None:
    """Temperature, ids that no token has, truncation; chunks of tokens as on a device with little memory."""
    drawn, params = Drawn(0.7, V - 5), sharp_params(model)
    batch, _ = batch_of(model, 1.0)
    targets_BT = batch.targets_BT % (V - 5)
    kept_BT = jnp.full(targets_BT.shape, 6) if truncated else None
    slope_BT = jax.random.normal(jax.random.key(5), targets_BT.shape)

    def ours(params: dict, chunk: int) -> jax.Array:
        made = model_of(model, replace(FLOAT32, loss_chunk=chunk))(params)
        x_BTD = made.hidden(batch).x_BTD
        return jnp.sum(slope_BT * made.drawn_logprobs(x_BTD, targets_BT, kept_BT, drawn)[0])

    def by_definition(params: dict) -> jax.Array:
        made = model_of(model)(params)
        logits_BTV = made.logits(made.hidden(batch).x_BTD)[..., : V - 5] / 0.7
        if truncated:
            sixth_BT1 = jnp.sort(logits_BTV, axis=-1)[..., -6, None]
            mine_BTV = jnp.arange(V - 5) == targets_BT[..., None]
            logits_BTV = jnp.where((logits_BTV >= sixth_BT1) | mine_BTV, logits_BTV, -jnp.inf)
        top_BTV = jax.nn.log_softmax(logits_BTV)
        return jnp.sum(slope_BT * jnp.take_along_axis(top_BTV, targets_BT[..., None], -1)[..., 0])

    value, grads = jax.jit(jax.value_and_grad(by_definition))(params)
    found, same = jax.jit(jax.value_and_grad(ours), static_argnums=1)(params, 6)
    assert float(found) == pytest.approx(float(value), rel=1e-5)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(same), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("per", ["completion", "token", "constant"])
def test_sums_of_parts_are_those_of_the_whole(per: Any) -> None:
    """Normalisers and the largest gap are over the whole step; one completion has no token."""
    config, (batch, _) = replace(CONFIG, per=per), batch_of(GPT2, 1.0, rows=8)
    batch = replace(batch, weights_BT=batch.weights_BT.at[3].set(0))
    whole = sums(config, batch)
    parts = [sums(config, jax.tree.map(lambda a, i=i: a[i::4], batch)) for i in range(4)]
    for name in ("loss", "weight", "metrics"):
        added = functools.reduce(add, (getattr(part, name) for part in parts))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), added, getattr(whole, name))
    assert float(whole.weight) == {"token": 20}.get(per, 7)


def test_four_microbatches_on_eight_devices_take_the_full_batchs_step() -> None:
    config, (batch, _) = replace(CONFIG, per="token"), batch_of(GPT2, 1.0, rows=32)
    optim = Optim(peak_lr=1e-2, final_lr=1e-2, schedule="constant", warmup_steps=0)

    def numbers(parts: int, devices: int) -> dict[str, float]:
        train = Train(steps=1, batch_size=32, accumulate=parts)
        run = make_run(data=Prompts(train=("none",)), objective=config, optim=optim, train=train)
        sizes = {"data": devices, "fsdp": 1, "tensor": 1, "expert": 1}
        return steps(run, sizes, [batch, batch])[1][-1]

    whole, parts = numbers(1, 1), numbers(4, 8)
    assert whole["logprob_gap"] > 0.1
    for name, value in whole.items():
        assert parts[name] == pytest.approx(value, rel=2e-4, abs=1e-6), name
