"""Absent devices by name: what XLA's compilers must know to compile for them.

libtpu identifies TPU slices by their side lengths; the GPU compiler takes a GPU's properties as text.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import jax
from jax.experimental import topologies

from jaxgpt.errors import require, require_known


@dataclass(frozen=True)
class Chip:
    """What a compiler must know about a device.

    Attributes:
      platform: jax's platform, `tpu` or `cuda`.
      title: TPU: the prefix of its accelerator types. GPU: the device's name.
      cores: TPU: number of cores per chip that an accelerator type counts.
      memory: bytes. XLA knows the memory of TPUs itself.
      bandwidth: of the memory, bytes per second. Only for GPUs.
    """

    platform: str
    title: str
    cores: int = 1
    memory: int = 0
    bandwidth: int = 0


CHIPS = {
    "v4": Chip("tpu", "v4", cores=2),
    "v5e": Chip("tpu", "v5litepod"),
    "v5p": Chip("tpu", "v5p", cores=2),
    "v6e": Chip("tpu", "v6e"),
    "h100": Chip("cuda", "NVIDIA H100 80GB HBM3", memory=84_942_979_072, bandwidth=3_352_320_000_000),
    "h200": Chip("cuda", "NVIDIA H200 141GB HBM3e", memory=151_397_597_184, bandwidth=4_800_000_000_000),
}


@dataclass(frozen=True)
class Topology:
    """Absent devices: `v5p:4x4x4` is a TPU slice with its side lengths, `h100:2x8` is nodes x GPUs per node.

    Raises:
      UserError: the chip is unknown, or the name is malformed.
    """

    name: str

    def __post_init__(self) -> None:
        kind, _, shape = self.name.partition(":")
        require_known(kind, CHIPS, f"topology {self.name!r} names the chip {kind!r}")
        sides = 2 if self.chip.platform == "cuda" else 3 if kind in ("v4", "v5p") else 2
        form = (
            "NODESxGPUS, such as h100:1x8"
            if self.chip.platform == "cuda"
            else f"{kind}:{'x'.join('4' * sides)}"
        )
        require(
            re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape) is not None and shape.count("x") == sides - 1,
            f"topology {self.name!r} has the shape {shape!r}; write {form}.",
        )

    @property
    def chip(self) -> Chip:
        """The chip of each device."""
        return CHIPS[self.name.partition(":")[0]]

    @property
    def devices(self) -> int:
        """The number of devices."""
        return math.prod(map(int, self.name.partition(":")[2].split("x")))

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables that must be set before jax is imported."""
        if self.chip.platform == "cuda":
            return {}
        quiet = {"TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3", "TPU_LOG_DIR": "disabled"}
        place = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
        return quiet | place | {"TPU_ACCELERATOR_TYPE": f"{self.chip.title}-{self.chip.cores * self.devices}"}

    def describe(self) -> list[jax.Device]:
        """The absent devices, for a mesh. Works only in a process with this `environment`."""
        if self.chip.platform == "tpu":
            return topologies.get_topology_desc(self.name, platform="tpu").devices
        nodes, gpus = self.name.partition(":")[2].split("x")
        # XLA's format: fast-interconnect domains x nodes per domain x GPUs per node. One node is one domain.
        return topologies.get_topology_desc(
            platform="cuda", topology=f"{nodes}x1x{gpus}", target_config=gpu_description(self.chip)
        ).devices


def gpu_description(chip: Chip) -> str:
    """A Hopper GPU in the format of XLA's compiler (`stream_executor.GpuTargetConfigProto` as text).

    Figures: NVIDIA H100 and H200 data sheets, and the CUDA programming guide's table of compute
    capability 9.0.
    """
    return f"""gpu_device_info {{
      threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
      shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
      core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
      block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
      thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
      registers_per_core_limit: 65536 registers_per_block_limit: 65536
      device_memory_size: {chip.memory} memory_bandwidth: {chip.bandwidth} l2_cache_size: 52428800
      device_vendor: "NVIDIA Corporation" name: "{chip.title}" device_address_bits: 64
      pcie_bandwidth: 34359738368 device_interconnect_info {{ active_links: 18 }}
      cuda_compute_capability {{ major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }}
      driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
      dnn_version: "9.10.0"
    }}
    platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
    device_description_str: "{chip.title}" """
