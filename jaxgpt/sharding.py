"""The mesh and the one table from logical axes to mesh axes.

A parameter is born with the names of its axes (`nnx.Param(..., axes=("embed", "mlp"))`); the table
below turns them into a `PartitionSpec`. It is strict: an unknown name, or a mesh axis that would be
used twice in one array, raises.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import jax
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxgpt.config import ROW_AXES, Mesh

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
    "vector": (),  # norms and biases of width D: too small to be worth gathering
    # activations
    "batch": ROW_AXES,
    "length": (),
    "features": (),
}


def spec(axes: Sequence[str]) -> P:
    """The `PartitionSpec` of an array whose axes have these logical names.

    Raises:
      KeyError: a name that is not in `TABLE`.
      ValueError: two axes of the array fall on the same mesh axis.
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
    """A mesh with the axes of `config.Mesh`, 1 where no size is given, all under automatic partitioning."""
    sizes = {axis.name: 1 for axis in fields(Mesh)} | dict(sizes)
    names = tuple(sizes)
    return jax.make_mesh(
        tuple(sizes.values()), names, axis_types=(AxisType.Auto,) * len(names), devices=devices
    )


def row_shards(mesh: jax.sharding.Mesh) -> int:
    """Into how many parts the mesh splits the rows of a batch."""
    return math.prod(mesh.shape[axis] for axis in ROW_AXES)


def constrain(x: jax.Array, *axes: str) -> jax.Array:
    """Fix the layout of an activation by logical axes; does nothing where no mesh is set."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes))


def param_shardings(abstract: Any, mesh: jax.sharding.Mesh) -> dict:
    """Shardings of a model's parameters, as a pure dict of the same structure.

    Args:
      abstract: the `nnx.State` of the model (arrays or `ShapeDtypeStruct`s).
      mesh: the mesh to lay them out on.
    """

    def one(variable: nnx.Variable) -> NamedSharding:
        return NamedSharding(mesh, spec(variable.get_metadata()["axes"]))

    flat = {path: one(variable) for path, variable in nnx.to_flat_state(abstract)}
    return nnx.to_pure_dict(nnx.from_flat_state(flat))


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Layout of a batch's arrays, [B, ...]: rows over `data`, `fsdp` and `expert`."""
    return NamedSharding(mesh, spec(("batch",)))


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Layout of a value that every device holds whole."""
    return NamedSharding(mesh, P())
