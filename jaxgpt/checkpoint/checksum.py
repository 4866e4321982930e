"""What silent damage and NaN are found by: a checksum and a count for each array of a checkpoint.

The checksum is the sum, modulo 2^32, of every element's bits times an odd number that depends on its
place in the whole array. An odd factor is invertible, so that a change of one element always changes
the sum; and a sum of integers is the same in any order, so it is equal on every mesh.
"""

from __future__ import annotations

import functools
import zlib
from typing import Annotated, Any, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from jax.sharding import NamedSharding

from jaxgpt.files import Count, to_json
from jaxgpt.sharding import replicated

Sum = Annotated[int, msgspec.Meta(ge=0, lt=2**32)]


class Leaf(NamedTuple):
    """One array of a tree: what it is, its checksum, and how many of its elements are not finite."""

    shape: tuple[Count, ...]
    dtype: str
    sum: Sum
    bad: Count


Leaves = dict[str, Leaf]
"""By their paths in the tree."""


class Sums(TypedDict):
    """What is stored with a step to check it by.

    Attributes:
      arrays: the leaves of each item (`params`, `rest`).
      host: `digest` of the data's position and the loop's memory; of a step without them, 0.
      metrics: `digest` of the score, as Orbax keeps it.
      digest: of all of the above.
    """

    arrays: dict[str, Leaves]
    host: Sum
    metrics: Sum
    digest: Sum


def make_sums(arrays: dict[str, Leaves], host: Any, metrics: Any) -> Sums:
    """The record to store with a step."""
    held: Any = {"arrays": arrays, "host": digest(host), "metrics": digest(metrics)}
    return held | {"digest": digest(held)}


def digest(value: Any) -> int:
    """A checksum of a JSON value, 0 of None."""
    return 0 if value is None else zlib.crc32(to_json(_sorted(value)).encode())


def _sorted(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _sorted(value[key]) for key in sorted(value)}
    return value


def shapes_of(tree: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and type of each leaf by its path; of abstract arrays, too."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): (tuple(leaf.shape), str(leaf.dtype))
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def measure(tree: Any) -> Leaves:
    """The leaves of a tree, by one program over its arrays wherever they lie, and one small fetch."""
    arrays = jax.tree.leaves(tree)
    if not arrays:
        return {}
    layout: Any = getattr(arrays[0], "sharding", None)
    numbers = np.asarray(
        jit_measure(layout.mesh if isinstance(layout, NamedSharding) else None)(arrays)
    ).tolist()
    shapes = shapes_of(tree).items()
    return {path: Leaf(*shape, *pair) for (path, shape), pair in zip(shapes, numbers, strict=True)}


@functools.cache
def jit_measure(mesh: Any) -> Any:
    """The program of `measure` for arrays on a mesh, or elsewhere (None): each device reads its own parts."""
    return jax.jit(_measure, out_shardings=None if mesh is None else replicated(mesh))


def _measure(arrays: list[jax.Array]) -> jax.Array:
    """[leaves, 2] of uint32: checksums, and numbers of elements that are not finite."""
    return jnp.stack([jnp.stack(_reduced(x)) for x in arrays])


def _reduced(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    bits, zero = _bits(x), np.uint32(0)
    floats = jnp.issubdtype(x.dtype, jnp.floating)
    bad = ~jnp.isfinite(x) if floats else jnp.zeros(x.shape, bool)
    bad = jnp.broadcast_to(bad.reshape(*x.shape, *(1,) * (bits.ndim - x.ndim)), bits.shape)
    # Both at once: XLA for CPUs vectorises this reduction and not that of one array, 20 times slower.
    return jax.lax.reduce(
        (bits * _odd(bits.shape), bad.astype(jnp.uint32)),
        (zero, zero),
        lambda a, b: (a[0] + b[0], a[1] + b[1]),
        tuple(range(bits.ndim)),
    )


def _bits(x: jax.Array) -> jax.Array:
    """The elements as uint32; those of 8 bytes as two, along a last axis."""
    if x.dtype in (bool, jnp.int4, jnp.uint4):
        return x.astype(jnp.uint32)
    size = x.dtype.itemsize
    unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(size, jnp.uint32)
    return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)


def _odd(shape: tuple[int, ...]) -> jax.Array:
    """An odd number for each place of an array: made where it is needed, on any mesh, never stored."""
    place = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        place = place * np.uint32(size % 2**32) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    hashed = place * np.uint32(0x9E3779B1)  # of Knuth's multiplicative hashing
    return hashed ^ (hashed >> 15) | np.uint32(1)
