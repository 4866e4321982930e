"""Weights held in few bits: a `Weight` around qwix's `QArray`.

Shapes: N rows, I inputs, O outputs.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxgpt.errors import UserError
from jaxgpt.target import Target

Form = Literal["int8", "int4", "nf4"]
BLOCK = 64
"""Inputs that share a scale in 4 bits (QLoRA, section 3); of 8 bits, all inputs of an output do."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quantized:
    """A weight in 8 or 4 bits (QLoRA; Dettmers et al. 2023), rounded to `dtype` again at each product.

    It is not trained: it gets no gradient, and its backward pass keeps the few bits alone.

    Attributes:
      array: a qwix `QArray` [..., I, O] whose leading axes are those of layers or experts.
    """

    array: Any

    def product(
        self, x: jax.Array, axes: int, dtype: jnp.dtype, target: Target, ids: jax.Array | None = None
    ) -> jax.Array:
        """`layers.linear.contract` with this weight."""
        shape = self.array.shape
        rows_NI = x.reshape(-1, math.prod(shape[:axes]))
        y_NO = _product(rows_NI, self.array, axes, dtype, target)
        return y_NO.reshape(*x.shape[: x.ndim - axes], *shape[axes:])

    def whole(self) -> jax.Array:
        """The weight as a float32 array."""
        return _qwix().dequantize(self.array).astype(jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _product(x_NI: jax.Array, array: Any, axes: int, dtype: jnp.dtype, target: Target) -> jax.Array:
    w_IO = _rounded(array, axes, dtype)
    return jnp.matmul(target.pin(x_NI.astype(dtype)), w_IO, preferred_element_type=x_NI.dtype)


def _product_back(axes, dtype, target, saved, dy_NO):  # noqa: ANN001, ANN202
    array, dy = saved, target.pin(dy_NO.astype(dtype))
    dims = (((1,), (1,)), ((), ()))
    dx_NI = jax.lax.dot_general(dy, _rounded(array, axes, dtype), dims, preferred_element_type=dy_NO.dtype)
    return dx_NI, None


_product.defvjp(
    lambda x, array, axes, dtype, target: (_product(x, array, axes, dtype, target), array), _product_back
)


def _rounded(array: Any, axes: int, dtype: jnp.dtype) -> jax.Array:
    w = _qwix().dequantize(array)
    return w.astype(dtype).reshape(math.prod(w.shape[:axes]), -1)


def quantize(weight: jax.Array, form: Form, lead: int, inputs: int) -> Quantized:
    """A weight in few bits.

    Args:
      weight: [*lead, *inputs, *outputs].
      form: of the bits; each output has a scale, and with 4 bits each `BLOCK` of its inputs.
      lead: number of axes of layers or experts.
      inputs: number of contracted axes.
    """
    last = lead + inputs - 1
    tiles = {}
    if form != "int8" and weight.shape[last] % BLOCK == 0:
        tiles = {last: BLOCK}
    elif form != "int8":
        tiles = {last: math.gcd(weight.shape[last], BLOCK)}
    channels = [axis for axis in range(weight.ndim) if axis < last or axis > last]
    kind: Any = form if form == "nf4" else jnp.dtype(form)
    if form == "int8":  # one scale for all inputs of an output
        channels = [axis for axis in range(weight.ndim) if axis < lead or axis > last]
    array = _qwix().quantize(
        weight, kind, channelwise_axes=channels, tiled_axes=tiles, scale_dtype=jnp.float32
    )
    return Quantized(array)


def _qwix() -> Any:
    try:
        import qwix
    except ImportError:
        words = "quantized weights need qwix; install it with `pip install 'jaxgpt[quant]'`."
        raise UserError(words) from None
    return qwix
