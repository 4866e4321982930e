"""What a program is built for, as a value: never asked for in passing.

A `Target` is resolved once, where a program is built, from the devices of its mesh. So the program of
an accelerator can be traced, compiled and checked on a machine that has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxgpt.config import Compute

PLATFORMS = {"cpu": "cpu", "tpu": "tpu", "gpu": "gpu", "cuda": "gpu", "rocm": "gpu"}
"""JAX's names of a device's platform to ours."""


@dataclass(frozen=True)
class Target:
    """What the devices of a program ask of it (hashable, static).

    Attributes:
      platform: `cpu`, `gpu` or `tpu`.
      device_kind: the maker's name, such as "TPU v5p" or "NVIDIA H100 80GB HBM3".
      stream: type of the residual stream; None means that of the products (`Compute.dtype`).
      unroll: whether layers are unrolled where the config does not say (else they are scanned).
      barriers: whether results are pinned against being computed anew in each consumer; see `pin`.
      interpret: run kernels of the platform in Pallas's interpreter: for tests on a CPU.
    """

    platform: Literal["cpu", "gpu", "tpu"]
    device_kind: str
    stream: str | None = None
    unroll: bool = False
    barriers: bool = False
    interpret: bool = False

    @classmethod
    def of(cls, where: Any = None) -> Target:
        """The target of a mesh (also an abstract one), of devices, or of this process's own.

        On a CPU only products are faster in bfloat16, so there the stream stays float32; and a scan
        over layers would hide from its compiler what it fuses well.
        """
        device = _device(where)
        platform: Any = PLATFORMS.get(device.platform, device.platform)
        if platform == "cpu":
            return cls("cpu", device.device_kind, stream="float32", unroll=True, barriers=True)
        return cls(platform, device.device_kind)

    def stream_dtype(self, compute: Compute) -> jnp.dtype:
        """Type of the residual stream when products are computed in `compute.dtype`."""
        return jnp.dtype(self.stream or compute.dtype)

    def layers_unrolled(self, compute: Compute, layers: int) -> int:
        """How many of a stack's layers are unrolled in one turn of its scan."""
        return min(compute.unroll or (layers if self.unroll else 1), layers)

    def pin(self, x: Any) -> Any:
        """Compute x, an array or a pytree of them, once and keep it.

        XLA for CPUs copies cheap elementwise chains into every product that reads them: with unrolled
        layers a residual stream is computed anew in each consumer, backward pass included. Elsewhere
        that fusion is what we want. What it is worth is measured in benchmarks/results.
        """
        return jax.lax.optimization_barrier(x) if self.barriers else x


def _device(where: Any) -> Any:
    """Something with `platform` and `device_kind`."""
    if where is None:
        return jax.devices()[0]
    if isinstance(where, jax.sharding.Mesh):
        return where.devices.flat[0]
    if isinstance(where, Sequence):
        return where[0]
    return where.abstract_device  # an AbstractMesh, as `jax.sharding.get_abstract_mesh` gives it
