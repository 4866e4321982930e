"""What a program is built for, as an explicit value.

A `Target` is determined once, where a program is built, from the devices of its mesh. So an accelerator's
program can be traced, compiled and checked on a machine without one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxgpt.config import Compute

PLATFORMS = {"cpu": "cpu", "tpu": "tpu", "gpu": "gpu", "cuda": "gpu", "rocm": "gpu"}
"""From JAX's names of platforms to ours."""


@dataclass(frozen=True)
class Target:
    """The properties of the devices that determine a program (hashable, static).

    Attributes:
      platform: `cpu`, `gpu` or `tpu`.
      device_kind: the vendor's name, such as "TPU v5p" or "NVIDIA H100 80GB HBM3".
      stream: type of the residual stream; None means that of the products (`Compute.dtype`).
      unroll: whether layers are unrolled if the config leaves it unspecified (otherwise they are scanned).
      barriers: whether results are pinned to prevent recomputation in each consumer; see `pin`.
      interpret: run the platform's kernels in Pallas interpret mode, for tests on a CPU.
    """

    platform: Literal["cpu", "gpu", "tpu"]
    device_kind: str
    stream: str | None = None
    unroll: bool = False
    barriers: bool = False
    interpret: bool = False

    @classmethod
    def of(cls, where: Any = None) -> Target:
        """The target of a mesh (also an abstract one), of devices, or of this process's own devices.

        On a CPU only products are faster in bfloat16, so the residual stream stays float32 there. A scan over
        layers would also prevent useful fusions of the CPU compiler.
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
        """Number of layers that are unrolled in one iteration of the scan over layers."""
        return min(compute.unroll or (layers if self.unroll else 1), layers)

    def pin(self, x: Any) -> Any:
        """Compute x, an array or a pytree of arrays, once and keep it.

        XLA for CPUs copies cheap elementwise chains into every product that reads them. With unrolled layers,
        every consumer would recompute the residual stream, in the backward pass too. On other platforms this
        fusion is what we want. docs/log.md has the measured gain.
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
