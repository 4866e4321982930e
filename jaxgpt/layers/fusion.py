"""Where XLA's compiler for CPUs needs a hand; on GPUs and TPUs everything here is the identity.

What each of these is worth is measured in benchmarks/results.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint


def on_cpu() -> bool:
    """Whether programs are compiled for a CPU."""
    return jax.default_backend() == "cpu"


def pin(x: Any) -> Any:
    """Compute x, an array or a pytree of them, once and keep it.

    XLA for CPUs copies cheap elementwise chains into every product that reads them: with unrolled
    layers a residual stream is computed anew in each consumer, backward pass included. Elsewhere
    that fusion is what we want.
    """
    return jax.lax.optimization_barrier(x) if on_cpu() else x


def transposed(x: jax.Array) -> jax.Array:
    """The transpose of a matrix, written out in rows.

    Left to itself the compiler reads x against the grain, for which it has no fast product on CPUs.
    """
    return pin(with_layout_constraint(x.T, Layout((0, 1)))) if on_cpu() else x.T


def stream_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """Type of the residual stream when products are computed in `dtype`.

    On a CPU only products are faster in bfloat16; all else is slower, so there it stays float32.
    """
    return jnp.dtype(jnp.float32) if on_cpu() else dtype
