"""The mesh, and the one table from logical axes to mesh axes.

A parameter is created with the names of its axes (`nnx.Param(..., axes=("embed", "mlp"))`); the table
below turns them into a `PartitionSpec`. It is strict: an unknown name, or a mesh axis that would be
used twice in one array, raises.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxgpt.config import ROW_AXES, Mesh
from jaxgpt.errors import require

TABLE: Mapping[str, tuple[str, ...]] = {
    # parameters
    "layers": (),
    "vocab": ("tensor",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head": (),
    "mlp": ("tensor",),
    "experts": ("expert",),
    "position": (),
    "rank": (),  # of an adapter's thin matrices
    "vector": (),  # norms and biases of size D: too small to be worth gathering
    # activations
    "batch": ROW_AXES,
    "rows": (*ROW_AXES, "tensor"),  # over all devices, for work on whole rows
    "length": (),
    "pages": (),  # of a cache that all rows share
    "features": (),
}


def spec(axes: Sequence[str]) -> P:
    """The `PartitionSpec` of an array whose axes have these logical names.

    Raises:
      KeyError: a name is not in `TABLE`.
      ValueError: two axes of the array map to the same mesh axis.
    """
    used: set[str] = set()
    entries = []
    for name in axes:
        if name not in TABLE:
            raise KeyError(f"logical axis {name!r} is not in sharding.TABLE; known: {', '.join(TABLE)}")
        mesh_axes = TABLE[name]
        if used & set(mesh_axes):
            raise ValueError(f"axes {tuple(axes)} use mesh axis {sorted(used & set(mesh_axes))} twice")
        used |= set(mesh_axes)
        entries.append(mesh_axes if len(mesh_axes) > 1 else mesh_axes[0] if mesh_axes else None)
    return P(*entries)


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """A mesh with the axes of `config.Mesh`, of size 1 if unspecified, all with automatic partitioning.

    On one TPU slice, the axes follow the physical interconnect, which is split if a size requires it. On
    several slices, the first axes that divide cross the slower network between them. Other devices are taken
    in order, process by process, so that the last axes, which communicate most, stay within a node.

    Raises:
      UserError: the axes cannot be distributed over the slices.
    """
    sizes = {axis.name: 1 for axis in fields(Mesh)} | dict(sizes)
    shape = tuple(sizes.values())
    devices = list(jax.devices() if devices is None else devices)[: math.prod(shape)]
    slices = len({getattr(d, "slice_index", 0) for d in devices}) if devices[0].platform == "tpu" else 1
    if slices == 1:
        laid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        across = across_slices(shape, slices)
        within = tuple(size // n for size, n in zip(shape, across, strict=True))
        laid = mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
    return jax.sharding.Mesh(laid, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def across_slices(shape: Sequence[int], slices: int) -> tuple[int, ...]:
    """The factor by which each axis spans slices: the first axes take as much as possible.

    Raises:
      UserError: the number of slices does not divide the axes' sizes.
    """
    left, across = slices, []
    for size in shape:
        across.append(math.gcd(left, size))
        left //= across[-1]
    require(
        left == 1,
        f"mesh {tuple(shape)} does not divide over {slices} slices; make mesh.data a multiple of {slices}.",
    )
    return tuple(across)


def row_shards(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> int:
    """Number of parts into which a mesh splits the rows of a batch; 1 without a mesh."""
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in ROW_AXES)


def constrain(x: jax.Array, *axes: str) -> jax.Array:
    """Constrain the sharding of an activation by logical axes; does nothing without a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes))


def param_shardings(abstract: Any, mesh: jax.sharding.Mesh) -> dict:
    """Shardings of a model's parameters, as a pure dict of the same structure.

    Args:
      abstract: the `nnx.State` of the model (arrays or `ShapeDtypeStruct`s).
      mesh: the mesh to shard them over.
    """

    def one(variable: nnx.Variable) -> NamedSharding:
        return NamedSharding(mesh, spec(variable.get_metadata()["axes"]))

    flat = {path: one(variable) for path, variable in nnx.to_flat_state(abstract)}
    return nnx.to_pure_dict(nnx.from_flat_state(flat))


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Sharding of a batch's arrays, [B, ...]: rows over `data`, `fsdp` and `expert`."""
    return NamedSharding(mesh, spec(("batch",)))


def process_rows(
    layout: NamedSharding, rows: int, devices: Collection[jax.Device] | None = None
) -> tuple[int, ...]:
    """Indices, in order, of the rows of a batch of `rows` rows that these (or this process's) devices hold.

    Processes along an axis such as `tensor` hold the same rows. On a TPU slice, the rows of a process are
    often not contiguous.
    """
    devices = layout.addressable_devices if devices is None else devices
    spans = layout.devices_indices_map((rows, 1))
    return tuple(sorted({row for d in devices for row in range(*spans[d][0].indices(rows))}))


def place_rows(layout: NamedSharding, rows: int, part: Sequence[int], array: Any) -> jax.Array:
    """The global batch of `rows` rows; this process's array holds its `part`, from `process_rows`."""
    array, at = np.asarray(array), {row: i for i, row in enumerate(part)}

    def shard(index: Any) -> np.ndarray:
        first, end, _ = index[0].indices(rows)
        return array[at[first] : at[first] + end - first]

    return jax.make_array_from_callback((rows, *array.shape[1:]), layout, shard)


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Sharding of a value that every device holds whole."""
    return NamedSharding(mesh, P())
