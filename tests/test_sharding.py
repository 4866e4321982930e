"""The strict table, and what it lays out: no large array of a training state is held twice."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from tiny import MESHES, MIXED, MODELS, ONE, T, make_run, mesh

from jaxgpt.config import Optim
from jaxgpt.sharding import TABLE, batch_sharding, constrain, make_mesh, spec
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
