"""The step: equal on every mesh, equal in parts, and careful with what is not finite."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import (
    FLOAT32,
    GPT2,
    HERE,
    MESHES,
    MIXED,
    MODERN,
    ONE,
    VOCABULARY,
    T,
    assert_close,
    assert_same,
    compile_step,
    make_run,
    mesh,
    sharp_params,
    steps,
    text_batches,
)

from jaxgpt.batch import Batch
from jaxgpt.config import CausalLM, Optim, Run, Train
from jaxgpt.models import abstract_model
from jaxgpt.objectives import make_objective
from jaxgpt.sharding import batch_sharding
from jaxgpt.train.state import State, init_state, make_program
from jaxgpt.train.step import eval_step, train_step

RUNS = {
    # Dropout too: a random number belongs to its row, not to the device that holds it.
    "adamw": make_run(
        replace(GPT2, dropout=0.1),
        optim=Optim(peak_lr=3e-3, warmup_steps=3),
        train=Train(steps=10, batch_size=16, accumulate=2),
        objective=CausalLM(z_loss=1e-3),
    ),
    "muon": make_run(
        MODERN,
        optim=Optim(name="muon", peak_lr=3e-3, muon_lr=1e-2, warmup_steps=3),
        train=Train(steps=10, batch_size=16),
    ),
}


@cache
def ten_steps(name: str, sizes: str) -> tuple[State, list[dict]]:
    batches = text_batches(10, RUNS[name].train.batch_size)
    return steps(RUNS[name], MESHES.get(sizes, ONE), batches)


@pytest.mark.parametrize("sizes", MESHES)
@pytest.mark.parametrize("name", RUNS)
def test_eight_devices_equal_one(name: str, sizes: str) -> None:
    """Losses and gradient norms of ten steps, on every kind of mesh."""
    (_, one), (_, eight) = ten_steps(name, "one"), ten_steps(name, sizes)
    for quantity in ("loss", "grad_norm", "weight"):
        a, b = ([numbers[quantity] for numbers in seen] for seen in (one, eight))
        np.testing.assert_allclose(a, b, rtol=1e-5)
    losses = [numbers["loss"] for numbers in one]
    assert len(set(losses)) == 10


# ----------------------------------------------------------------------------- accumulation


def instruction_batch(rows: int = 16) -> Batch:
    """Rows with one trained token, with many, and with none: a microbatch in which nothing is."""
    batch = text_batches(1, rows)[0]
    trained = np.zeros((rows, T), np.float32)
    for row in range(rows):
        # Microbatch i of 4 takes rows i, i + 4, ...: 0, 1, 5 and 12 trained tokens per row.
        trained[row, : (0, 1, 5, 12)[row % 4]] = 1
    return replace(batch, weights_BT=jnp.asarray(trained))


def one_update(run: Run, batch: Batch, sizes: dict[str, int] = ONE) -> tuple[dict, dict]:
    state, seen = steps(run, sizes, [batch])
    return state.params, seen[0]


# An update that is nearly linear in the gradient, so that parameters tell the gradients apart.
LINEAR = Optim(peak_lr=1.0, eps=10.0, weight_decay=0.0, clip_norm=0.0, schedule="constant", warmup_steps=0)


@pytest.mark.parametrize("sizes", [ONE, MIXED], ids=["one device", "eight devices"])
@pytest.mark.parametrize("model", [GPT2, MODERN], ids=["gpt2", "modern"])
def test_accumulation_equals_the_full_batch(model, sizes) -> None:
    run = make_run(model, optim=LINEAR, train=Train(steps=1, batch_size=16), objective=CausalLM(z_loss=1e-3))
    run = replace(run, optim=replace(LINEAR, warmup_steps=0))
    batch = instruction_batch()
    whole, numbers = one_update(run, batch, sizes)
    parts, sums = one_update(replace(run, train=replace(run.train, accumulate=4)), batch, sizes)
    assert sums["weight"] == numbers["weight"] == 4 * (0 + 1 + 5 + 12)
    for name in ("loss", "nll", "grad_norm", "accuracy", "bytes"):
        assert sums[name] == pytest.approx(numbers[name], rel=1e-6), name
    assert_close(whole, parts, 1e-6)


def test_extra_columns_go_with_their_rows() -> None:
    """A loss weighted by a column a row and one a token: in microbatches and on eight devices the same."""
    batch = text_batches(1, 16)[0]
    extra = {
        "reward": np.linspace(0, 2, 16, dtype=np.float32),
        "share": np.linspace(0, 1, T, dtype=np.float32) * np.ones((16, 1), np.float32),
    }
    weights_BT = batch.weights_BT * extra["reward"][:, None] * extra["share"]
    run = make_run(optim=LINEAR, train=Train(steps=1, batch_size=16, accumulate=4))
    whole = replace(run, train=replace(run.train, accumulate=1))
    params, numbers = one_update(whole, replace(batch, weights_BT=weights_BT))
    plain = make_objective(run.objective, VOCABULARY)

    def objective(model, batch, key):
        shares_BT = batch.extra["reward"][:, None] * batch.extra["share"]
        return plain(model, replace(batch, weights_BT=batch.weights_BT * shares_BT), key)

    program = make_program(run, mesh(MIXED))
    step = partial(train_step, program, objective, 4, 0)
    layout = batch_sharding(program.mesh)
    columns = {name: jax.ShapeDtypeStruct(c.shape[1:], c.dtype) for name, c in extra.items()}
    with jax.set_mesh(program.mesh):
        state = init_state(run, program)
        compiled = jax.jit(step).trace(state, Batch.abstract(16, T, layout, extra=columns)).lower().compile()
        state, seen = compiled(state, jax.device_put(replace(batch, extra=extra), layout))
    assert float(seen["loss"]) == pytest.approx(numbers["loss"], rel=1e-5)
    assert_close(params, state.params, 1e-5)


def test_a_batch_without_extra_columns_is_the_program_it_was() -> None:
    assert len(jax.tree.leaves(Batch.abstract(2, T))) == 5


def test_the_mean_of_microbatch_means_would_be_another_loss() -> None:
    """So that the test above could fail."""
    batch, losses = instruction_batch(), []
    run = make_run(GPT2, optim=LINEAR, train=Train(steps=1, batch_size=16))
    total = one_update(run, batch)[1]["loss"]
    for part in range(1, 4):
        rows = jnp.where(jnp.arange(16)[:, None] % 4 == part, batch.weights_BT, 0)
        losses.append(one_update(run, replace(batch, weights_BT=rows))[1]["loss"])
    assert abs(np.mean(losses) - total) > 1e-4  # a hundred times what the test above allows


@pytest.mark.parametrize("remat", ["full", "dots"])
@pytest.mark.parametrize("model", [replace(GPT2, dropout=0.1), MODERN], ids=["gpt2", "modern"])
def test_remat_changes_nothing(model, remat) -> None:
    run = make_run(model, optim=LINEAR, train=Train(steps=1, batch_size=8))
    batch = text_batches(1, 8)[0]
    plain, numbers = one_update(run, batch)
    again, other = one_update(replace(run, compute=replace(FLOAT32, remat=remat)), batch)
    assert other["loss"] == pytest.approx(numbers["loss"], rel=1e-6)
    assert_close(plain, again, 1e-6)


def test_the_scan_may_be_rolled_or_not() -> None:
    run = make_run(MODERN, optim=LINEAR, train=Train(steps=1, batch_size=8))
    batch = text_batches(1, 8)[0]
    plain, _ = one_update(run, batch)
    rolled, _ = one_update(replace(run, compute=replace(FLOAT32, unroll=1)), batch)
    assert_close(plain, rolled, 1e-6)


def test_half_precision_learns() -> None:
    run = make_run(
        MODERN,
        optim=Optim(peak_lr=1e-2, warmup_steps=1),
        train=Train(steps=20, batch_size=8),
        compute=replace(FLOAT32, dtype="bfloat16"),
    )
    state, seen = steps(run, ONE, text_batches(1, 8) * 20)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    assert seen[-1]["loss"] < seen[0]["loss"] - 0.5


# ------------------------------------------------------------------------------- not finite


@pytest.fixture(scope="module")
def guarded():
    run = make_run(GPT2, optim=Optim(warmup_steps=1), train=Train(steps=9, batch_size=8))
    program = make_program(run, mesh(ONE))
    return compile_step(run, program), init_state(run, program)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_not_finite_changes_nothing_but_the_counters(guarded, poison) -> None:
    step, start = guarded
    good, other = text_batches(2, 8)
    state, metrics = step(start, good)
    assert metrics["bad_steps"] == 0
    bad = replace(other, weights_BT=other.weights_BT.at[3, 0].set(poison))
    skipped, metrics = step(state, bad)
    assert not np.isfinite(metrics["loss"])
    assert_same((skipped.params, skipped.opt), (state.params, state.opt))
    assert (skipped.step, skipped.bad_steps, metrics["bad_steps"]) == (2, 1, 1)
    skipped, metrics = step(skipped, bad)
    assert metrics["bad_steps"] == 2
    state, metrics = step(skipped, other)
    assert (state.bad_steps, metrics["bad_steps"]) == (0, 0)
    assert np.isfinite(metrics["loss"])


def test_a_gradient_that_is_not_finite_is_caught_under_a_finite_loss(guarded) -> None:
    step, start = guarded
    # Products of the MLP overflow in the backward pass alone: the norm after it hides them.
    blocks = start.params["blocks"]
    mlp = blocks["mlp"] | {"down": jax.tree.map(lambda p: p * 1e-38, blocks["mlp"]["down"])}
    norm = {"scale": start.params["norm"]["scale"] * 1e38, "bias": start.params["norm"]["bias"]}
    embed = {"weight": start.params["embed"]["weight"] * 1e-38}
    params = start.params | {"blocks": blocks | {"mlp": mlp}, "norm": norm, "embed": embed}
    state = replace(start, params=params)
    after, metrics = step(state, text_batches(1, 8)[0])
    assert np.isfinite(metrics["loss"])
    assert not np.isfinite(metrics["grad_norm"])
    assert metrics["bad_steps"] == 1
    assert_same(after.params, params)


def test_a_batch_without_weight_gives_zero_gradients(guarded) -> None:
    step, start = guarded
    batch = text_batches(1, 8)[0]
    _, metrics = step(start, replace(batch, weights_BT=0 * batch.weights_BT))
    assert metrics["grad_norm"] == 0
    assert metrics["loss"] == 0
    assert metrics["bad_steps"] == 0


def test_evaluation_in_microbatches_has_the_sums_of_the_whole_batch() -> None:
    graphdef, _ = abstract_model(GPT2, FLOAT32, HERE)
    objective, batch = make_objective(CausalLM(), VOCABULARY), next(iter(text_batches(1, 8)))
    params = sharp_params(GPT2)

    def sums(n: int) -> dict[str, jax.Array]:
        step = jax.jit(
            lambda params, batch: eval_step(lambda: nnx.merge(graphdef, params), objective, n, batch)
        )
        return step(params, batch)[0]

    whole, parts = sums(1), sums(4)
    for name, total in whole.items():
        np.testing.assert_allclose(parts[name], total, rtol=1e-5, err_msg=name)
