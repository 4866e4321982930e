"""The strict table, and what it lays out: no large array of a training state is held twice."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from tiny import MESHES, MIXED, MODELS, ONE, T, make_run, mesh

from jaxgpt.aot.topology import Topology
from jaxgpt.config import Optim
from jaxgpt.errors import UserError
from jaxgpt.sharding import (
    TABLE,
    across_slices,
    batch_sharding,
    constrain,
    make_mesh,
    place_rows,
    process_rows,
    spec,
)
from jaxgpt.train.state import init_state, make_program

LARGEST_VECTOR = 2 * 128  # a bias of the MLP, of both layers


def test_names_become_mesh_axes():
    assert spec(("layers", "embed", "heads", "head")) == P(None, "fsdp", "tensor", None)
    assert spec(("batch", "length")) == P(("data", "fsdp", "expert"), None)
    assert spec(()) == P()


def test_an_unknown_name_raises():
    with pytest.raises(KeyError, match=r"'embedd' is not in sharding\.TABLE"):
        spec(("layers", "embedd"))


@pytest.mark.parametrize("axes", [("heads", "mlp"), ("embed", "embed"), ("batch", "embed")])
def test_a_mesh_axis_used_twice_raises(axes):
    with pytest.raises(ValueError, match="twice"):
        spec(axes)


def test_every_entry_names_axes_of_the_mesh():
    assert {axis for axes in TABLE.values() for axis in axes} == set(ONE)


def test_constrain_lays_out_on_a_mesh_and_is_nothing_without_one():
    x = jnp.zeros((8, 4), jnp.float32)
    assert constrain(x, "batch", "length") is x
    on = make_mesh(MIXED)
    with jax.set_mesh(on):
        y = jax.jit(lambda x: constrain(x, "batch", "length"))(x)
    assert y.sharding.is_equivalent_to(batch_sharding(on), 2)
    assert {s.data.shape for s in y.addressable_shards} == {(2, 4)}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("form", MODELS)
def test_under_fsdp_no_large_array_is_held_twice(form, optimizer):
    """Of the actual arrays: parameters and every moment of the optimizer."""
    run = make_run(MODELS[form], optim=Optim(name=optimizer))
    state = init_state(run, make_program(run, mesh(MESHES["fsdp=8"])))
    large = 0
    for path, leaf in jax.tree.leaves_with_path(state):
        held = sum(shard.data.size for shard in leaf.addressable_shards)
        if leaf.size >= 2 * LARGEST_VECTOR:
            assert held == leaf.size, (jax.tree_util.keystr(path), leaf.sharding)
            large += 1
    moments = 2 if optimizer == "adamw" else 1
    assert large > (1 + moments) * 7


def test_under_tensor_parallelism_projections_are_split():
    run = make_run(MODELS["modern"])
    state = init_state(run, make_program(run, mesh(ONE | {"tensor": 4})))
    blocks = state.params["blocks"]
    for leaf in jax.tree.leaves((blocks["mlp"], blocks["attention"])):
        if leaf.ndim > 2:
            assert leaf.addressable_shards[0].data.size == leaf.size // 4


def test_the_initial_state_is_the_same_on_every_mesh():
    run = make_run(replace(MODELS["modern"]))
    states = [init_state(run, make_program(run, mesh(s))) for s in (ONE, MESHES["tensor=4,data=2"])]
    for a, b in zip(*(jax.tree.leaves(s.params) for s in states), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-6, atol=1e-8)
    assert run.length == T


def test_a_process_reads_the_rows_that_its_devices_hold():
    """Two processes of four devices each, in any order of the devices in the mesh."""
    devices = jax.devices()
    first, second = set(devices[:4]), set(devices[4:])

    def rows(sizes, order, of):
        return process_rows(batch_sharding(make_mesh(ONE | sizes, [devices[i] for i in order])), 16, of)

    inorder, mixed = range(8), (0, 4, 1, 5, 2, 6, 3, 7)
    assert rows({"data": 8}, inorder, second) == tuple(range(8, 16))
    assert rows({"data": 8}, mixed, first) == (0, 1, 4, 5, 8, 9, 12, 13)
    assert rows({"data": 2, "tensor": 4}, inorder, second) == tuple(range(8, 16))
    for of in (first, second):  # a tensor axis across the processes
        assert rows({"data": 4, "tensor": 2}, mixed, of) == tuple(range(16))
        assert rows({"tensor": 8}, inorder, of) == tuple(range(16))


@pytest.mark.parametrize("sizes", [ONE | {"data": 8}, MIXED, ONE | {"tensor": 8}])
def test_rows_come_to_lie_where_they_belong(sizes):
    layout = batch_sharding(make_mesh(sizes, jax.devices()[::-1]))
    part = process_rows(layout, 16, set(jax.devices()))
    batch = np.arange(16 * 3).reshape(16, 3)
    np.testing.assert_array_equal(place_rows(layout, 16, part, batch[list(part)]), batch)


def test_slices_are_crossed_by_the_first_axes_that_divide():
    assert across_slices((4, 8, 2, 1), 2) == (2, 1, 1, 1)
    assert across_slices((2, 8, 2, 1), 4) == (2, 2, 1, 1)
    with pytest.raises(UserError, match=r"does not divide over 3 slices; make mesh\.data a multiple of 3"):
        across_slices((4, 8, 2, 1), 3)


SPLITS = """
import sys
from jax.experimental import topologies
from jaxgpt.sharding import make_mesh

slices, sizes = int(sys.argv[2]), [1 << i for i in range(10)]
more = {"num_slices": slices} if slices > 1 else {}
devices = topologies.get_topology_desc(sys.argv[1], platform="tpu", **more).devices
for data in sizes:
    for fsdp in sizes:
        rest, over = divmod(len(devices), data * fsdp)
        for tensor in [t for t in sizes if rest and not over and rest % t == 0]:
            parts = {"data": data, "fsdp": fsdp, "tensor": tensor, "expert": rest // tensor}
            mesh = make_mesh(parts, devices)
            assert set(mesh.devices.flat) == set(devices)
            if slices > 1 and data % slices == 0:
                assert all(len({d.slice_index for d in part.flat}) == 1 for part in mesh.devices)
"""


@pytest.mark.aot
@pytest.mark.parametrize(("slice_", "count"), [("v5p:4x4x4", 1), ("v6e:8x8", 1), ("v5p:2x2x2", 2)])
def test_every_split_fits_a_tpu_slice(slice_, count):
    pytest.importorskip("libtpu")
    env = os.environ | Topology(slice_).environment
    done = subprocess.run(
        [sys.executable, "-c", SPLITS, slice_, str(count)], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
