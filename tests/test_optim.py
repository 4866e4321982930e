"""Schedules by their end points, weight decay and Muon by whom they move, clipping by its bound."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tiny import FLOAT32, GPT2, HERE, MODERN, ONE, mesh, sharp_params

from jaxgpt.config import Optim
from jaxgpt.models import abstract_model, init_params
from jaxgpt.optim import make_optimizer, schedule

STEPS, WARMUP = 100, 10
OPTIM = Optim(peak_lr=1e-2, final_lr=1e-3, warmup_steps=WARMUP)


def rates(steps: int = STEPS, **parts) -> np.ndarray:
    """The rate of each update that a run of so many steps makes."""
    return np.array([schedule(replace(OPTIM, **parts), steps)(i) for i in range(steps)])


@pytest.mark.parametrize("shape", ["constant", "linear", "cosine", "wsd"])
def test_a_schedule_warms_up_to_its_peak_never_rises_again_and_ends_with_the_last_step(shape):
    rate = rates(schedule=shape)
    np.testing.assert_allclose(rate[:WARMUP], 1e-2 * np.arange(1, WARMUP + 1) / WARMUP, rtol=1e-5)
    assert (np.diff(rate[WARMUP - 1 :]) <= 1e-9).all()
    assert rate[-1] == pytest.approx(1e-2 if shape == "constant" else 1e-3)
    assert shape in ("constant", "wsd") or rate[WARMUP] < 1e-2


def test_shapes_of_the_schedules():
    """By hand: 90 steps down from the peak at step 10, the 10th update, whose index is 9, to index 99."""
    middle = 9 + 45
    assert rates(schedule="linear")[middle] == pytest.approx(5.5e-3)
    assert rates(schedule="cosine")[middle] == pytest.approx(5.5e-3)
    assert rates(schedule="linear")[9 + 30] == pytest.approx(7e-3)
    # cos(pi / 3) is a half: a quarter of the way down.
    assert rates(schedule="cosine")[9 + 30] == pytest.approx(1e-2 - 9e-3 / 4)


def test_decay_fraction_is_the_share_of_all_steps():
    """The last 20 of 100 steps decay: step 80 (index 79) is the last at the peak, half the way is step 90."""
    rate = rates(schedule="wsd", decay_fraction=0.2)
    assert rate[WARMUP:80] == pytest.approx(1e-2)
    assert rate[80] == pytest.approx(1e-2 - 9e-3 / 20)
    assert rate[89] == pytest.approx(5.5e-3)
    # More than the warm-up leaves: it decays from the peak on.
    np.testing.assert_allclose(rates(schedule="wsd", decay_fraction=1.0), rates(schedule="linear"), rtol=1e-6)


def test_edges_of_the_schedules():
    assert rates(warmup_steps=0)[0] == rates(warmup_steps=1)[0] == pytest.approx(1e-2)
    assert rates(warmup_steps=STEPS)[-1] == pytest.approx(1e-2)
    assert rates(steps=1, warmup_steps=0) == pytest.approx([1e-2])
    assert rates(steps=2, warmup_steps=0, schedule="linear") == pytest.approx([1e-2, 1e-3])
    other = schedule(OPTIM, STEPS, peak=0.5)
    assert [float(other(i)) for i in (WARMUP - 1, STEPS - 1)] == pytest.approx([0.5, 0.05])


def moved(optim: Optim, model, params: dict, grads: dict) -> dict[tuple, float]:
    """How far one update moves each parameter, by path."""
    optimizer = make_optimizer(optim, STEPS, abstract_model(model, FLOAT32, HERE)[1])

    @jax.jit
    def update(params, grads):
        return optimizer.update(grads, optimizer.init(params), params)[0]

    return {
        p: float(jnp.abs(u).max()) for p, u in nnx.traversals.flatten_mapping(update(params, grads)).items()
    }


@pytest.mark.parametrize("model", [GPT2, MODERN], ids=["gpt2", "modern"])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_weight_decay_moves_matrices_alone(name, model):
    params = sharp_params(model)
    optim = replace(OPTIM, name=name, weight_decay=0.1)
    by_path = moved(optim, model, params, jax.tree.map(jnp.zeros_like, params))
    for path, size in by_path.items():
        vector = path[-1] == "bias" or "norm" in path[-2]
        assert (size == 0) == vector, (path, size)
    assert any(size == 0 for size in by_path.values())


@pytest.mark.parametrize("model", [GPT2, MODERN], ids=["gpt2", "modern"])
def test_muon_takes_the_layers_matrices_alone(model):
    params = sharp_params(model)
    random = np.random.default_rng(0)
    grads = jax.tree.map(lambda p: jnp.float32(random.standard_normal(p.shape)), params)
    optim = replace(OPTIM, name="muon", weight_decay=0.0, muon_lr=0.5, warmup_steps=0)
    for path, size in moved(optim, model, params, grads).items():
        if path[0] == "blocks" and path[-1] == "weight":
            assert size > 2e-2, (path, size)  # an orthogonal matrix times its learning rate
        else:
            assert size == pytest.approx(1e-2, rel=1e-2), (path, size)  # Adam's first step


def test_muons_update_of_an_attention_matrix_is_orthogonal_over_heads():
    params = sharp_params(MODERN)
    random = np.random.default_rng(0)
    grads = jax.tree.map(lambda p: jnp.float32(random.standard_normal(p.shape)), params)
    optim = replace(OPTIM, name="muon", weight_decay=0.0, muon_lr=1.0, warmup_steps=0)
    optimizer = make_optimizer(optim, STEPS, abstract_model(MODERN, FLOAT32, HERE)[1])
    updates = jax.jit(optimizer.update)(grads, optimizer.init(params), params)[0]
    attention = updates["blocks"]["attention"]
    matrices = {
        "q": attention["q"]["weight"].reshape(2, 32, -1),  # from D to all heads at once
        "out": attention["out"]["weight"].reshape(2, -1, 32),
        "up": updates["blocks"]["mlp"]["up"]["weight"],
    }
    for name, stack in matrices.items():
        for layer in np.asarray(stack):
            singular = np.linalg.svd(layer, compute_uv=False)
            assert singular.max() / singular.min() < 2.5, (name, singular)


def test_gradients_are_clipped_by_their_global_norm():
    params = sharp_params(GPT2)
    grads = jax.tree.map(lambda p: 3.0 + 0 * p, params)
    size = float(optax.tree.norm(grads))
    optim = replace(OPTIM, eps=1e6, weight_decay=0.0, warmup_steps=0)  # updates as gradients / 1e6
    free = moved(replace(optim, clip_norm=0.0), GPT2, params, grads)
    bound = moved(replace(optim, clip_norm=2.0), GPT2, params, grads)
    loose = moved(replace(optim, clip_norm=2 * size), GPT2, params, grads)
    for path, whole in free.items():
        assert bound[path] == pytest.approx(whole * 2.0 / size, rel=1e-3)
        assert loose[path] == pytest.approx(whole)


def test_muons_iterations_are_shared_out_over_the_mesh():
    """Eight devices that hold the same eight layers each orthogonalise one of them."""
    deep = replace(GPT2, layers=8)
    optimizer = make_optimizer(replace(OPTIM, name="muon"), STEPS, abstract_model(deep, FLOAT32, HERE)[1])
    shapes = jax.eval_shape(lambda: init_params(deep, FLOAT32, HERE, jax.random.key(0)))
    state = jax.eval_shape(optimizer.init, shapes)

    def flops(devices: int) -> float:
        with jax.set_mesh(mesh(ONE | {"data": devices})):
            whole = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.P()), (shapes, state, shapes)
            )
            return jax.jit(optimizer.update).lower(*whole).compile().cost_analysis()["flops"]

    assert flops(8) < flops(1) / 4
