"""The one seam of every matrix product: LoRA, quantization and sharding hook in here.

Shapes: V vocabulary, D model width, N rows, I inputs, O outputs, E experts; other axes
are named by the caller.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from jaxgpt.layers.fusion import pin, transposed
from jaxgpt.sharding import constrain


class Linear(nnx.Module):
    """`y = x . weight + bias`, contracting the last axes of x with the first axes of the weight.

    Args:
      key: for the initial weight, normal with standard deviation `std`.
      inputs: sizes of the contracted axes, such as `(D,)` or `(H, K)`.
      outputs: sizes of the axes that result.
      axes: logical names of `inputs + outputs`, for the sharding table.
      bias: whether to add a bias (zero at first).
      dtype: of the product; the parameters stay float32.
    """

    def __init__(
        self,
        key: jax.Array,
        inputs: tuple[int, ...],
        outputs: tuple[int, ...],
        axes: tuple[str, ...],
        *,
        bias: bool,
        std: float,
        dtype: jnp.dtype,
    ) -> None:
        self.contracted = len(inputs)
        self.dtype = dtype
        weight = std * jax.random.normal(key, (*inputs, *outputs), jnp.float32)
        self.weight = nnx.Param(weight, axes=axes, inputs=len(inputs))
        out_axes = axes[len(inputs) :]
        bias_axes = ("vector",) if out_axes == ("embed",) else out_axes
        self.bias = nnx.Param(jnp.zeros(outputs), axes=bias_axes) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = contract(x, self.weight[...], self.contracted, self.dtype)
        return pin(y if self.bias is None else y + self.bias[...].astype(y.dtype))


def contract(x: jax.Array, weight: jax.Array, axes: int, dtype: jnp.dtype) -> jax.Array:
    """`jnp.tensordot(x, weight, axes)` as one plain product of matrices, read in `dtype`."""
    rows = x.reshape(-1, math.prod(weight.shape[:axes]))
    return product(rows, weight, dtype).reshape(*x.shape[: x.ndim - axes], *weight.shape[axes:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x_NI: jax.Array, weight: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """`x @ w` [N, O] on factors rounded to `dtype`; the result is of the type of x.

    The weight may have more axes than two: it is read as a matrix [I, O] in here, since what the
    backward pass keeps is then the parameter itself. A reshaped one would be a copy of it, one for
    every layer of a scan. Its gradient is accumulated and returned in its own type, not in `dtype`.
    """
    return _product(x_NI, weight, dtype)[0]


def _product(x_NI, weight, dtype):  # noqa: ANN001, ANN202
    x, w_IO = pin(x_NI.astype(dtype)), weight.reshape(x_NI.shape[1], -1)
    return jnp.matmul(x, w_IO.astype(dtype), preferred_element_type=x_NI.dtype), (x, weight)


def _product_back(dtype, saved, dy_NO):  # noqa: ANN001, ANN202
    x_NI, weight = saved
    dy, w_IO = pin(dy_NO.astype(dtype)), weight.reshape(x_NI.shape[1], -1).astype(dtype)
    dx_NI = jax.lax.dot_general(dy, w_IO, (((1,), (1,)), ((), ())), preferred_element_type=dy_NO.dtype)
    dw_IO = jnp.matmul(transposed(x_NI), dy, preferred_element_type=weight.dtype)
    return dx_NI, dw_IO.reshape(weight.shape)


product.defvjp(_product, _product_back)


class GroupedLinear(nnx.Module):
    """Weights of E products, one an expert: [E, I, O]; see `grouped_product`."""

    def __init__(
        self, key: jax.Array, experts: int, inputs: int, outputs: int, axes: tuple[str, str], *, std: float
    ) -> None:
        weight = std * jax.random.normal(key, (experts, inputs, outputs), jnp.float32)
        self.weight = nnx.Param(weight, axes=("experts", *axes), inputs=1, lead=1)


def grouped_product(
    x_NI: jax.Array, weight_EIO: jax.Array, sizes_E: jax.Array, dtype: jnp.dtype
) -> jax.Array:
    """Rows of x, sorted by expert, each times its expert's matrix: [N, O], accumulated in float32.

    The first `sizes_E[0]` rows belong to expert 0 and so on; rows beyond all sizes come out as rubbish.
    """
    return jax.lax.ragged_dot(
        x_NI.astype(dtype), weight_EIO.astype(dtype), sizes_E, preferred_element_type=jnp.float32
    )


class Embedding(nnx.Module):
    """A table of V rows of width D, read by id; also the output projection when tied."""

    def __init__(
        self, key: jax.Array, rows: int, width: int, *, std: float, axes: tuple[str, str] = ("vocab", "embed")
    ) -> None:
        self.rows = axes[0]
        self.weight = nnx.Param(std * jax.random.normal(key, (rows, width), jnp.float32), axes=axes)

    def __call__(self, ids: jax.Array, dtype: jnp.dtype) -> jax.Array:
        # Gathered over the width first: a look-up in a table split both ways would be replicated.
        table = constrain(self.weight[...].astype(dtype), self.rows, "features")
        return jnp.take(table, ids, axis=0, mode="clip")


def unembed(x: jax.Array, weight_VD: jax.Array) -> jax.Array:
    """Logits `x . weight^T` over the vocabulary, accumulated in float32."""
    dims = (((x.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, weight_VD.astype(x.dtype), dims, preferred_element_type=jnp.float32)


def softcap(logits: jax.Array, cap: float | None) -> jax.Array:
    """Squash logits into (-cap, cap) smoothly (Gemma 2, section 2); None leaves them."""
    return logits if cap is None else cap * jnp.tanh(logits / cap)
