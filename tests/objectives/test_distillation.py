"""Distillation: its loss and gradients against plain code, on meshes; what the step makes of it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import (
    FLOAT32,
    GPT2,
    HERE,
    MIXED,
    ONE,
    VOCABULARY,
    assert_close,
    make_run,
    mesh,
    place,
    sharp_params,
    text_batches,
)

from jaxgpt.config import CausalLM, Chat, Distillation, Pairs, Run, Train
from jaxgpt.errors import UserError
from jaxgpt.layers.distil import Mix, distil
from jaxgpt.layers.unembedding import Unembedding
from jaxgpt.models import abstract_model, init_params
from jaxgpt.objectives import make_objective
from jaxgpt.sharding import batch_sharding, replicated
from jaxgpt.train.state import init_state, make_program
from jaxgpt.train.step import train_step

B, T, D, E, V = 8, 6, 16, 24, 32
SMALL = replace(GPT2, layers=1, width=16)
DISTIL = Distillation(teacher="teacher", softening=2.0, hard_weight=0.25)


def heads() -> tuple[Any, ...]:
    random = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.float32(random.standard_normal(shape))

    head = Unembedding(normal(V, D), normal(V), cap=3.0)
    weights_BT = jnp.float32(random.integers(0, 2, (B, T)))
    targets_BT = jnp.int32(random.integers(0, V, (B, T)))
    return head, normal(B, T, D), targets_BT, weights_BT, Unembedding(normal(V, E)), normal(B, T, E)


def plain(head, x_BTD, targets_BT, weights_BT, teacher, y_BTE, mix: Mix) -> jax.Array:
    """The loss without chunks or a backward pass of its own, by definition."""
    logits, wanted = head(x_BTD), teacher(y_BTE)
    nll_BT = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets_BT[..., None], -1)[..., 0]
    p, q = jax.nn.softmax(wanted / mix.temperature), jax.nn.softmax(logits / mix.temperature)
    divergence_BT = mix.temperature**2 * jnp.sum(p * (jnp.log(p) - jnp.log(q)), -1)
    return jnp.sum(weights_BT * (mix.hard_weight * nll_BT + (1 - mix.hard_weight) * divergence_BT))


@pytest.mark.parametrize("sizes", [ONE, MIXED, ONE | {"fsdp": 8}], ids=["one", "mixed", "fsdp"])
@pytest.mark.parametrize("mix", [Mix(2.0, 0.25), Mix(1.0, 0.0)])
def test_value_and_gradients_are_those_of_plain_code(sizes: dict[str, int], mix: Mix) -> None:
    head, x_BTD, *rest = heads()

    def chunked(head: Unembedding, x_BTD: jax.Array) -> jax.Array:
        return distil(head, x_BTD, *rest, mix, 16).loss

    wanted = jax.value_and_grad(partial(plain, mix=mix), (0, 1))(head, x_BTD, *rest)
    with jax.set_mesh(mesh(sizes)):
        made = jax.jit(jax.value_and_grad(chunked, (0, 1)))(head, x_BTD)
    assert_close(wanted, made, 1e-4)


def test_one_that_knows_all_the_teacher_does_has_nothing_to_learn() -> None:
    head, x_BTD, targets_BT, weights_BT, *_ = heads()
    made = distil(head, x_BTD, targets_BT, weights_BT, head, x_BTD, Mix(3.0, 0.0), 8)
    assert abs(float(made.divergence)) < 1e-4
    assert float(made.nll) > 1


def taught(run: Run, sizes: dict[str, int], count: int = 1) -> tuple[Any, dict[str, float]]:
    """The state and numbers after some steps with a larger, sharp teacher."""
    program = make_program(run, mesh(sizes))
    program = replace(program, teacher=abstract_model(GPT2, FLOAT32, HERE)[0])
    step = partial(train_step, program, make_objective(run.objective, VOCABULARY), run.train.accumulate, 0)
    step = jax.jit(step, out_shardings=(program.shardings, replicated(program.mesh)))
    state, metrics, teacher = init_state(run, program), {}, place(GPT2, sharp_params(GPT2), sizes)[1]
    with jax.set_mesh(program.mesh):
        for batch in text_batches(count, 8):
            rows = jax.device_put(batch, batch_sharding(program.mesh))
            state, metrics = step(state, rows, None, teacher)
    return state, {name: float(value) for name, value in metrics.items()}


def test_a_step_is_the_same_accumulated_and_on_a_mesh() -> None:
    run = make_run(SMALL, objective=DISTIL, train=Train(batch_size=8, steps=1000))
    state, metrics = taught(run, ONE)
    assert metrics["divergence"] > 0
    assert metrics["loss"] == pytest.approx(0.25 * metrics["nll"] + 0.75 * metrics["divergence"], rel=1e-4)
    for other, sizes in ((replace(run, train=replace(run.train, accumulate=4)), ONE), (run, MIXED)):
        again, _ = taught(other, sizes)
        assert_close(state.params, again.params, 1e-3)


def test_without_a_teacher_it_is_next_token_prediction() -> None:
    params = jax.jit(lambda key: init_params(SMALL, FLOAT32, HERE, key))(jax.random.key(0))
    graphdef, _ = abstract_model(SMALL, FLOAT32, HERE)
    (batch,) = text_batches(1, 4)
    made = [
        make_objective(objective, VOCABULARY)(nnx.merge(graphdef, params), batch, None)
        for objective in (DISTIL, CausalLM())
    ]
    assert float(made[0].loss) == float(made[1].loss)


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(UserError, match=r"objective.teacher is empty"):
        make_run(objective=Distillation())
    with pytest.raises(UserError, match="hold preferences"):
        make_run(objective=DISTIL, data=Pairs(train=("a.jsonl",), tokenizer="byte"))
    with pytest.raises(UserError, match="hard_weight"):
        Distillation(teacher="x", hard_weight=1.5)
    assert make_run(objective=DISTIL, data=Chat(train=("a.jsonl",), tokenizer="byte"))
