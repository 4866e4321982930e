"""Weights in the form that a CPU decodes with fastest: float32, bfloat16 or int8, an output's inputs side by
side.

A step of decoding reads every weight once, so that it is as fast as memory is read. XLA's products for CPUs
reach that with one row in float32 alone: of bfloat16 and int8 they first make a copy, of float32 or in
another order. What is here reads each weight where it lies, and no copy is made (docs/log.md has the
measurements).

Shapes: N rows, I inputs, O outputs, D width; S parts of J terms in L lanes make up the inputs.
"""

from __future__ import annotations

import functools
import math
import operator
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from jaxgpt.config.decoding import Weights
from jaxgpt.target import Target

LANES, TERMS, SUMS = 8, 48, 4
"""Floats in a vector register, terms of the longest sum, and sums that run side by side in a kernel."""
STREAMED = {"float32": 1, "bfloat16": 4, "int8": 1}
"""Rows up to which the kernel here beats XLA's product with the same weight."""
FEW = 16
"""Rows below which XLA's product in bfloat16 is faster with the rows on the left."""
MOST = 127


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ByOutput:
    """A weight for decoding on one CPU; see `by_output`.

    Of an int8 weight, each row of inputs is rounded to int8 too, by its own largest element, and the product
    is one of integers, exact below 2**24: a row's result is the same alone and in any company.

    Attributes:
      values_OI: the weight; its inputs are padded with zeros to what `pieces` needs.
      scale_O: float32, what one step of an int8 weight is worth; None for other types.
      inputs: I without the padding.
      outputs: the axes that O stands for.
    """

    values_OI: Any
    scale_O: Any = None
    inputs: int = field(default=0, metadata={"static": True})
    outputs: tuple[int, ...] = field(default=(), metadata={"static": True})

    @property
    def dtype(self) -> jnp.dtype:
        """The type of what is added to this weight, as an adapter is."""
        return self.values_OI.dtype if self.scale_O is None else jnp.dtype(jnp.float32)

    def product(
        self, x: jax.Array, axes: int, dtype: jnp.dtype, target: Target, ids: jax.Array | None = None
    ) -> jax.Array:
        """`layers.linear.contract` with this weight, in its own type."""
        y = self.times(x.reshape(*x.shape[: x.ndim - axes], self.inputs))
        return y.astype(x.dtype).reshape(*y.shape[:-1], *self.outputs)

    def times(self, x: jax.Array) -> jax.Array:
        """`x . weight^T` [..., O] of x [..., I], in float32."""
        rows_NI = x.reshape(-1, self.inputs)
        rows_NI = jnp.pad(rows_NI, ((0, 0), (0, self.values_OI.shape[1] - self.inputs)))
        if self.scale_O is None:
            rows_NI = jax.lax.optimization_barrier(rows_NI.astype(self.values_OI.dtype))
            y_NO = _product(rows_NI, self.values_OI)
        else:
            rows_NI, scale_N1 = jax.lax.optimization_barrier(rounded(rows_NI.astype(jnp.float32)))
            y_NO = _product(rows_NI, self.values_OI) * scale_N1 * self.scale_O
        return y_NO.reshape(*x.shape[:-1], -1)

    def rows(self, ids: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """The rows [..., D] of a table [V, D]; ids beyond it read its last one."""
        found = jnp.take(self.values_OI, ids, axis=0, mode="clip")[..., : self.inputs]
        if self.scale_O is not None:
            found = found * jnp.take(self.scale_O, ids, axis=0, mode="clip")[..., None]
        return found.astype(dtype)


def by_output(weight: jax.Array, inputs: int, dtype: jnp.dtype, weights: Weights = "own") -> ByOutput:
    """A weight [*inputs, *outputs] in the form for decoding.

    Args:
      weight: the array.
      inputs: number of contracted axes.
      dtype: of its values, unless they are int8.
      weights: whether to round it.
    """
    size = math.prod(weight.shape[:inputs])
    return from_rows(weight.reshape(size, -1).T, dtype, weights, weight.shape[inputs:])


def from_rows(
    weight_OI: jax.Array, dtype: jnp.dtype, weights: Weights = "own", outputs: tuple[int, ...] | None = None
) -> ByOutput:
    """As `by_output`, of a weight [O, I], such as a table of tokens."""
    outputs = weight_OI.shape[:1] if outputs is None else outputs
    if weights != "int8":
        return of_codes(weight_OI.astype(dtype), None, outputs)
    values_OI, scale_O1 = rounded(weight_OI.astype(jnp.float32))
    return of_codes(values_OI, scale_O1[:, 0], outputs)


def of_codes(values_OI: jax.Array, scale_O: jax.Array | None, outputs: tuple[int, ...]) -> ByOutput:
    """As `by_output`, of values that are rounded already."""
    inputs = values_OI.shape[1]
    padding = math.prod(pieces(inputs)) * LANES - inputs
    return ByOutput(jnp.pad(values_OI, ((0, 0), (0, padding))), scale_O, inputs, outputs)


def rounded(x_NI: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rows in int8, and what a step of each is worth [N, 1]: its largest element is 127 steps."""
    largest_N1 = jnp.max(jnp.abs(x_NI), axis=1, keepdims=True)
    scale_N1 = jnp.where(largest_N1 == 0, 1, largest_N1) / MOST  # one that is not finite stays so
    return jnp.round(x_NI / scale_N1).astype(jnp.int8), scale_N1


def rounding(params: Any) -> float:
    """How far rounding to int8 has moved these parameters' weights, in relation to their size (about).

    Both as root mean squares; an error is uniform within a step, so that it follows from the steps.
    """
    moved = size = 0.0
    for w in jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, ByOutput)):
        if isinstance(w, ByOutput) and w.scale_O is not None:
            square_O = jnp.square(w.scale_O)
            moved += float(jnp.sum(square_O)) * w.inputs / 12
            size += float(jnp.sum(square_O * jnp.sum(jnp.square(w.values_OI.astype(jnp.float32)), 1)))
    return math.sqrt(moved / size) if size else 0.0


def pieces(inputs: int) -> tuple[int, int]:
    """Parts S and terms J of each with S x J x LANES inputs: as few more than there are as can be."""
    least = -(-inputs // (LANES * TERMS))
    parts = next((s for s in range(least, 2 * least + 1) if inputs % (s * LANES) == 0), least)
    return parts, -(-inputs // (parts * LANES))


def _product(x_NI: jax.Array, w_OI: jax.Array) -> jax.Array:
    """`x . w^T` in float32, of factors in one type."""
    N, kind = len(x_NI), w_OI.dtype.name
    if STREAMED[kind] >= N:
        # A weight that depends on x stays in the loop over tokens: XLA would take parts of it out, as copies.
        return _streamed(*jax.lax.optimization_barrier((x_NI.astype(jnp.float32), w_OI)))
    dims = (((1,), (1,)), ((), ()))
    if kind == "int8":  # XLA has a fast product of int8 for multiples of 4 rows
        x_NI = jnp.pad(x_NI, ((0, -N % 4), (0, 0)))
        return jax.lax.dot_general(x_NI, w_OI, dims, preferred_element_type=jnp.int32)[:N].astype(jnp.float32)
    if kind == "bfloat16" and N < FEW:
        return jax.lax.dot_general(x_NI, w_OI, dims, preferred_element_type=jnp.float32)
    return jax.lax.dot_general(w_OI, x_NI, dims, preferred_element_type=jnp.float32).T


@jax.jit
def _streamed(x_NI: jax.Array, w_OI: jax.Array) -> jax.Array:
    """The product of a few rows, as one loop over the weights; traced once for all layers.

    The terms of an output are written out, not summed by a reduction, which XLA would not vectorise: each
    lane adds up those of its own inputs, in several sums at a time, as an addition waits for the one before.
    """
    S, J = pieces(x_NI.shape[1])
    x_NSJL, w_OSJL = (a.reshape(len(a), S, J, LANES) for a in (x_NI, w_OI))
    terms = [x_NSJL[None, :, :, j] * _wide(w_OSJL[:, None, :, j]) for j in range(J)]
    sums = [functools.reduce(operator.add, terms[i::SUMS]) for i in range(min(SUMS, J))]
    sum_ONSL = jax.lax.optimization_barrier(functools.reduce(operator.add, sums))
    return (sum_ONSL.reshape(-1, S * LANES) @ jnp.ones(S * LANES)).reshape(-1, len(x_NI)).T


def _wide(w: jax.Array) -> jax.Array:
    """Weights in float32. A bfloat16 is the upper half of one, which the compiler must be told."""
    if w.dtype != jnp.bfloat16:
        return w.astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(w, jnp.uint16).astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(bits << 16, jnp.float32)
