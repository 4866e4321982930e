"""Weights held in few bits: a `Weight` around qwix's `QArray`.

Shapes: N rows, I inputs, O outputs; G groups of inputs that share a scale.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxgpt.config.decoding import Weights
from jaxgpt.errors import UserError
from jaxgpt.layers.by_output import ByOutput, by_output, of_codes
from jaxgpt.target import Target

Form = Literal["int8", "int4", "nf4", "fp8"]
"""`int8` and `int4` are integers, `nf4` the 16 quantiles of QLoRA, `fp8` is float8_e4m3fn."""
Activations = Literal["float", "int8"]
BLOCK = 64
"""Inputs that share a scale in 4 bits (QLoRA, section 3); of 8 bits, all inputs of an output do."""
FOUR_BITS, INTEGERS = ("int4", "nf4"), ("int4", "int8")
_TYPES: dict[str, Any] = {
    "int8": jnp.dtype("int8"),
    "int4": jnp.dtype(jnp.int4),
    "nf4": "nf4",
    "fp8": jnp.dtype(jnp.float8_e4m3fn),
}
"""As qwix names them."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quantized:
    """A weight in 8 or 4 bits (QLoRA; Dettmers et al. 2023), rounded to `dtype` again at each product.

    It is not trained: it gets no gradient, and its backward pass keeps the few bits alone.

    Attributes:
      array: a qwix `QArray` [..., I, O] whose leading axes are those of layers or experts.
      activations: `int8` rounds each row of inputs too, by its own largest element, so that the product is
        one of integers (SmoothQuant; Xiao et al. 2023, section 3). The weight must be int8.
    """

    array: Any
    activations: Activations = field(default="float", metadata={"static": True})

    def product(
        self, x: jax.Array, axes: int, dtype: jnp.dtype, target: Target, ids: jax.Array | None = None
    ) -> jax.Array:
        """`layers.linear.contract` with this weight."""
        shape = self.array.shape
        rows_NI = x.reshape(-1, math.prod(shape[:axes]))
        y_NO = _product(rows_NI, self.array, axes, dtype, target, self.activations)
        return y_NO.reshape(*x.shape[: x.ndim - axes], *shape[axes:])

    def whole(self) -> jax.Array:
        """The weight as a float32 array."""
        return _qwix().dequantize(self.array).astype(jnp.float32)

    def by_output(self, inputs: int, dtype: jnp.dtype, weights: Weights) -> ByOutput:
        """The weight of one layer in the form in which a CPU decodes; int8 keeps its integers."""
        if self.array.qvalue.dtype != jnp.int8:
            return by_output(self.whole(), inputs, dtype, weights)
        shape = self.array.shape
        values_OI = self.array.qvalue.reshape(math.prod(shape[:inputs]), -1).T
        return of_codes(values_OI, self.array.scale.reshape(-1), shape[inputs:])

    def layout(self, split: P) -> Quantized:
        """How the arrays of experts' weights are sharded: like [E, I, O]; scales over experts and outputs."""
        experts, _, outputs = split
        array: Any = self.array.replace(qvalue=split, scale=P(experts, None, outputs))
        return Quantized(array, self.activations)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def _product(
    x_NI: jax.Array, array: Any, axes: int, dtype: jnp.dtype, target: Target, activations: Activations
) -> jax.Array:
    if activations == "int8":
        return target.pin(_product_int8(x_NI, array))
    w_IO = _rounded(array, axes, dtype)
    return jnp.matmul(target.pin(x_NI.astype(dtype)), w_IO, preferred_element_type=x_NI.dtype)


def _product_back(axes, dtype, target, activations, saved, dy_NO):  # noqa: ANN001, ANN202
    array, dy = saved, target.pin(dy_NO.astype(dtype))
    dims = (((1,), (1,)), ((), ()))
    dx_NI = jax.lax.dot_general(dy, _rounded(array, axes, dtype), dims, preferred_element_type=dy_NO.dtype)
    return dx_NI, None


_product.defvjp(lambda x, array, *how: (_product(x, array, *how), array), _product_back)


def _product_int8(x_NI: jax.Array, array: Any) -> jax.Array:
    """The product of inputs and weights in int8, summed in int32."""
    w_IO, scale_O = array.qvalue.reshape(x_NI.shape[1], -1), array.scale.reshape(-1)
    x = _qwix().quantize(x_NI.astype(jnp.float32), jnp.int8, channelwise_axes=(0,))
    y_NO = jax.lax.dot_general(x.qvalue, w_IO, (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32)
    return (y_NO.astype(jnp.float32) * x.scale * scale_O).astype(x_NI.dtype)


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
    channels = [axis for axis in range(weight.ndim) if axis != last]
    tiles = {last: group_size(weight.shape[last], form)}
    if form not in FOUR_BITS:  # one scale for all inputs of an output
        channels, tiles = [axis for axis in channels if axis < lead or axis > last], {}
    how: dict[str, Any] = {"channelwise_axes": channels, "tiled_axes": tiles, "scale_dtype": jnp.float32}
    if form in INTEGERS:  # qwix puts the largest weight halfway between two integers: every program must
        how["calibration_method"] = "absmax,1.0001"  # find the same one
    return Quantized(_qwix().quantize(weight.astype(jnp.float32), _TYPES[form], **how))


def group_size(inputs: int, form: Form) -> int:
    """How many of the last axis of inputs share a scale."""
    return math.gcd(inputs, BLOCK) if form in FOUR_BITS else inputs


def from_codes(codes: jax.Array, scale: jax.Array, form: Form) -> Any:
    """A `QArray` of what `nearest` gives and of scales, which have as many axes."""
    return _qwix().QArray(codes, scale, None, _TYPES[form])


def nearest(x: jax.Array, form: Form) -> tuple[jax.Array, jax.Array]:
    """The codes nearest to weights that were divided by their scales, and what these stand for (float32)."""
    if form == "nf4":
        levels = _qwix().dequantize(from_codes(jnp.arange(16, dtype=jnp.uint4), jnp.ones(16), "nf4"))
        codes = jnp.argmin(jnp.abs(x[..., None] - levels), axis=-1)
        return codes.astype(jnp.uint4), levels[codes]
    kind = _TYPES[form]
    if form == "fp8":
        most = float(jnp.finfo(kind).max)
        codes = jnp.clip(x, -most, most).astype(kind)
    else:
        codes = jnp.clip(jnp.round(x), jnp.iinfo(kind).min, jnp.iinfo(kind).max).astype(kind)
    return codes, codes.astype(jnp.float32)


def _qwix() -> Any:
    try:
        import qwix
    except ImportError:
        words = "quantized weights need qwix; install it with `pip install 'jaxgpt[quant]'`."
        raise UserError(words) from None
    return qwix
