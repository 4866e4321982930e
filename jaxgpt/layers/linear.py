"""The one seam of every matrix product: LoRA, quantization and sharding hook in here.

Shapes: V vocabulary, D hidden size, N rows, I inputs, O outputs, E experts; the caller names
other axes.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental.layout import Layout, with_layout_constraint
from jax.lax import Precision
from jax.sharding import PartitionSpec as P

from jaxgpt.layers.perturb import perturbed
from jaxgpt.sharding import constrain, spec
from jaxgpt.target import Target


class Linear(nnx.Module):
    """`y = x . weight + bias`, contracting the last axes of x with the first axes of the weight.

    A weight is an array, or one of other kinds (`Weight`): adapters and quantized weights replace the array
    among the parameters.

    Args:
      key: for the initial weight, normal with standard deviation `std`.
      inputs: sizes of the contracted axes, such as `(D,)` or `(H, K)`.
      outputs: sizes of the resulting axes.
      axes: logical names of `inputs + outputs`, for the sharding table.
      bias: whether to add a bias (initially zero).
      dtype: of the product; the parameters stay float32.
      target: what the program is built for.
      precision: of a float32 product, which TPUs compute with bfloat16 factors and GPUs with TF32 by default;
        None keeps that default.
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
        target: Target,
        precision: Precision | None = None,
    ) -> None:
        self.contracted = len(inputs)
        self.dtype, self.target, self.precision = dtype, target, precision
        weight = std * jax.random.normal(key, (*inputs, *outputs), jnp.float32)
        self.weight = nnx.Param(weight, axes=axes, role="matrix", inputs=len(inputs), read_in=dtype.name)
        out_axes = axes[len(inputs) :]
        bias_axes = ("vector",) if out_axes == ("embed",) else out_axes
        self.bias = nnx.Param(jnp.zeros(outputs), axes=bias_axes, role="bias") if bias else None

    def __call__(self, x: jax.Array, ids: jax.Array | None = None) -> jax.Array:
        """The product; `ids` [B] chooses each row's adapter where the weight holds several."""
        how = (self.contracted, self.dtype, self.target, self.precision, ids)
        y = weighted(x, self.weight.get_value(), *how)
        return self.target.pin(y if self.bias is None else add_bias(y, self.bias[...], self.target))


class Weight(Protocol):
    """What may stand in an array's place as a weight: a registered dataclass (a pytree)."""

    def product(
        self, x: jax.Array, axes: int, dtype: jnp.dtype, target: Target, ids: jax.Array | None = None
    ) -> jax.Array:
        """`contract` with this weight; `ids` [B] are of the rows' adapters, if there are several."""
        ...


def weighted(
    x: jax.Array,
    weight: Any,
    axes: int,
    dtype: jnp.dtype,
    target: Target,
    precision: Precision | None = None,
    ids: jax.Array | None = None,
) -> jax.Array:
    """The product with a weight of any kind, an array or a `Weight`."""
    if isinstance(weight, jax.Array):
        return contract(x, weight, axes, dtype, target, precision)
    return weight.product(x, axes, dtype, target, ids)


def contract(
    x: jax.Array,
    weight: jax.Array,
    axes: int,
    dtype: jnp.dtype,
    target: Target,
    precision: Precision | None = None,
) -> jax.Array:
    """`jnp.tensordot(x, weight, axes)` as one plain matrix product in `dtype`."""
    rows = x.reshape(-1, math.prod(weight.shape[:axes]))
    y_NO = product(rows, weight, dtype, target, precision)
    return y_NO.reshape(*x.shape[: x.ndim - axes], *weight.shape[axes:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def product(
    x_NI: jax.Array, weight: jax.Array, dtype: jnp.dtype, target: Target, precision: Precision | None = None
) -> jax.Array:
    """`x @ w` [N, O] on factors rounded to `dtype`; the result has the type of x.

    The weight may have more than two axes. It is reshaped to a matrix [I, O] in here, so that the backward
    pass keeps the parameter itself. A weight reshaped outside would be kept as a copy, one for every layer of
    a scan. Its gradient is accumulated and returned in the weight's own type, not in `dtype`.
    """
    return _product(x_NI, weight, dtype, target, precision)[0]


def _product(x_NI, weight, dtype, target, precision):  # noqa: ANN001, ANN202
    x, w_IO = target.pin(x_NI.astype(dtype)), weight.reshape(x_NI.shape[1], -1)
    how = {"precision": precision, "preferred_element_type": x_NI.dtype}
    return jnp.matmul(x, w_IO.astype(dtype), **how), (x, weight)


def _product_back(dtype, target, precision, saved, dy_NO):  # noqa: ANN001, ANN202
    x_NI, weight = saved
    dy, w_IO = target.pin(dy_NO.astype(dtype)), weight.reshape(x_NI.shape[1], -1).astype(dtype)
    dims = (((1,), (1,)), ((), ()))
    dx_NI = jax.lax.dot_general(dy, w_IO, dims, precision, preferred_element_type=dy_NO.dtype)
    how = {"precision": precision, "preferred_element_type": weight.dtype}
    dw_IO = jnp.matmul(_transposed(x_NI, target), dy, **how)
    return dx_NI, dw_IO.reshape(weight.shape)


product.defvjp(_product, _product_back)


def _transposed(x: jax.Array, target: Target) -> jax.Array:
    """The transpose of a matrix; on a CPU it is materialised in row-major order.

    Otherwise the compiler reads x with strides, for which it has no fast product on CPUs.
    """
    on_cpu = target.platform == "cpu"
    return target.pin(with_layout_constraint(x.T, Layout((0, 1)))) if on_cpu else x.T


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def add_bias(y: jax.Array, bias: jax.Array, target: Target) -> jax.Array:
    """`y + bias` over the last axes, in the type of y.

    Its gradient is summed over all tokens in the bias's own type, float32. A bfloat16 sum would stop growing
    once it is 256 times its next term.
    """
    return y + bias.astype(y.dtype)


def _add_bias_back(target, like, dy):  # noqa: ANN001, ANN202
    dy = target.pin(dy)
    return dy, jnp.sum(dy, range(dy.ndim - like.ndim), dtype=like.dtype)


add_bias.defvjp(lambda y, bias, target: (add_bias(y, bias, target), bias), _add_bias_back)


class GroupedLinear(nnx.Module):
    """The weights [E, I, O] of one product per expert; arrays or other kinds of weights, as in `Linear`.

    Args:
      key: for the initial weights, normal with standard deviation `std`.
      experts: E.
      inputs, outputs: I and O.
      axes: logical names of I and O, for the sharding table.
      dtype: of the product; the parameters stay float32.
      target: what the program is built for.
    """

    def __init__(
        self,
        key: jax.Array,
        experts: int,
        inputs: int,
        outputs: int,
        axes: tuple[str, str],
        *,
        std: float,
        dtype: jnp.dtype,
        target: Target,
    ) -> None:
        self.shape, self.axes = (experts, inputs, outputs), ("experts", *axes)
        self.dtype, self.target = dtype, target
        weight = std * jax.random.normal(key, self.shape, jnp.float32)
        self.weight = nnx.Param(weight, axes=self.axes, role="matrix", inputs=1, lead=1)

    def layout(self) -> Any:
        """Shardings of the weight's arrays."""
        weight = self.weight.get_value()
        return spec(self.axes) if isinstance(weight, jax.Array) else weight.layout(spec(self.axes))

    def __call__(self, x_NI: jax.Array) -> jax.Array:
        """The rows of one expert times its matrix: [N, O].

        The weight must be that of the expert alone, [I, O]: `layers.dispatch` sorts rows into blocks of one
        expert and selects its weights.
        """
        return self.target.pin(weighted(x_NI, self.weight.get_value(), 1, self.dtype, self.target))


class Embedding(nnx.Module):
    """A table of V rows of size D, read by id; also the output projection if tied.

    For decoding, another kind of weight may stand in the array's place (`layers.by_output`).

    Args:
      key: for the initial rows, normal with standard deviation `std`.
      rows: V.
      width: D.
      axes: logical names of both, for the sharding table.
      role: `embedding`, or `position` for a table read by position.
    """

    def __init__(
        self,
        key: jax.Array,
        rows: int,
        width: int,
        *,
        std: float,
        axes: tuple[str, str] = ("vocab", "embed"),
        role: str = "embedding",
    ) -> None:
        self.rows = axes[0]
        weight = std * jax.random.normal(key, (rows, width), jnp.float32)
        self.weight = nnx.Param(weight, axes=axes, role=role)

    @jax.named_scope("embedding")
    def __call__(self, ids: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """The rows [..., D] of ids [...], in `dtype`, which is also that of data sent between devices.

        Those of a vocabulary are open to change (`layers.perturb`).
        """
        table = self.weight.get_value()
        if not isinstance(table, jax.Array):
            return table.rows(ids, dtype)
        x = look_up(table, ids, dtype, self.rows)
        return perturbed(x) if self.rows == "vocab" else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def look_up(table_VD: jax.Array, ids: jax.Array, dtype: jnp.dtype, rows: str) -> jax.Array:
    """Rows [..., D] of a table, looked up in `dtype`; ids beyond the table read its last row.

    The gradient of a row is the sum over all occurrences of its id: thousands, for a common one. It is
    scattered and reduced over devices in the table's own type, float32. If the rows of a table are sharded
    (`rows` is the logical name of that axis), each device looks up the rows that it holds.
    """
    # Gathered over the hidden size first: a look-up in a table split both ways would be replicated.
    table_VD = constrain(table_VD.astype(dtype), rows, "features")

    def local(table_VD: jax.Array, ids: jax.Array, first: jax.Array | int = 0) -> jax.Array:
        here = ids - first
        x = jnp.take(table_VD, here, axis=0, mode="clip")
        inside = (here >= 0) & (here < len(table_VD))
        return x if isinstance(first, int) else jnp.where(inside[..., None], x, 0)

    if (axis := _split(rows)) is None:
        return local(table_VD, ids)

    def part(table_VD: jax.Array, ids: jax.Array) -> jax.Array:
        ids = jnp.clip(ids, 0, len(table_VD) * jax.lax.axis_size(axis) - 1)
        x = local(table_VD, ids, jax.lax.axis_index(axis) * len(table_VD))
        return jax.lax.psum(x, axis)  # only one term of each sum is not zero: exact in any type

    return jax.shard_map(part, in_specs=(P(axis), P()), out_specs=P(), axis_names={axis})(table_VD, ids)


def _look_up_back(dtype, rows, saved, dx):  # noqa: ANN001, ANN202
    like, ids = saved

    def scatter(ids: jax.Array, dx: jax.Array, length: int, first: jax.Array | int = 0) -> jax.Array:
        at = ids - first
        at = jnp.where((at >= 0) & (at < length), at, length)  # outside this shard: dropped
        table = jnp.zeros((length, like.shape[1]), like.dtype)
        return table.at[at].add(dx.astype(like.dtype), mode="drop")

    ids = jnp.clip(ids, 0, like.shape[0] - 1)
    if (axis := _split(rows)) is None:
        return scatter(ids, dx, like.shape[0]), None

    def part(ids: jax.Array, dx: jax.Array) -> jax.Array:
        length = like.shape[0] // jax.lax.axis_size(axis)
        return scatter(ids, dx, length, jax.lax.axis_index(axis) * length)

    specs = {"in_specs": (P(), P()), "out_specs": P(axis), "axis_names": {axis}}
    return jax.shard_map(part, **specs)(ids, dx), None


look_up.defvjp(
    lambda table, ids, dtype, rows: (look_up(table, ids, dtype, rows), (table, ids)),
    _look_up_back,
)


def _split(rows: str) -> str | None:
    """The mesh axis that splits a table's rows over several devices, if there is one."""
    mesh, axes = jax.sharding.get_abstract_mesh(), spec((rows,))
    if mesh.empty or axes[0] is None or mesh.shape[axes[0]] == 1:
        return None
    return axes[0]


def unembed(x: jax.Array, weight_VD: Any) -> jax.Array:
    """Logits `x . weight^T` over the vocabulary, accumulated in float32."""
    if not isinstance(weight_VD, jax.Array):
        return weight_VD.times(x)
    dims = (((x.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, weight_VD.astype(x.dtype), dims, preferred_element_type=jnp.float32)


def softcap(logits: jax.Array, cap: float | None) -> jax.Array:
    """Squash logits smoothly into (-cap, cap) (Gemma 2, section 2); None leaves them unchanged."""
    return logits if cap is None else cap * jnp.tanh(logits / cap)
