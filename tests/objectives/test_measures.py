"""Measures by hand: what each does to a gradient, a loss or a batch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import FLOAT32, HERE

from jaxgpt.batch import Batch
from jaxgpt.config import (
    EMA,
    EWC,
    FGM,
    GPT,
    L2SP,
    PGD,
    CausalLM,
    FreeLB,
    Full,
    LabelSmoothing,
    LayerDecay,
    LoRA,
    NEFTune,
    RDrop,
    Run,
    TokenDropout,
    TokenSwaps,
)
from jaxgpt.config.measures import Measure, check_measures
from jaxgpt.errors import UserError
from jaxgpt.layers.perturb import perturbing
from jaxgpt.models import abstract_model, assemble, init_params
from jaxgpt.objectives import causal_lm
from jaxgpt.objectives.measures import MEASURES, measured, measured_optimizer
from jaxgpt.objectives.measures.base import live_parameters
from jaxgpt.objectives.measures.penalty import with_importance
from jaxgpt.text.tokenizer import ByteTokenizer
from jaxgpt.text.vocabulary import Vocabulary

TWO = nnx.State({"a": nnx.Param(jnp.zeros(()), axes=()), "b": nnx.Param(jnp.zeros(()), axes=())})
"""A model of two parameters."""


def test_every_measure_has_a_hook() -> None:
    assert set(MEASURES) == set(Measure.__args__)  # type: ignore[attr-defined]
    for hooks in MEASURES.values():
        assert any((hooks.batch, hooks.objective, hooks.update))


def two(a: float, b: float) -> dict[str, Any]:
    return {"a": jnp.float32(a), "b": jnp.float32(b)}


def test_l2sp_and_ewc_of_two_parameters() -> None:
    """From (1, -2) at (3, 1) the penalty is w/2 sum_i F_i d_i^2 with d = (2, 3), and its slope w F_i d_i."""
    start, now, none = two(1, -2), two(3, 1), two(0, 0)
    plain = measured_optimizer([L2SP(weight=0.5)], optax.sgd(1.0), TWO)
    updates, _ = plain.update(none, plain.init(start), now)
    assert updates == {"a": -0.5 * 2, "b": -0.5 * 3}

    weighted = measured_optimizer([EWC(weight=10)], optax.sgd(1.0), TWO)
    state = weighted.init(start)
    assert weighted.update(none, state, now)[0] == none  # before anything has been measured
    state = with_importance(state, two(0.2, 0.01))
    updates, after = weighted.update(two(7, 0), state, now)
    np.testing.assert_allclose(
        [updates["a"], updates["b"]], [-(7 + 10 * 0.2 * 2), -(10 * 0.01 * 3)], rtol=1e-6
    )
    assert after[0].start == start  # they stay where they were


def test_l2sp_leaves_a_new_head_alone() -> None:
    model = nnx.State({"backbone": {"w": nnx.Param(jnp.zeros(()))}, "head": {"w": nnx.Param(jnp.zeros(()))}})
    params = {"backbone": {"w": jnp.float32(2)}, "head": {"w": jnp.float32(2)}}
    zeros = {"backbone": {"w": jnp.float32(0)}, "head": {"w": jnp.float32(0)}}
    pulled = measured_optimizer([L2SP(weight=1)], optax.sgd(1.0), model)
    updates, _ = pulled.update(zeros, pulled.init(zeros), params)
    assert updates == {"backbone": {"w": -2}, "head": {"w": 0}}


@pytest.mark.parametrize(
    ("measures", "init_from", "tune", "words"),
    [
        ((L2SP(), L2SP()), "runs/base", Full(), "L2SP twice"),
        ((EWC(),), "", Full(), "init_from is empty"),
        ((L2SP(),), "runs/base", LoRA(), "tune is LoRA"),
    ],
)
def test_measures_that_do_not_fit_are_refused(measures, init_from, tune, words) -> None:
    with pytest.raises(UserError, match=words):
        run = SimpleNamespace(measures=measures, init_from=init_from, tune=tune, objective=CausalLM())
        check_measures(run)


# ------------------------------------------------------------------------------ against overfitting


def a_model(dropout: float = 0.0) -> tuple[Any, dict]:
    config = GPT(vocab_size=264, context=16, layers=1, width=16, heads=2, dropout=dropout)
    graph, _ = abstract_model(config, FLOAT32, HERE)
    return graph, init_params(config, FLOAT32, HERE, jax.random.key(0))


def a_batch() -> Batch:
    rng = np.random.default_rng(0)
    tokens, targets = (jnp.asarray(rng.integers(0, 256, (2, 8)), jnp.int32) for _ in range(2))
    weights = jnp.asarray(rng.integers(0, 2, (2, 8)), jnp.float32)
    ones, places = jnp.ones((2, 8), jnp.int32), jnp.broadcast_to(jnp.arange(8), (2, 8))
    return Batch(tokens, targets, weights, ones, places)


BYTES = Vocabulary.of(ByteTokenizer())
KEY = jax.random.key(3)


def under(*measures: Any, dropout: float = 0.0):
    """A function of parameters to the loss under measures, jitted."""
    graph, params = a_model(dropout)
    objective = measured(measures, causal_lm(CausalLM(), BYTES), BYTES)
    return jax.jit(lambda p: objective(assemble(graph, p), a_batch(), KEY).loss), params, graph


def test_label_smoothing_is_cross_entropy_with_soft_targets() -> None:
    loss, params, graph = under(LabelSmoothing(rate=0.2))
    batch = a_batch()
    model = assemble(graph, params)
    logp = jax.nn.log_softmax(model.logits(model.hidden(batch).x_BTD), -1)
    soft = 0.8 * jax.nn.one_hot(batch.targets_BT, 264) + 0.2 / 264
    expected = -jnp.sum(batch.weights_BT[..., None] * soft * logp)
    np.testing.assert_allclose(loss(params), expected, rtol=1e-5)


def test_noise_and_adversary_move_embeddings_as_far_as_they_say() -> None:
    loss, params, graph = under()
    base = float(loss(params))
    noisy = float(under(NEFTune(alpha=5.0))[0](params))
    assert noisy != base and abs(noisy - base) < 0.2 * base
    assert float(under(NEFTune(alpha=0.0))[0](params)) == pytest.approx(base)
    # To first order the adversarial loss is larger by epsilon times the norm of each row's slope.
    batch, model = a_batch(), assemble(graph, params)
    objective = causal_lm(CausalLM(), BYTES)

    def moved(move: jax.Array) -> jax.Array:
        with perturbing(lambda x: x + move):
            return objective(model, batch, None).loss

    slope = jax.grad(moved)(jnp.zeros((2, 8, 16)))
    epsilon = 1e-2
    expected = base + epsilon * float(jnp.sqrt(jnp.sum(slope**2, (1, 2))).sum()) / 2  # half its weight
    assert float(under(FGM(epsilon=epsilon))[0](params)) == pytest.approx(expected, rel=1e-3)


def test_rdrop_by_hand() -> None:
    loss, params, graph = under(RDrop(weight=2.0), dropout=0.3)
    batch, model = a_batch(), assemble(graph, params)
    logp = []
    for number in (2002, 2003):
        features = model.hidden(batch, jax.random.fold_in(KEY, number))
        logp.append(jax.nn.log_softmax(model.logits(features.x_BTD), -1))
    p, q = logp
    w = batch.weights_BT
    nll = [-jnp.sum(w * jnp.take_along_axis(x, batch.targets_BT[..., None], -1)[..., 0]) for x in logp]
    both = jnp.sum(w * jnp.sum(jnp.exp(p) * (p - q) + jnp.exp(q) * (q - p), -1))
    np.testing.assert_allclose(loss(params), (nll[0] + nll[1]) / 2 + 2.0 * both / 2, rtol=1e-5)
    np.testing.assert_allclose(under(RDrop(weight=2.0))[0](params), under()[0](params), rtol=1e-6)


def test_an_average_of_two_parameters_by_hand() -> None:
    """Steps of 1 with gradient (1, -1): live parameters fall, the average follows them."""
    averaged = measured_optimizer([EMA(decay=0.999)], optax.sgd(1.0), TWO)
    mean, state = two(0, 0), averaged.init(two(0, 0))
    live, expected = 0.0, 0.0
    for n in range(3):
        assert live_parameters(state, mean)["a"] == live
        updates, state = averaged.update(two(1, -1), state, mean)
        mean = optax.apply_updates(mean, updates)
        live -= 1
        share = 1 - (1 + n) / (10 + n)
        expected += share * (live - expected)
        assert mean["a"] == pytest.approx(expected) and mean["b"] == pytest.approx(-expected)
    assert live_parameters(optax.sgd(1.0).init(mean), mean) is mean


def test_lower_layers_learn_more_slowly() -> None:
    config = GPT(vocab_size=40, context=16, layers=3, width=16, heads=2)
    _, model = abstract_model(config, FLOAT32, HERE)
    params = init_params(config, FLOAT32, HERE, jax.random.key(0))
    slower = measured_optimizer([LayerDecay(rate=0.5)], optax.sgd(1.0), model)
    updates, _ = slower.update(jax.tree.map(jnp.ones_like, params), slower.init(params), params)
    flat = {jax.tree_util.keystr(path): u for path, u in jax.tree.leaves_with_path(updates)}
    stacked = [u for name, u in flat.items() if u.ndim and u.shape[0] == 3 and "embed" not in name]
    assert stacked
    for u in stacked:
        for layer, factor in enumerate((0.25, 0.5, 1.0)):
            np.testing.assert_allclose(u[layer], -factor)
    (embedding,) = [u for name, u in flat.items() if "embed" in name and u.shape == (40, 16)]
    np.testing.assert_allclose(embedding, -0.125)


@pytest.mark.parametrize(
    ("measures", "parts", "words"),
    [
        ((RDrop(),), {}, "dropout is 0"),
        ((LabelSmoothing(),), {"logit_softcap": 30.0}, "linear in the features"),
    ],
)
def test_measures_against_overfitting_that_do_not_fit_are_refused(measures, parts, words) -> None:
    model = GPT(vocab_size=264, context=16, layers=1, width=16, heads=2, **parts)
    with pytest.raises(UserError, match=words):
        Run(name="a", model=model, measures=measures)


def test_more_adversarial_steps_by_hand() -> None:
    """PGD of one step of epsilon is FGM; FreeLB of two losses is their mean."""
    loss, params, _ = under()
    fgm = float(under(FGM(epsilon=0.1))[0](params))
    assert float(under(PGD(epsilon=0.1, step_size=0.1, steps=1))[0](params)) == pytest.approx(fgm, rel=1e-6)
    assert float(under(FreeLB(epsilon=0.1, step_size=0.1, steps=2))[0](params)) == pytest.approx(
        fgm, rel=1e-6
    )
    further = float(under(PGD(epsilon=0.1, step_size=0.05, steps=4))[0](params))
    assert further > float(loss(params)) and abs(further - fgm) < 0.1 * abs(fgm)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.sampled_from([TokenDropout(rate=0.9), TokenSwaps(rate=1.0)]))
def test_augmentation_never_touches_an_answer_or_its_mask(seed: int, measure: Any) -> None:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 264, (2, 13))  # the last few ids are control tokens
    inputs, targets = jnp.asarray(tokens[:, :-1], jnp.int32), jnp.asarray(tokens[:, 1:], jnp.int32)
    weights = jnp.asarray(rng.integers(0, 2, (2, 12)), jnp.float32)
    segments = jnp.asarray(np.sort(rng.integers(0, 3, (2, 12)), 1)[:, ::-1], jnp.int32)
    batch = Batch(inputs, targets, weights, segments, jnp.broadcast_to(jnp.arange(12), (2, 12)))
    made = MEASURES[type(measure)].batch(measure, BYTES)(batch, jax.random.key(seed))
    learned = np.pad(np.asarray(weights)[:, :-1] > 0, ((0, 0), (1, 0)))
    control = np.asarray(BYTES.bytes_V)[tokens[:, :-1]] == 0
    kept = learned | control | (np.asarray(segments) == 0)
    changed = np.asarray(made.tokens_BT) != tokens[:, :-1]
    assert not (changed & kept).any()
    for name in ("targets_BT", "weights_BT", "segments_BT", "positions_BT"):
        np.testing.assert_array_equal(getattr(made, name), getattr(batch, name))
    assert (np.asarray(BYTES.bytes_V)[np.asarray(made.tokens_BT)][changed] > 0).all()
    if isinstance(measure, TokenSwaps):
        for before, after in zip(tokens[:, :-1], np.asarray(made.tokens_BT), strict=True):
            assert sorted(before.tolist()) == sorted(after.tolist())
