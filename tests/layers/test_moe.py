"""Experts: nothing dropped, sparse, the same on every mesh and in several rounds; the balance by hand.

Shapes: B batch, T length, D hidden size, E experts, K experts per token.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from tiny import FLOAT32, GPT2, HERE, ONE, assert_close, make_run, mesh, model_of, steps, text_batches

from jaxgpt.config import GPT, Compute, MoE, Train
from jaxgpt.layers import dispatch
from jaxgpt.layers.blocks import Blocks
from jaxgpt.layers.dispatch import Plan
from jaxgpt.layers.linear import contract
from jaxgpt.layers.mlp import ACTIVATIONS
from jaxgpt.layers.moe import Experts
from jaxgpt.models import init_params
from jaxgpt.sharding import param_shardings
from jaxgpt.target import Target

B, T, D, E, K = 8, 6, 16, 8, 2
PLAIN = GPT(vocab_size=8, layers=2, width=D, heads=2, mlp_width=8, moe=MoE(experts=E, per_token=K))
MIXTRAL = replace(PLAIN, mlp="swiglu")
QWEN = replace(MIXTRAL, moe=MoE(experts=E, per_token=K, width=12, normalise=False, shared_width=24))
forms = pytest.mark.parametrize("model", [PLAIN, MIXTRAL, QWEN], ids=["plain", "mixtral", "qwen"])


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks and buffers so small that a few rows need several."""
    monkeypatch.setattr(dispatch, "SMALLEST", 2)


@cache
def build(model: GPT) -> tuple[nnx.GraphDef, dict]:
    graphdef, state = nnx.split(Experts(jax.random.key(0), model, FLOAT32, HERE))
    random = np.random.default_rng(0)
    params = nnx.to_pure_dict(state)
    return graphdef, jax.tree.map(lambda p: jnp.float32(0.5 * random.standard_normal(p.shape)), params)


def features(seed: int = 1) -> jax.Array:
    return jnp.float32(np.random.default_rng(seed).standard_normal((B, T, D)))


def dense_sum(model: GPT, params: dict, x_BTD: jax.Array) -> np.ndarray:
    """The definition: every expert on every token, with weight 0 if it was not chosen."""
    x = np.asarray(x_BTD, np.float64)

    def get(*path: str) -> np.ndarray:
        return np.asarray(functools.reduce(operator.getitem, path, params), np.float64)

    logits = x @ get("router", "weight")
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    chosen = np.argsort(-probs, axis=-1)[..., :K]
    weights = np.zeros_like(probs)
    np.put_along_axis(weights, chosen, np.take_along_axis(probs, chosen, -1), -1)
    if model.moe.normalise:
        weights /= weights.sum(-1, keepdims=True)
    act = lambda a: np.asarray(ACTIVATIONS[model.mlp][0](jnp.asarray(a)), np.float64)  # noqa: E731
    y = np.zeros_like(x)
    for e in range(E):
        up = x @ get("up", "weight")[e]
        h = act(x @ get("gate", "weight")[e]) * up if "gate" in params else act(up)
        y += weights[..., e : e + 1] * (h @ get("down", "weight")[e])
    if "shared" in params:
        h = act(x @ get("shared", "gate", "weight")) * (x @ get("shared", "up", "weight"))
        gate = 1 / (1 + np.exp(-x @ get("shared_gate", "weight")))
        y += gate * (h @ get("shared", "down", "weight"))
    return y


@forms
def test_dropless_experts_are_the_dense_sum(model: GPT) -> None:
    model = replace(model, bias=False)
    graphdef, params = build(model)
    y_BTD, _ = jax.jit(lambda params, x: nnx.merge(graphdef, params)(x))(params, features())
    np.testing.assert_allclose(y_BTD, dense_sum(model, params, features()), rtol=1e-4, atol=1e-4)


def test_no_token_is_dropped_when_all_go_to_one_expert() -> None:
    graphdef, params = build(replace(MIXTRAL, bias=False))
    params, x_BTD = one_expert(params, features())
    y_BTD, _ = jax.jit(lambda params, x: nnx.merge(graphdef, params)(x))(params, x_BTD)
    expected = dense_sum(replace(MIXTRAL, bias=False), params, x_BTD)
    np.testing.assert_allclose(y_BTD, expected, rtol=1e-4, atol=1e-4)
    assert (np.abs(np.asarray(y_BTD)).max(-1) > 1e-3).all()


def one_expert(params: dict, x_BTD: jax.Array) -> tuple[dict, jax.Array]:
    """A router that sends all tokens to experts 2 and 3, which are on one device of four."""
    router = jnp.zeros((D, E)).at[0, 2].set(50.0).at[0, 3].set(49.0).at[1].set(1.0)
    return params | {"router": {"weight": router}}, x_BTD.at[..., 0].set(1.0)


@cache
def gradients(model: GPT) -> Callable[..., Any]:
    """Gradients of everything the layer returns by parameters and features; and its outputs."""
    graphdef, _ = build(model)

    def loss(params: dict, x_BTD: jax.Array) -> tuple[jax.Array, Any]:
        y_BTD, routing = nnx.merge(graphdef, params)(x_BTD)
        return jnp.sum(y_BTD * features(2)) + routing.balance, (y_BTD, routing)

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))


@pytest.mark.parametrize(
    ("model", "sizes", "crowded"),
    [
        (MIXTRAL, {"expert": 8}, False),
        (MIXTRAL, {"expert": 4, "tensor": 2}, False),
        (MIXTRAL, {"expert": 4, "tensor": 2}, True),
        (QWEN, {"expert": 2, "fsdp": 2, "data": 2}, False),
        (PLAIN, {"expert": 2, "fsdp": 4}, False),
    ],
    ids=["expert=8", "expert=4,tensor=2", "on one device", "qwen,all axes but tensor", "plain,fsdp=4"],
)
def test_experts_on_eight_devices_equal_one(model: GPT, sizes: dict[str, int], crowded: bool) -> None:
    """Values and the gradients of everything, also when buffers are filled several times."""
    params, x_BTD = build(model)[1], features()
    if crowded:
        params, x_BTD = one_expert(params, x_BTD)
    (one, (y_BTD, _)), grads = gradients(model)(params, x_BTD)
    with jax.set_mesh(mesh(ONE | sizes)):
        (eight, (split_BTD, routing)), split = jax.device_get(gradients(model)(params, x_BTD))
    assert_close((one, y_BTD, grads), (eight, split_BTD, split), 1e-5)
    rows, devices = B * T * K // (8 // sizes.get("tensor", 1)), sizes["expert"]
    room = Plan.of(rows, E, devices).room
    assert routing.rounds >= (-(-rows // room) if crowded else 1)
    assert routing.fill == pytest.approx(rows / (routing.rounds * devices * room))
    assert not crowded or routing.rounds > 2


def test_gradients_are_those_of_the_dense_sum() -> None:
    """Against automatic differentiation of every expert on every token."""
    _, params = build(MIXTRAL)

    def dense(params: dict, x_BTD: jax.Array) -> jax.Array:
        probs_BTE = jax.nn.softmax(x_BTD @ params["router"]["weight"])
        top_BTK, chosen_BTK = jax.lax.top_k(probs_BTE, K)
        weights_BTK = top_BTK / top_BTK.sum(-1, keepdims=True)
        shares_BTE = jnp.sum(jax.nn.one_hot(chosen_BTK, E) * weights_BTK[..., None], -2)
        up, gate = (jnp.einsum("btd,edf->btef", x_BTD, params[n]["weight"]) for n in ("up", "gate"))
        y_BTED = jnp.einsum("btef,efd->bted", jax.nn.silu(gate) * up, params["down"]["weight"])
        return jnp.sum(jnp.einsum("bted,bte->btd", y_BTED, shares_BTE) * features(2))

    _, grads = gradients(replace(MIXTRAL, moe=replace(MIXTRAL.moe, balance=0.0)))(params, features())
    assert_close(jax.jit(jax.grad(dense, (0, 1)))(params, features()), grads, 1e-5)


def test_gradients_in_bfloat16_are_those_in_float32() -> None:
    """An accelerator's program has bfloat16 rows and hidden activations; sums are wider."""
    _, params = build(MIXTRAL)
    x_BTD = features().astype(jnp.bfloat16)  # the router's input is the same in both
    target = Target("tpu", "TPU v5p")
    graphdef, _ = nnx.split(Experts(jax.random.key(0), MIXTRAL, Compute(dtype="bfloat16"), target))

    def loss(params: dict, x_BTD: jax.Array) -> jax.Array:
        y_BTD, routing = nnx.merge(graphdef, params)(x_BTD)
        return jnp.sum(y_BTD.astype(jnp.float32) * features(2)) + routing.balance

    rough = jax.jit(jax.grad(loss))(params, x_BTD)
    exact = gradients(MIXTRAL)(params, x_BTD.astype(jnp.float32))[1][0]
    for (path, a), b in zip(jax.tree.leaves_with_path(exact), jax.tree.leaves(rough), strict=True):
        assert b.dtype == jnp.float32
        error = float(jnp.linalg.norm(a - b) / jnp.linalg.norm(a))
        assert error < 0.02, f"{jax.tree_util.keystr(path)} is off by {error:.1%}"


def test_padding_goes_to_no_expert() -> None:
    graphdef, params = build(MIXTRAL)
    real_BT = jnp.arange(T) < jnp.arange(B)[:, None]
    layer = jax.jit(lambda params, x, real: nnx.merge(graphdef, params)(x, real)[0])
    some, full = (np.asarray(layer(params, features(), real)) for real in (real_BT, jnp.ones((B, T), bool)))
    np.testing.assert_allclose(some[real_BT], full[real_BT], rtol=1e-5, atol=1e-6)
    assert not some[~real_BT].any()


@pytest.mark.parametrize("sizes", [[0, 0, 0], [7, 0, 1], [4, 4, 4], [1, 1, 1], [0, 30, 2]], ids=str)
@pytest.mark.parametrize("block", [1, 4])
def test_blocks_hold_every_row_once_and_at_most_one_per_expert_is_not_full(sizes: list, block: int) -> None:
    """So the work is that of the rows plus less than one block per expert, for any distribution."""
    expert_R = np.random.default_rng(0).permutation(np.repeat(range(4), [*sizes, 5]))  # 5 slots are empty
    blocks = Blocks.of(jnp.asarray(expert_R), 3, block)
    used = int(blocks.last_E[-1])
    assert used == sum(-(-size // block) for size in sizes) <= blocks.most
    seen = []
    for number in range(used):
        expert, row_S, here_S = (np.asarray(a) for a in blocks.block(jnp.asarray(number)))
        assert here_S.any()
        assert (expert_R[row_S[here_S]] == expert).all()
        slots = np.asarray(blocks.slot_R)[row_S[here_S]]
        assert (slots == number * block + np.flatnonzero(here_S)).all()
        seen += row_S[here_S].tolist()
    assert sorted(seen) == np.flatnonzero(expert_R < 3).tolist()


@pytest.mark.parametrize(
    ("rows", "experts", "devices"), [(131_072, 8, 4), (131_072, 128, 8), (6144, 8, 1)], ids=str
)
def test_even_routing_takes_one_round_and_little_padding(
    rows: int, experts: int, devices: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    plan = Plan.of(rows, experts, devices)
    assert plan.room * devices <= 1.3 * rows
    per_expert = rows // plan.experts
    assert -(-per_expert // plan.block) * plan.block <= 1.15 * per_expert
    decoding = Plan.of(2, experts, 1)
    assert decoding.block == 2  # a step with one row reads each of its experts once


def test_memory_falls_with_the_axis_expert() -> None:
    """Temporaries of the gradient's program: gathered weights and their gradients, on one device."""
    model = replace(MIXTRAL, width=64, mlp_width=512)
    variables = nnx.eval_shape(lambda: nnx.state(Experts(jax.random.key(0), model, FLOAT32, HERE)))
    graphdef = nnx.split(nnx.eval_shape(lambda: Experts(jax.random.key(0), model, FLOAT32, HERE)))[0]
    x_BTD = jax.ShapeDtypeStruct((8, 2, 64), jnp.float32)

    def loss(params: dict, x_BTD: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, params)(x_BTD)[0].sum()

    needed = []
    for n in (1, 2, 8):
        on = mesh(ONE | {"expert": n, "fsdp": 8 // n})
        layout = param_shardings(variables, on)
        shapes = nnx.to_pure_dict(variables)
        params = jax.tree.map(lambda p, s: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=s), shapes, layout)
        with jax.set_mesh(on):
            compiled = jax.jit(jax.grad(loss), out_shardings=layout).lower(params, x_BTD).compile()
        needed.append(compiled.memory_analysis().temp_size_in_bytes)
    assert needed[1] < 0.65 * needed[0]
    assert needed[2] < 0.25 * needed[0]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LowRank:
    """A weight that is not an array."""

    whole: jax.Array
    down: jax.Array
    up: jax.Array

    def product(self, x: jax.Array, axes: int, dtype: jnp.dtype, target: Target, ids: Any) -> jax.Array:
        through = contract(contract(x, self.down, axes, dtype, HERE), self.up, 1, dtype, HERE)
        return contract(x, self.whole, axes, dtype, HERE) + through

    def layout(self, split: P) -> Any:
        return LowRank(split, P(*split[:2], None), P(split[0], None, split[2]))


def test_a_weight_of_another_kind_takes_the_place_of_an_array() -> None:
    _, params = build(MIXTRAL)
    a, b = jnp.float32(np.random.default_rng(3).standard_normal((2, E, D, 3)))
    up = LowRank(params["up"]["weight"], a, b[:, :8].swapaxes(1, 2))
    merged = params | {"up": {"weight": up.whole + up.down @ up.up}}
    (expected, (y_BTD, _)), (wanted, _) = gradients(MIXTRAL)(merged, features())
    dw_EDF = wanted.pop("up")["weight"]
    by_rules = LowRank(dw_EDF, dw_EDF @ up.up.swapaxes(1, 2), up.down.swapaxes(1, 2) @ dw_EDF)
    apart = params | {"up": {"weight": up}}
    for sizes in (ONE, ONE | {"expert": 2, "tensor": 2, "fsdp": 2}):
        with jax.set_mesh(mesh(sizes)):
            (got, (got_BTD, _)), (grads, _) = jax.device_get(gradients(MIXTRAL)(apart, features()))
        assert_close((expected, y_BTD), (got, got_BTD), 1e-5)
        assert_close(by_rules, grads.pop("up")["weight"], 1e-5)
        assert_close(wanted, grads, 1e-5)


def test_accumulation_equals_the_full_batch_except_for_the_balance() -> None:
    """The balance is computed per microbatch; the metrics record how full the buffers were."""
    (batch,) = text_batches(1, 8)
    model = replace(GPT2, layers=1, mlp_width=16, moe=MoE(experts=4, balance=0.5))
    params = init_params(model, FLOAT32, HERE, jax.random.key(0))
    balance = jax.jit(lambda params, part: model_of(model)(params).hidden(part).balance)

    def run(accumulate: int) -> dict[str, float]:
        _, (numbers,) = steps(make_run(model, train=Train(batch_size=8, accumulate=accumulate)), ONE, [batch])
        parts = [jax.tree.map(lambda a, i=i: a[i::accumulate], batch) for i in range(accumulate)]
        weights = [float(part.weights_BT.sum()) for part in parts]
        expected = np.average([float(balance(params, part)) for part in parts], weights=weights)
        assert numbers["loss"] - numbers["nll"] == pytest.approx(expected, rel=1e-4)
        return numbers

    whole, split = run(1), run(2)
    assert split["nll"] == pytest.approx(whole["nll"], rel=1e-6)
    assert split["loss"] != pytest.approx(whole["loss"], rel=1e-6)
    assert split["expert_rounds"] == split["expert_fill"] == 1


def test_the_balance_is_one_choice_each_when_even_and_counts_no_padding() -> None:
    graphdef, params = build(PLAIN)
    layer = nnx.merge(graphdef, params)
    x_BTD = features()
    probs = np.asarray(jax.nn.softmax(layer.router(x_BTD), axis=-1), np.float64)
    real = np.zeros((B, T), bool)
    real[:, :4] = True
    sent = np.zeros((B, T, E))
    np.put_along_axis(sent, np.argsort(-probs, -1)[..., :K], 1.0, -1)
    by_hand = E * (sent[real].mean(0) * probs[real].mean(0)).sum()
    balance = jax.jit(lambda params, x, real: nnx.merge(graphdef, params)(x, real)[1].balance)
    got = balance(params, x_BTD, jnp.asarray(real))
    assert got == pytest.approx(0.01 * by_hand, rel=1e-5)
    even = params | {"router": {"weight": jnp.zeros((D, E))}}
    assert balance(even, x_BTD, jnp.ones((B, T), bool)) == pytest.approx(0.01 * K)
