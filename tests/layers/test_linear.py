"""The seam of all products, the tables around the layers, and the soft-cap on logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from same import assert_same, normal
from tiny import HERE, MIXED, ONE, mesh

from jaxgpt.layers.linear import Embedding, Linear, contract, look_up, product, softcap, unembed

HALF, SINGLE = jnp.dtype("bfloat16"), jnp.dtype("float32")


def wide(x: jax.Array) -> np.ndarray:
    """A value rounded to half precision, as float64."""
    return np.asarray(jnp.asarray(x, HALF), np.float64)


@pytest.mark.parametrize("stream", [SINGLE, HALF], ids=str)
@pytest.mark.parametrize(
    ("x_shape", "w_shape", "axes"), [((2, 5, 8), (8, 3, 4), 1), ((7, 3, 4), (3, 4, 8), 2)]
)
def test_half_precision_products_and_their_gradients(
    x_shape: tuple[int, ...], w_shape: tuple[int, ...], axes: int, stream: jnp.dtype
) -> None:
    x, w = normal(0, *x_shape).astype(stream), normal(1, *w_shape)
    y, back = jax.jit(lambda x, w: jax.vjp(lambda x, w: contract(x, w, axes, HALF, HERE), x, w))(x, w)
    assert y.dtype == stream
    dy = normal(2, *y.shape).astype(stream)
    dx, dw = back(dy)
    assert (dx.dtype, dw.dtype) == (stream, SINGLE)
    rounding = 2**-8 if stream == HALF else 1e-6
    inner = x.ndim - axes
    plain_dx = np.tensordot(wide(dy), wide(w), (range(inner, dy.ndim), range(axes, w.ndim)))
    plain_dw = np.tensordot(wide(x), wide(dy), (range(inner), range(inner)))
    for ours, plain, size in (
        (y, np.tensordot(wide(x), wide(w), axes), rounding),
        (dx, plain_dx, rounding),
        (dw, plain_dw, 1e-6),  # never rounded to half precision: the optimizer sums it
    ):
        np.testing.assert_allclose(np.asarray(ours, np.float64), plain, atol=2 * size * np.abs(plain).max())
    assert (dw != dw.astype(HALF).astype(SINGLE)).any()


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_contracts_the_last_axes_and_adds_its_bias(bias: bool) -> None:
    axes = ("heads", "head", "embed")
    layer = Linear(jax.random.key(0), (3, 4), (8,), axes, bias=bias, std=0.5, dtype=SINGLE, target=HERE)
    graphdef, state = nnx.split(layer)
    state = jax.tree.map(lambda leaf: normal(3, *leaf.shape), state)
    layer, x = nnx.merge(graphdef, state), normal(0, 2, 5, 3, 4)
    expected = np.tensordot(x, layer.weight[...], 2)
    assert (layer.bias is not None) == bias
    expected = expected + np.asarray(layer.bias[...]) if bias else expected
    np.testing.assert_allclose(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_a_linear_layer_starts_with_its_spread_and_no_bias() -> None:
    axes = ("embed", "heads", "head")
    layer = Linear(jax.random.key(0), (64,), (8, 16), axes, bias=True, std=0.3, dtype=HALF, target=HERE)
    np.testing.assert_allclose(layer.weight[...].std(), 0.3, rtol=0.05)
    assert not layer.bias[...].any()
    assert layer.weight.get_metadata()["axes"] == ("embed", "heads", "head")
    assert layer.bias.get_metadata()["axes"] == ("heads", "head")
    assert layer.weight[...].dtype == SINGLE


def test_an_exact_product_says_so_in_every_direction() -> None:
    """By default TPUs compute float32 products with bfloat16 factors: a router would choose other experts."""
    x, w = normal(0, 4, 8), normal(1, 8, 2)
    both = jax.value_and_grad(
        lambda x, w: contract(x, w, 1, SINGLE, HERE, jax.lax.Precision.HIGHEST).sum(), (0, 1)
    )
    text = jax.jit(both).lower(x, w).as_text()
    assert text.count("dot_general") == text.count("precision = [HIGHEST, HIGHEST]") == 3


def test_an_embedding_reads_rows_and_its_gradient_is_summed_if_a_row_is_read_twice() -> None:
    table = Embedding(jax.random.key(0), 6, 4, std=1.0)
    graphdef, state = nnx.split(table)
    params, ids = nnx.to_pure_dict(state), jnp.asarray([[0, 3, 3], [5, 3, 0]])
    dy = normal(1, 2, 3, 4)

    def read(params: dict) -> jax.Array:
        return nnx.merge(graphdef, params)(ids, SINGLE)

    rows, back = jax.vjp(read, params)
    np.testing.assert_array_equal(rows, np.asarray(params["weight"])[np.asarray(ids)])
    expected = np.zeros((6, 4), np.float32)
    np.add.at(expected, np.asarray(ids), np.asarray(dy))
    np.testing.assert_allclose(back(dy)[0]["weight"], expected, rtol=1e-6)
    half = table(ids, HALF)
    assert half.dtype == HALF
    np.testing.assert_array_equal(half, rows.astype(HALF))


def test_an_id_beyond_the_table_reads_its_last_row() -> None:
    """As at a padded position beyond the context: any value will do, but not NaN."""
    table = Embedding(jax.random.key(0), 6, 4, std=1.0)
    np.testing.assert_array_equal(table(jnp.asarray([9]), SINGLE)[0], table.weight[...][5])


def test_logits_are_accumulated_and_returned_in_float32() -> None:
    x, w = normal(0, 2, 3, 16), normal(1, 9, 16)
    np.testing.assert_allclose(unembed(x, w), np.asarray(x) @ np.asarray(w).T, rtol=1e-5, atol=1e-5)
    half = unembed(x.astype(HALF), w)
    assert half.dtype == SINGLE
    np.testing.assert_allclose(half, wide(x) @ wide(w).T, rtol=1e-5, atol=1e-5)
    assert (half != half.astype(HALF).astype(SINGLE)).any()


def test_softcap_bounds_keeps_order_and_leaves_small_values() -> None:
    x = jnp.linspace(-200.0, 200.0, 401)
    y = np.asarray(softcap(x, 30.0))
    np.testing.assert_allclose(y, 30 * np.tanh(np.asarray(x, np.float64) / 30), rtol=1e-5, atol=1e-5)
    assert (np.abs(y) <= 30).all()
    assert (np.diff(y[150:251]) > 0).all()
    np.testing.assert_allclose(softcap(x / 1000, 30.0), x / 1000, rtol=1e-4)
    np.testing.assert_allclose(jax.grad(lambda v: softcap(v, 30.0))(0.0), 1.0)
    assert softcap(x, None) is x


@pytest.mark.parametrize(
    ("x_shape", "w_shape", "axes"), [((2, 5, 8), (8, 3, 4), 1), ((2, 5, 3, 4), (3, 4, 8), 2)]
)
def test_contract_is_tensordot(x_shape: tuple[int, ...], w_shape: tuple[int, ...], axes: int) -> None:
    x, w = normal(0, *x_shape), normal(1, *w_shape)
    assert_same(
        lambda x, w: contract(x, w, axes, jnp.dtype("float32"), HERE),
        lambda x, w: jnp.tensordot(x, w, axes),
        x,
        w,
    )


def test_bfloat16_product_rounds_only_its_factors() -> None:
    """Result and gradients stay float32: only the factors are rounded, once."""
    x, w, dy = normal(0, 64, 32), normal(1, 32, 16), normal(2, 64, 16)
    y, back = jax.vjp(lambda x, w: product(x, w, jnp.dtype("bfloat16"), HERE), x, w)
    x16, w16, dy16 = (a.astype(jnp.bfloat16).astype(jnp.float32) for a in (x, w, dy))
    for ours, plain in zip((y, *back(dy)), (x16 @ w16, dy16 @ w16.T, x16.T @ dy16), strict=True):
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-5)


def test_barriers_change_no_value() -> None:
    tree = {"a": normal(0, 3, 4), "b": jnp.arange(3)}
    assert HERE.barriers
    jax.tree.map(np.testing.assert_array_equal, jax.jit(HERE.pin)(tree), tree)


@pytest.mark.parametrize("sizes", [ONE, ONE | {"tensor": 2}, MIXED], ids=["one", "tensor=2", "mixed"])
def test_a_sharded_table_is_looked_up_where_its_rows_are(sizes: dict[str, int]) -> None:
    """Values and gradients on every mesh, including ids beyond the table.

    In float32 if rows are split: XLA for CPUs aborts on a bfloat16 sum over devices.
    """
    dtype = SINGLE if sizes["tensor"] > 1 else HALF
    table, ids = normal(0, 64, 8), jnp.asarray(np.random.default_rng(0).integers(0, 70, (8, 5)))
    dx = normal(1, 8, 5, 8).astype(dtype)
    expected = np.zeros((64, 8), np.float32)
    np.add.at(expected, np.minimum(np.asarray(ids), 63), np.asarray(dx, np.float32))

    @jax.jit
    def both(table: jax.Array, dx: jax.Array) -> tuple[jax.Array, jax.Array]:
        x, back = jax.vjp(lambda table: look_up(table, ids, dtype, "vocab"), table)
        return x, back(dx)[0]

    with jax.set_mesh(mesh(sizes)):
        x, back = both(table, dx)
    np.testing.assert_array_equal(x, table.astype(dtype)[jnp.minimum(ids, 63)])
    assert back.dtype == SINGLE
    np.testing.assert_allclose(back, expected, rtol=1e-6, atol=1e-6)
