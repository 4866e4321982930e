"""How weights are rounded to few bits so that what layers compute changes little.

Shapes: I inputs, O outputs, G groups of inputs that share a scale, S inputs of a group, L layers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxgpt.convert.calibrate import Inputs
from jaxgpt.layers.quantized import FOUR_BITS, Form, Quantized, from_codes, group_size, nearest, quantize
from jaxgpt.tune.base import Path
from jaxgpt.tune.ia3 import Scaled

DAMPING = 0.01
"""What GPTQ adds to the diagonal of the products, as a share of its mean (section 3.3)."""
STEPS = 20
"""Exponents between 0 and 1 that AWQ tries (section 3.2)."""
MIGRATION = 0.5
"""SmoothQuant's exponent: 0 leaves outliers in the inputs, 1 moves them into the weights (section 4)."""
COLUMNS = 128
"""Inputs after whose rounding GPTQ makes up for the errors in all later ones at once (section 3.3)."""


@functools.partial(jax.jit, static_argnames=("form", "inputs"))
def gptq(weight: jax.Array, seen: Inputs, form: Form, inputs: int) -> Quantized:
    """A weight whose rounding errors are made up for by the inputs that are rounded after them.

    It lowers the squared error of the layer's outputs on what was seen (Frantar et al. 2023, algorithm 1).

    Args:
      weight: [*inputs, *outputs] of one layer.
      seen: its inputs' `products`.
      form: of the bits.
      inputs: number of contracted axes.
    """
    size, last = math.prod(weight.shape[:inputs]), weight.shape[inputs - 1]
    w_IO, S = weight.reshape(size, -1).astype(jnp.float32), group_size(last, form)
    grouped = form in FOUR_BITS
    block = S if grouped else max(d for d in range(1, min(COLUMNS, size) + 1) if size % d == 0)
    upper_II, dead_I = _upper(seen["products"])
    w_IO = jnp.where(dead_I[:, None], 0.0, w_IO)
    whole = None if grouped else _scale(w_IO, form)

    def one_block(w_IO: jax.Array, start: jax.Array) -> tuple[jax.Array, Any]:
        w_SO = jax.lax.dynamic_slice_in_dim(w_IO, start, block)
        rows_SI = jax.lax.dynamic_slice_in_dim(upper_II, start, block)
        own_SS = jax.lax.dynamic_slice_in_dim(rows_SI, start, block, axis=1)
        scale_O = _scale(w_SO, form) if whole is None else whole

        def one_input(i: jax.Array, state: Any) -> Any:
            w_SO, codes_SO, errors_SO = state
            codes_O, value_O = nearest(w_SO[i] / scale_O, form)
            error_O = (w_SO[i] - value_O * scale_O) / own_SS[i, i]
            w_SO = w_SO - jnp.where(jnp.arange(block) > i, own_SS[i], 0.0)[:, None] * error_O
            return w_SO, codes_SO.at[i].set(codes_O), errors_SO.at[i].set(error_O)

        empty = jnp.zeros(w_SO.shape, nearest(w_SO, form)[0].dtype)
        _, codes_SO, errors_SO = jax.lax.fori_loop(0, block, one_input, (w_SO, empty, jnp.zeros_like(w_SO)))
        later_SI = jnp.where(jnp.arange(size) >= start + block, rows_SI, 0.0)
        return w_IO - later_SI.T @ errors_SO, (codes_SO, scale_O)

    _, (codes, scale_GO) = jax.lax.scan(one_block, w_IO, jnp.arange(0, size, block))
    groups = (*weight.shape[: inputs - 1], last // S) if grouped else (1,) * inputs
    scale = (scale_GO if grouped else scale_GO[0]).reshape(*groups, *weight.shape[inputs:])
    return Quantized(from_codes(codes.reshape(weight.shape), scale, form))


def _scale(w_IO: jax.Array, form: Form) -> jax.Array:
    """The scale of each output that covers these inputs, one group."""
    return quantize(w_IO, form, 0, 1).array.scale[0]


def _upper(products_II: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The upper Cholesky factor of the inverse of the damped products, and which inputs were always 0."""
    diagonal_I = jnp.diag(products_II)
    dead_I = diagonal_I == 0
    damping = DAMPING * jnp.mean(diagonal_I)
    damped_II = products_II + jnp.diag(jnp.where(dead_I, 1.0, damping + 1e-30))
    lower_II = jnp.linalg.cholesky(damped_II)
    inverse_II = jax.scipy.linalg.cho_solve((lower_II, True), jnp.eye(len(dead_I)))
    return jnp.linalg.cholesky(inverse_II).T, dead_I


@functools.partial(jax.jit, static_argnames=("form", "inputs"))
def awq(weight: jax.Array, seen: Inputs, form: Form, inputs: int) -> Scaled:
    """A weight whose inputs are scaled before rounding, by a power of how large they are on average.

    The exponent is that with the least squared error of the layer's outputs (Lin et al. 2024, equation 5);
    the factors stay beside the weight, so that the function is unchanged but for the rounding.

    Args:
      weight, form, inputs: as for `gptq`.
      seen: `products` and `sizes`.
    """
    size_I = jnp.maximum(seen["sizes"] / jnp.maximum(seen["sizes"].max(), 1e-30), 1e-4)
    size = size_I.reshape(*weight.shape[:inputs], *(1,) * (weight.ndim - inputs))
    weight = weight.astype(jnp.float32)

    def scaled(exponent: jax.Array) -> tuple[Quantized, jax.Array]:
        factor = size**exponent
        factor = factor / jnp.sqrt(factor.max() * factor.min())
        return quantize(weight * factor, form, 0, inputs), factor

    def error(exponent: jax.Array) -> jax.Array:
        few, factor = scaled(exponent)
        wrong_IO = (few.whole() / factor - weight).reshape(size_I.size, -1)
        return jnp.sum(wrong_IO * (seen["products"] @ wrong_IO))

    exponents = jnp.linspace(0, 1, STEPS)
    few, factor = scaled(exponents[jnp.argmin(jax.lax.map(error, exponents))])
    return Scaled(few, into=1 / factor.reshape(weight.shape[:inputs]))


BY_LAYER: Mapping[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "gptq": (gptq, ("products",)),
    "awq": (awq, ("products", "sizes")),
}
"""Methods that round a layer's weight by its inputs: the function, and which sums it needs."""


def smooth(
    flat: dict[Path, Any], readers: Mapping[Path, list[tuple[Path, int]]], seen: Mapping[Path, list[Inputs]],
    offset: float,
) -> dict[Path, Any]:  # fmt: skip
    """Parameters whose norms give outputs with smaller outliers, and whose next weights make up for it.

    Of each input j of the weights after a norm, the norm is divided by max|x_j|^a / max|w_j|^(1 - a) and the
    weights multiplied by it (Xiao et al. 2023, equation 4): in float the model computes the same.

    Args:
      flat: parameters by path, those of layers stacked.
      readers: for each norm, the weights [L, I, *outputs] that read it, with their numbers of outputs' axes;
        nothing else reads it.
      seen: `peaks` of each layer's inputs to these weights.
      offset: what is added to a norm's scale before it is multiplied.
    """
    flat = dict(flat)
    for norm, weights in readers.items():
        peaks_LI = jnp.stack([inputs["peaks"] for inputs in seen[weights[0][0]]])
        largest_LI = functools.reduce(
            jnp.maximum, [jnp.abs(flat[path]).max(range(2, 2 + outputs)) for path, outputs in weights]
        )
        factor_LI = jnp.maximum(peaks_LI, 1e-5) ** MIGRATION / jnp.maximum(largest_LI, 1e-5) ** (
            1 - MIGRATION
        )
        for path, outputs in weights:
            flat[path] = flat[path] * factor_LI.reshape(*factor_LI.shape, *(1,) * outputs)
        scale, bias = (*norm, "scale"), (*norm, "bias")
        flat[scale] = (flat[scale] + offset) / factor_LI - offset
        if bias in flat:
            flat[bias] = flat[bias] / factor_LI
    return flat
