"""What a compiled program does: products, kernels, collectives and arrays, multiplied by loop iterations.

`compiled.as_text()` is the program of one device after partitioning, fusion and scheduling: exactly what
will run. XLA's own `cost_analysis` counts a loop's body only once on TPU and is empty on GPU.

Names: T, S lengths of queries and keys, K head size; N devices in a collective's group.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from jaxgpt.aot.hlo_text import Array, Computation, Op, arrays, parse

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
VIEWS = ("parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call", "opt-barrier")
"""Operations that allocate no array."""
TILE = 128
"""Kernels pad a length to a multiple of this."""
KERNEL = re.compile(r"\$|mosaic|triton|pallas|tpu_custom_call")
"""Targets of custom calls that compute; the others are bookkeeping of the compiler."""


@dataclass(frozen=True)
class Collective:
    """A transfer between devices.

    Attributes:
      kind: a name in `COLLECTIVES`. TPU fuses an all-reduce with the slice of it that a device keeps. This
        moves as much as a reduce-scatter, and is reported as one.
      axes: mesh axes along which the devices of a group differ.
      group: N.
      whole: the arrays before they are scattered or after they are gathered.
      runs: number of executions per run of the program, including loops.
      depth: number of enclosing loops.
      sent: bytes that each device sends, and receives, per execution with the best ring algorithm: (N-1)/N of
        the whole arrays for a gather, a scatter or an all-to-all; twice that for an all-reduce, which is a
        scatter and a gather; all of them for a permutation. So a gather that is split into N-1 permutations
        counts the same.
      source: its origin in Python.
    """

    kind: str
    axes: tuple[str, ...]
    group: int
    whole: tuple[Array, ...]
    runs: int
    depth: int
    sent: float
    source: str

    @property
    def size(self) -> float:
        """Bytes of the whole arrays."""
        return sum(array.nbytes for array in self.whole)

    @property
    def where(self) -> str:
        """The axes as one word."""
        return "+".join(self.axes) or "none"


def traffic(collectives: Iterable[Collective], measure: str = "sent") -> dict[str, dict[str, float]]:
    """Bytes by kind of collective and mesh axes, largest first; `measure` is `sent` or `size`."""
    total: dict[tuple[str, str], float] = {}
    for one in collectives:
        key = one.kind, one.where
        total[key] = total.get(key, 0.0) + getattr(one, measure) * one.runs
    table: dict[str, dict[str, float]] = {}
    for (kind, where), count in sorted(total.items(), key=lambda item: -item[1]):
        table.setdefault(kind, {})[where] = count
    return table


@dataclass(frozen=True)
class Program:
    """What the text of a compiled program says about one device.

    Attributes:
      product_flops: of matrix products, where a multiplication and an addition count as two.
      kernel_flops: of attention kernels, counting every query with every key of its row, because what a
        kernel skips cannot be read from its call. `models.flops_per_token` counts the same way.
      kernels: number of runs of each custom kernel.
      uncounted: kernels whose FLOPs are unknown.
      collectives: all collectives.
      arrays: arrays in memory, with the operation that makes each and their number.
      unknown_loops: number of loops whose iterations are unknown at compile time; their bodies count once.
    """

    product_flops: float
    kernel_flops: float
    kernels: dict[str, int]
    uncounted: tuple[str, ...]
    collectives: tuple[Collective, ...]
    arrays: dict[tuple[Array, str], int]
    unknown_loops: int

    def largest(self, count: int = 20) -> list[tuple[Array, str, int]]:
        """The largest arrays, with the operations that make them and their numbers."""
        order = sorted(self.arrays.items(), key=lambda item: -item[0][0].nbytes)
        return [(array, kind, number) for (array, kind), number in order[:count]]

    def squares(self, length: int) -> list[Array]:
        """Arrays with two axes of this length (up to the padding of a tile), like attention scores."""
        found = {
            array for array, _ in self.arrays if sum(length <= n <= length + TILE for n in array.dims) >= 2
        }
        return sorted(found, key=lambda array: -array.nbytes)


def read(text: str, mesh: Mapping[str, int]) -> Program:
    """Read a compiled program.

    Args:
      text: `compiled.as_text()`.
      mesh: sizes of the mesh's axes, in order; the number of a partition is its position in the mesh.
    """
    program, unknown = parse(text)
    reached = [part for part in program.values() if part.runs]
    kernels: Counter[str] = Counter()
    uncounted, products, attention = set(), 0.0, 0.0
    made: Counter[tuple[Array, str]] = Counter()
    for part in reached:
        for op in part.ops.values():
            products += part.runs * product_flops(op, part)
            if name := kernel_name(op):
                kernels[name] += part.runs
                flops = kernel_flops(name, op, part)
                attention += part.runs * (flops or 0.0)
                if flops is None:
                    uncounted.add(name)
            if not part.fused and op.kind not in VIEWS:
                made.update((array, op.kind) for array in arrays(op.type))
    collectives = tuple(_collectives(program, mesh))
    return Program(
        products, attention, dict(kernels.most_common()), tuple(sorted(uncounted)), collectives, made, unknown
    )


# FLOPs --------------------------------------------------------------------------------------------


def product_flops(op: Op, part: Computation) -> float:
    """FLOPs of one run of a matrix product; 0 for any other instruction."""
    cublas = op.kind == "custom-call" and "__cublas" in op.attributes
    if op.kind == "convolution":
        return _convolution_flops(op, part)
    if op.kind == "ragged-dot":
        return 2.0 * math.prod(arrays(op.type)[0].dims) * part.inputs(op)[0].dims[-1]
    if op.kind != "dot" and not cublas:
        return 0.0
    # In an instruction `lhs_contracting_dims={1}`, in cuBLAS's config "lhs_contracting_dimensions":["1"].
    contracted = re.findall(r"\d+", op.attribute(r'lhs_contracting_dim\w+"?[=:]([{\[][\d,"]*)'))
    lhs = part.inputs(op)[0].dims
    return 2.0 * math.prod(arrays(op.type)[0].dims) * math.prod(lhs[int(i)] for i in contracted)


def _convolution_flops(op: Op, part: Computation) -> float:
    """FLOPs of a product that TPU writes as a convolution: 2 x results x inputs per result."""
    kernel = part.inputs(op)[1].dims
    labels = op.attribute(r"dim_labels=\w+_(\w+)->")
    flops = 2.0 * math.prod(arrays(op.type)[0].dims) * math.prod(kernel) / max(kernel[labels.index("o")], 1)
    size = op.attribute(r"window=\{size=([\dx]+)")
    if not size:
        return flops
    sizes = [int(n) for n in size.split("x")]
    pads = op.attribute(r"window=\{[^}]*pad=([\d_x\-]+)").split("x")
    dilations = op.attribute(r"window=\{[^}]*lhs_dilate=([\dx]+)").split("x")
    for i, n in enumerate(sizes):
        # A batch axis of the product is a padded or dilated window with only one valid position.
        if (pads[0] and pads[i] != "0_0") or (dilations[0] and dilations[i] != "1"):
            flops /= n
    return flops


def kernel_name(op: Op) -> str:
    """The name of a custom kernel, without the number that distinguishes its calls; "" for other ops."""
    target = op.attribute(r'custom_call_target="([^"]*)"')
    if op.kind != "custom-call" or not KERNEL.search(target):
        return ""
    if target == "tpu_custom_call":
        return re.sub(r"(\.\d+|\.clone|\.remat\d*)+$", "", op.name)
    if re.search(r"mosaic|triton|pallas", target):
        return f"{target}:{op.source.split('/')[-1]}"
    return target


def kernel_flops(name: str, op: Op, part: Computation) -> float | None:
    """FLOPs of one run of an attention kernel; None for an unknown kernel."""
    if name.startswith("__cublas"):
        return 0.0  # a product, counted in product_flops
    floats = [a for a in part.inputs(op) if a.dtype[0] in "bf" and len(a.dims) >= 3]
    if "fmha" in name:
        # The scores' shape, [B, H, T, S], is in cuDNN's configuration.
        shape = op.attribute(r'"intermediate_tensor_shape": ?\{[^\[]*"dimensions": ?\[([^\]]*)\]')
        scores = re.findall(r"\d+", shape)
        if not scores:
            return None
        return 2.0 * math.prod(map(int, scores)) * floats[0].dims[-1] * (5 if "Backward" in name else 2)
    # Number of products in the forward pass, the gradients of keys and values, and the gradient of queries.
    products = {"splash_mha_fwd": 2, "splash_mha_dkv": 4, "splash_mha_dq": 3, "splash_mqa_fwd": 2}
    number = next((n for prefix, n in products.items() if name.startswith(prefix)), None)
    return number and 2.0 * math.prod(floats[0].dims) * floats[1].dims[-2] * number


# Collectives --------------------------------------------------------------------------------------


def _collectives(program: dict[str, Computation], mesh: Mapping[str, int]) -> Iterator[Collective]:
    """All collectives of the computations that run."""
    for name, part in program.items():
        # TPU spreads a collective over the fusions that hide it; all of them name it, and one starts it.
        starts = any("AsyncCollectiveStart" in op.attributes for op in part.ops.values())
        for op in part.ops.values():
            spread = part.fused and "chain_id=" in op.attributes
            if part.runs and op.kind.removesuffix("-start") in COLLECTIVES and (starts or not spread):
                yield _collective(op, part, mesh, scattered=name.startswith("all-reduce-scatter"))


def _collective(op: Op, part: Computation, mesh: Mapping[str, int], *, scattered: bool) -> Collective:
    kind = "reduce-scatter" if scattered else op.kind.removesuffix("-start")
    groups = device_groups(op.attributes, math.prod(mesh.values()))
    size = groups.shape[1]
    whole = part.inputs(op)
    if kind == "all-gather":
        results = arrays(op.type)
        whole = results[len(whole) :][: len(whole)] if op.kind.endswith("-start") else results
    size_of_all = sum(array.nbytes for array in whole)
    factor = {"collective-permute": 1.0, "collective-broadcast": 1.0, "all-reduce": 2 * (size - 1) / size}
    return Collective(
        kind,
        axes_of(groups, mesh),
        size,
        tuple(whole),
        part.runs,
        part.depth,
        factor.get(kind, (size - 1) / size) * size_of_all,
        op.source,
    )


def device_groups(attributes: str, devices: int) -> np.ndarray:
    """The devices of each group, [groups, N], from any of HLO's notations.

    These are lists `{{0,1},{2,3}}`, pairs of a permutation, iota `[2,4]<=[4,2]T(1,0)` and mesh axes
    `mesh['fsdp'=4,'tensor'=2] {'fsdp'}`.
    """
    if iota := re.search(r"replica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)", attributes):
        return _iota(iota.group(1))
    if named := re.search(r"replica_groups=@?mesh\w*\[([^\]]*)\](.*?) ?\{([^}]*)\}", attributes):
        sizes = {k.strip(" '"): int(n) for k, n in (axis.split("=") for axis in named.group(1).split(","))}
        order = re.search(r"device_ids=\(?(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)", named.group(2))
        ids = _iota(order.group(1)).ravel() if order else np.arange(math.prod(sizes.values()))
        return _along(ids, sizes, [axis.strip() for axis in named.group(3).split(",")])
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]*\},?)*)\}", attributes)
    rows = re.findall(r"\{([\d,]+)\}", listed.group(1)) if listed else []
    if not rows:
        return np.arange(devices)[None]
    return np.array([[int(n) for n in row.split(",")] for row in rows])


def _iota(text: str) -> np.ndarray:
    """`[2,4]<=[4,2]T(1,0)`: consecutive numbers, reshaped, transposed, reshaped again."""
    shape, base, turned = (
        [int(n) for n in re.findall(r"\d+", p)] for p in (*re.split(r"<=|T", text), "")[:3]
    )
    ids = np.arange(math.prod(base)).reshape(base)
    return (ids.transpose(turned) if turned else ids).reshape(shape)


def _along(ids: np.ndarray, sizes: dict[str, int], names: list[str]) -> np.ndarray:
    """Groups of devices that differ along the named axes; part of an axis is `'name':(before)size`."""
    split: list[tuple[str, int]] = []
    parts = {n.split(":")[0].strip("'"): re.findall(r"\d+", n.split(":")[1]) for n in names if ":" in n}
    for name, size in sizes.items():
        before, inner = (int(n) for n in parts.get(name, (1, size)))
        pieces = [(f"{name}>", before), (name, inner), (f"{name}<", size // before // inner)]
        split += pieces if name in parts else [(name, size)]
    chosen = {n.split(":")[0].strip("'") for n in names}
    grid = ids.reshape([size for _, size in split])
    inside = [i for i, (name, _) in enumerate(split) if name in chosen]
    outside = [i for i in range(len(split)) if i not in inside]
    return grid.transpose(outside + inside).reshape(-1, math.prod(split[i][1] for i in inside))


def axes_of(groups: np.ndarray, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the devices of a group differ."""
    places = np.unravel_index(groups, tuple(mesh.values()))
    return tuple(name for name, at in zip(mesh, places, strict=True) if (at != at[:, :1]).any())
