"""Weights by output: exact integers, the error of rounding, tables, and any number of rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import HERE

from jaxgpt.config.decoding import Weights
from jaxgpt.layers import by_output as module
from jaxgpt.layers.by_output import ByOutput, by_output, from_rows, pieces, rounded, rounding
from jaxgpt.layers.linear import contract

F32, BF16 = jnp.dtype("float32"), jnp.dtype("bfloat16")
INPUTS = (8, 64, 172, 1544)


def drawn(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("rows", [1, 2, 5, 17])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_product_is_that_of_the_array(inputs: int, rows: int, dtype: jnp.dtype) -> None:
    x, w = drawn(rows, inputs), drawn(inputs, 3, 4, seed=1)
    made = by_output(w, 1, dtype).product(x, 1, dtype, HERE)
    assert made.shape == (rows, 3, 4)
    assert made.dtype == x.dtype
    np.testing.assert_allclose(made, contract(x, w, 1, dtype, HERE), rtol=2e-5, atol=2e-5 * inputs**0.5)


def test_several_axes_are_contracted() -> None:
    x, w = drawn(2, 3, 4, 6), drawn(4, 6, 5, seed=1)
    made = by_output(w, 2, F32).product(x, 2, F32, HERE)
    np.testing.assert_allclose(made, jnp.tensordot(x, w, 2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_int8_is_exact_integer_arithmetic(inputs: int, rows: int) -> None:
    """What is rounded is summed as numpy sums it in 64 bits."""
    x, w = drawn(rows, inputs), drawn(inputs, 11, seed=1)
    weight = by_output(w, 1, F32, "int8")
    x_NI, scale_N1 = (np.asarray(a) for a in rounded(x))
    exact = x_NI.astype(np.int64) @ np.asarray(weight.values_OI).astype(np.int64)[:, :inputs].T
    made = np.asarray(weight.times(x))
    np.testing.assert_allclose(made, exact * scale_N1 * np.asarray(weight.scale_O), rtol=3e-7)
    np.testing.assert_allclose(made, x @ w, atol=0.02 * np.linalg.norm(x @ w) / np.sqrt(made.size) * 3)


def test_int8_is_about_one_per_cent_off() -> None:
    x, w = drawn(4, 768), drawn(768, 256, seed=1)
    made, exact = by_output(w, 1, F32, "int8").times(x), x @ w
    assert 0.005 < float(jnp.linalg.norm(made - exact) / jnp.linalg.norm(exact)) < 0.015


@pytest.mark.parametrize("weights", ["by_output", "int8"])
def test_a_row_is_the_same_alone_and_in_company(weights: Weights) -> None:
    x, w = drawn(6, 96), drawn(96, 40, seed=1)
    weight = by_output(w, 1, F32, weights)
    alone = jnp.concatenate([weight.times(row[None]) for row in x])
    np.testing.assert_allclose(alone, weight.times(x), rtol=0 if weights == "int8" else 1e-5, atol=1e-5)


def test_rows_of_a_table() -> None:
    table = drawn(9, 20)
    ids = jnp.asarray([[0, 8], [3, 100]])
    np.testing.assert_array_equal(from_rows(table, F32).rows(ids, F32), table[jnp.asarray([[0, 8], [3, 8]])])
    rows = from_rows(table, F32, "int8").rows(ids, F32)
    steps = jnp.abs(table).max(1) / 127
    assert (jnp.abs(rows[1, 0] - table[3]) <= 0.501 * steps[3]).all()


def test_zeros_round_to_zeros() -> None:
    values, scale = rounded(jnp.zeros((2, 3)))
    assert not values.any()
    assert (scale > 0).all()


def test_the_error_of_rounding_is_known_from_the_steps() -> None:
    w = drawn(256, 64)
    weight = by_output(w, 1, F32, "int8")
    back = weight.values_OI.T * weight.scale_O
    moved = float(jnp.linalg.norm(back - w) / jnp.linalg.norm(w))
    assert rounding({"a": weight, "b": w, "c": by_output(w, 1, F32)}) == pytest.approx(moved, rel=0.05)


@pytest.mark.parametrize("inputs", [1, 8, 100, 768, 3072, 2048, 11008, 50257])
def test_pieces_cover_the_inputs_with_little_padding(inputs: int) -> None:
    parts, terms = pieces(inputs)
    assert inputs <= parts * terms * module.LANES < inputs + parts * module.LANES
    assert terms <= module.TERMS


def test_it_is_a_pytree() -> None:
    weight = by_output(drawn(8, 4), 1, BF16, "int8")
    again = jax.tree.unflatten(*reversed(jax.tree.flatten(weight)))
    assert isinstance(again, ByOutput)
    assert again.outputs == (4,)
    assert again.dtype == F32
