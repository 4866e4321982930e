"""Stacked layers under scan equal a loop over layers, with every remat policy and unrolling.

Shapes: B batch, T length, D hidden size, L layers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import HERE, assert_close, assert_same

from jaxgpt.config import Compute
from jaxgpt.layers.linear import Linear
from jaxgpt.layers.norm import Norm
from jaxgpt.layers.stack import run_layers, stacked, unstack

L, D = 4, 6
KEY = jax.random.key(0)
ROWS = jnp.float32([0.9, 1.1])[:, None, None]
"""Inputs about the rows, common to all layers."""


class Layer(nnx.Module):
    """A small block with the essentials: parameters of two kinds, a product, and per-layer inputs."""

    def __init__(self, key: jax.Array) -> None:
        self.norm = Norm(D, "rmsnorm", 1e-5, HERE)
        self.inner = Linear(
            key, (D,), (D,), ("embed", "mlp"), bias=True, std=0.5, dtype=jnp.dtype("float32"), target=HERE
        )

    def __call__(self, x_BTD: jax.Array, gain: jax.Array) -> jax.Array:
        return x_BTD + gain * jnp.tanh(self.inner(self.norm(x_BTD)))


WINDOWS = (4, 0)
"""What differs in kind, like windows: a Python number in a layer's call."""


def call(
    layer: Layer, x_BTD: jax.Array, rows: jax.Array, own: dict[str, jax.Array], place: int
) -> tuple[jax.Array, jax.Array]:
    x_BTD = layer(x_BTD, own["gain"]) * rows
    x_BTD = x_BTD + 1 if WINDOWS[place % 2] else x_BTD
    return x_BTD, x_BTD.sum()


@cache
def inputs() -> tuple[dict, jax.Array, dict]:
    """Parameters of all layers, x, and per-layer inputs, all random."""
    random = np.random.default_rng(0)
    params = nnx.to_pure_dict(nnx.split(stacked(Layer, KEY, L))[1])
    params = jax.tree.map(lambda p: jnp.float32(random.standard_normal(p.shape)), params)
    x_BTD = jnp.float32(random.standard_normal((2, 3, D)))
    return params, x_BTD, {"gain": jnp.float32(random.standard_normal(L))}


def loss(through: Callable[[dict, jax.Array, dict], jax.Array]) -> Callable[..., jax.Array]:
    weights_BTD = jnp.float32(np.random.default_rng(1).standard_normal((2, 3, D)))
    return lambda params, x_BTD, own: jnp.sum(weights_BTD * through(params, x_BTD, own))


GRAPH = nnx.split(stacked(Layer, KEY, L))[0]


def by_scan(compute: Compute, period: int = 1) -> Callable[..., jax.Array]:
    def through(params: dict, x_BTD: jax.Array, own: dict) -> jax.Array:
        blocks = nnx.merge(GRAPH, params)
        x_BTD, _ = run_layers(blocks, x_BTD, ROWS, own, call, compute, HERE, period=period)
        return x_BTD

    return loss(through)


def by_loop(params: dict, x_BTD: jax.Array, own: dict, period: int) -> tuple[jax.Array, list[jax.Array]]:
    graphdef, _ = nnx.split(Layer(KEY))
    extras = []
    for i, layer in unstack(params, L).items():
        mine = {name: x[i] for name, x in own.items()}
        x_BTD, extra = call(nnx.merge(graphdef, layer), x_BTD, ROWS, mine, i % period)
        extras.append(extra)
    return x_BTD, extras


@cache
def of_the_loop(period: int) -> Any:
    run = loss(lambda params, x, own: by_loop(params, x, own, period)[0])
    return jax.jit(jax.value_and_grad(run, (0, 1, 2)))(*inputs())


@pytest.mark.parametrize("period", [1, 2, 3])
@pytest.mark.parametrize(
    ("remat", "unroll"), [("none", None), ("none", 1), ("full", 2), ("full", 1), ("dots", 1), ("dots", 99)]
)
def test_scan_is_a_loop_in_value_and_gradients(remat: str, unroll: int | None, period: int) -> None:
    """Four layers: whole periods of one or two, or one of three and a remainder."""
    compute = Compute(remat=remat, unroll=unroll)
    value, grads = jax.jit(jax.value_and_grad(by_scan(compute, period), (0, 1, 2)))(*inputs())
    expected, plain = of_the_loop(period)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert_close(plain, grads, 1e-5)
    assert all(np.abs(g).max() > 1e-2 for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("period", [2, 3])
def test_extra_results_of_layers_are_in_their_order(period: int) -> None:
    params, x_BTD, own = inputs()
    how = (own, call, Compute(unroll=1), HERE)
    stack, graphdef = nnx.merge(GRAPH, params), nnx.split(Layer(KEY))[0]
    apart = nnx.List([nnx.merge(graphdef, p) for p in unstack(params, L).values()])
    expected = by_loop(params, x_BTD, own, period)
    for blocks in (stack, apart):
        x, extras = run_layers(blocks, x_BTD, ROWS, *how, period=period)
        assert_close((x, extras), (expected[0], jnp.stack(expected[1])), 1e-5)


def products(jaxpr: Any) -> int:
    """Number of matrix products in a jaxpr, including everything it calls."""
    count = 0
    for equation in jaxpr.eqns:
        count += equation.primitive.name == "dot_general"
        for value in equation.params.values():
            for part in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(part, "jaxpr", part)
                count += products(inner) if hasattr(inner, "eqns") else 0
    return count


def test_remat_recomputes_what_its_policy_says() -> None:
    """One product forward and two backward; one more in the backward pass unless its result was kept."""
    counts = {}
    for remat in ("none", "dots", "full"):
        gradient = jax.grad(by_scan(Compute(remat=remat, unroll=1)), (0, 1))
        counts[remat] = products(jax.make_jaxpr(gradient)(*inputs()).jaxpr)
    assert counts == {"none": 3, "dots": 3, "full": 4}


def test_each_layer_is_made_with_a_key_of_its_own() -> None:
    stack = stacked(Layer, KEY, L)
    layers = unstack(nnx.to_pure_dict(nnx.split(stack)[1]), L)
    for i, key in enumerate(jax.random.split(KEY, L)):
        assert_same(layers[i], nnx.to_pure_dict(nnx.split(Layer(key))[1]))
    assert len({np.asarray(layer["inner"]["weight"]).tobytes() for layer in layers.values()}) == L


def test_stacking_names_the_new_axis() -> None:
    stack = stacked(Layer, KEY, L)
    names = {path: v.get_metadata()["axes"] for path, v in nnx.to_flat_state(nnx.split(stack)[1])}
    assert names == {
        ("inner", "bias"): ("layers", "mlp"),
        ("inner", "weight"): ("layers", "embed", "mlp"),
        ("norm", "scale"): ("layers", "vector"),
    }


@pytest.mark.parametrize("unroll", [1, L], ids=["scanned", "unrolled"])
def test_remat_keeps_less_also_between_unrolled_layers(unroll: int) -> None:
    """Otherwise the compiler would detect the recomputation and keep the first result."""
    if unroll > 1 and jax.__version_info__ < (0, 11):
        pytest.skip("XLA for CPUs in jax 0.10 drops barriers first: remat needs compute.unroll=1 there")
    graphdef, state = nnx.split(stacked(WideLayer, KEY, L))
    params, x = nnx.to_pure_dict(state), jnp.ones((4, 64, D))

    def one(block: WideLayer, x: jax.Array, rows: None, own: None, place: int) -> tuple[jax.Array, None]:
        return block(x), None

    def temporaries(remat: str) -> int:
        compute = Compute(dtype="float32", remat=remat, unroll=unroll)

        def total(params, x):
            blocks = nnx.merge(graphdef, params)
            return jnp.sum(run_layers(blocks, x, None, None, one, compute, HERE)[0])

        return jax.jit(jax.grad(total)).lower(params, x).compile().memory_analysis().temp_size_in_bytes

    assert temporaries("full") < 0.7 * temporaries("none")


class WideLayer(nnx.Module):
    """A residual branch with eight times the hidden size."""

    def __init__(self, key: jax.Array) -> None:
        how = {"bias": False, "std": 0.5, "dtype": jnp.dtype("float32"), "target": HERE}
        self.up = Linear(key, (D,), (32 * D,), ("embed", "mlp"), **how)
        self.down = Linear(key, (32 * D,), (D,), ("mlp", "embed"), **how)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.down(jnp.tanh(self.up(x)))
