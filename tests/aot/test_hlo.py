"""Counts read from small compiled programs equal those derived by hand.

Shapes: B rows, D hidden size, T length.
"""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tiny import HERE, MIXED, mesh

from jaxgpt.aot import hlo, hlo_text
from jaxgpt.layers.kernels import attend
from jaxgpt.layers.kernels.base import SELDOM, Scores
from jaxgpt.layers.mask import Mask

B, D, LOOPS = 16, 32, 5
SIZES = MIXED | {"fsdp": 4, "data": 1}  # fsdp 4, tensor 2


def compiled(function, *arguments, sizes=None):
    """The analysis of a function compiled for one device, or for a mesh of these sizes."""
    text = jax.jit(function).lower(*arguments).compile().as_text()
    return hlo.read(text, sizes or {"data": 1})


def spread(function, *arguments):
    """The analysis of a function of (array shape, its sharding) pairs, one program per device."""
    on, layouts = mesh(SIZES), [spec for _, spec in arguments]
    run = jax.shard_map(function, mesh=on, in_specs=tuple(layouts), out_specs=P(), check_vma=False)
    shapes = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(on, spec))
        for shape, spec in arguments
    ]
    return compiled(run, *shapes, sizes=on.shape)


def repeat(body, x, turns=LOOPS):
    return jax.lax.scan(lambda c, _: (body(c), None), x, None, length=turns)[0]


def test_products_are_counted_and_multiplied_by_the_iterations_of_nested_loops():
    x_BD, w_DD = jnp.zeros((B, D)), jnp.zeros((D, D))
    once = 2 * B * D * D
    assert compiled(lambda x, w: x @ w, x_BD, w_DD).product_flops == once
    assert compiled(lambda x, w: repeat(lambda x: x @ w, x), x_BD, w_DD).product_flops == LOOPS * once
    nested = compiled(lambda x, w: repeat(lambda x: repeat(lambda x: jnp.sin(x @ w), x, 3), x), x_BD, w_DD)
    assert nested.product_flops == LOOPS * 3 * once
    assert nested.unknown_loops == 0


@pytest.mark.parametrize(("start", "stop", "step", "turns"), [(0, 5, 1, 5), (0, 8, 2, 4), (3, 12, 4, 3)])
def test_iterations_are_read_from_counters_if_the_compiler_does_not_state_them(start, stop, step, turns):
    """As on TPU, where loops over the parts of a product advance by two."""

    def program(x, w):
        turn = lambda carry: (carry[0] + step, jnp.sin(carry[1] @ w))  # noqa: E731
        return jax.lax.while_loop(lambda carry: carry[0] < stop, turn, (start, x))[1]

    text = jax.jit(program).lower(jnp.zeros((B, D)), jnp.zeros((D, D))).compile().as_text()
    for said in (text, re.sub(r"known_trip_count", "left_out", text)):
        found = hlo.read(said, {"data": 1})
        assert (found.product_flops, found.unknown_loops) == (turns * 2 * B * D * D, 0)


def test_batched_products_and_several_contracted_axes():
    q, k = jnp.zeros((4, B, 2, D)), jnp.zeros((4, 24, 2, D))
    scores = compiled(lambda q, k: jnp.einsum("bthk,bshk->bhts", q, k), q, k)
    assert scores.product_flops == 2 * 4 * 2 * B * 24 * D
    joined = compiled(lambda q, w: jnp.einsum("bthk,hkd->btd", q, w), q, jnp.zeros((2, D, 8)))
    assert joined.product_flops == 2 * 4 * B * 2 * D * 8


def test_a_convolution_is_2_x_results_x_window_x_channels():
    x, w = jnp.zeros((2, 10, 3)), jnp.zeros((4, 3, 6))
    conv = functools.partial(
        jax.lax.conv_general_dilated,
        window_strides=(1,),
        padding="VALID",
        dimension_numbers=("NWC", "WIO", "NWC"),
    )
    text = jax.jit(conv).lower(x, w).as_text(dialect="hlo")
    assert hlo.read(text, {"data": 1}).product_flops == 2 * (2 * 7 * 6) * 4 * 3


def test_a_backward_pass_is_twice_the_forward_pass_and_remat_adds_one():
    # Differentiation would keep the products' inputs, so the weights differ by layer.
    x_BD, w_LDD = jnp.zeros((B, D)), jnp.zeros((LOOPS, D, D))
    forward = LOOPS * 2 * B * D * D

    def loss(w, x, wrap):
        return jax.lax.scan(lambda x, w: (wrap(lambda x: jnp.sin(x @ w))(x), None), x, w)[0].sum()

    plain = compiled(lambda w, x: jax.grad(loss, (0, 1))(w, x, lambda f: f), w_LDD, x_BD)
    remat = compiled(lambda w, x: jax.grad(loss, (0, 1))(w, x, jax.checkpoint), w_LDD, x_BD)
    assert (plain.product_flops, remat.product_flops) == (3 * forward, 4 * forward)


def test_a_loop_whose_iterations_depend_on_data_is_counted_once_and_reported():
    w_DD = jnp.zeros((D, D))
    found = compiled(
        lambda n, x, w: jax.lax.fori_loop(0, n, lambda _, x: x @ w, x), 3, jnp.zeros((B, D)), w_DD
    )
    assert (found.unknown_loops, found.product_flops) == (1, 2 * B * D * D)


def test_a_loop_that_most_rows_do_not_enter_is_left_out():
    def run(n, x, w):
        with jax.named_scope(SELDOM):
            return jax.lax.fori_loop(0, n, lambda _, x: x @ w, x)

    found = compiled(run, 3, jnp.zeros((B, D)), jnp.zeros((D, D)))
    assert (found.unknown_loops, found.product_flops) == (0, 0)


def test_a_loop_whose_iterations_have_a_bound_is_counted_as_often():
    """Like the loop over the blocks of experts."""

    def run(n, x, w):
        more = lambda state: state[0] < jnp.minimum(n, LOOPS)  # noqa: E731
        return jax.lax.while_loop(more, lambda state: (state[0] + 1, state[1] @ w), (0, x))[1]

    found = compiled(run, 3, jnp.zeros((B, D)), jnp.zeros((D, D)))
    assert (found.unknown_loops, found.product_flops) == (0, LOOPS * 2 * B * D * D)


def test_each_collective_has_its_axis_its_runs_and_what_a_device_sends():
    def program(x, w):
        def body(x):
            x = jax.lax.psum(
                x @ jax.lax.all_gather(jnp.sin(w * x[0, 0]), "tensor", axis=1, tiled=True), "fsdp"
            )
            part = jax.lax.psum_scatter(x, "fsdp", scatter_dimension=1, tiled=True)
            x = jax.lax.all_gather(jnp.cos(part), "fsdp", axis=1, tiled=True)
            return jax.lax.ppermute(x, "tensor", [(0, 1), (1, 0)])

        return jax.lax.psum(repeat(body, x), ("fsdp", "tensor"))

    found = spread(program, ((4 * B, D), P("fsdp")), ((D, D), P(None, "tensor")))
    x, w = 4 * B * D, 4 * D * D  # bytes of the [B, D] on one device, and of the whole [D, D]
    expected = {
        ("all-gather", "tensor", LOOPS): w / 2,
        ("all-reduce", "fsdp", LOOPS): 2 * x * 3 / 4,
        ("reduce-scatter", "fsdp", LOOPS): x * 3 / 4,
        ("all-gather", "fsdp", LOOPS): x * 3 / 4,
        ("collective-permute", "tensor", LOOPS): x,
        ("all-reduce", "fsdp+tensor", 1): 2 * x * 7 / 8,
    }
    assert {(c.kind, c.where, c.runs): c.sent for c in found.collectives} == expected
    assert {c.depth for c in found.collectives if c.runs == LOOPS} == {1}
    assert hlo.traffic(found.collectives)["all-gather"] == {
        "tensor": LOOPS * w / 2,
        "fsdp": LOOPS * x * 3 / 4,
    }
    gathered = [c for c in found.collectives if (c.kind, c.where) == ("all-gather", "tensor")]
    assert [str(array) for array in gathered[0].whole] == [f"f32[{D},{D}]"]


def test_the_partitioners_collectives_fall_on_the_axis_that_was_split():
    on = mesh(SIZES)

    def shape(dims, spec):
        return jax.ShapeDtypeStruct(dims, jnp.float32, sharding=NamedSharding(on, spec))

    product = jax.jit(lambda x, w: x @ w, out_shardings=NamedSharding(on, P("fsdp")))
    text = product.lower(shape((B, D), P("fsdp", "tensor")), shape((D, D), P("tensor"))).compile().as_text()
    (one,) = hlo.read(text, on.shape).collectives
    assert (one.kind, one.where, one.group, one.sent) == ("all-reduce", "tensor", 2, 4 * B * D / 4)


FORMS = {
    "fsdp": ("{{0,2,4,6},{1,3,5,7}}", "[2,4]<=[4,2]T(1,0)", "mesh['a'=4,'b'=2] {'a'}"),
    "tensor": ("{{0,1},{2,3},{4,5},{6,7}}", "[4,2]<=[8]", "mesh['a'=4,'b'=2] {'b'}"),
    "fsdp+tensor": ("{{0,1,2,3,4,5,6,7}}", "[1,8]<=[8]", "{}"),
}


@pytest.mark.parametrize("axes", FORMS)
def test_every_form_of_groups_gives_the_same_axes(axes):
    for form in FORMS[axes]:
        groups = hlo.device_groups(f"channel_id=1, replica_groups={form}, dimensions={{1}}", 8)
        assert "+".join(hlo.axes_of(groups, SIZES)) == axes, form
        assert sorted(groups.ravel()) == list(range(8))


def test_a_part_of_a_mesh_axis():
    """`(4)2`: 8 devices in 4 groups of 2 neighbours."""
    groups = hlo.device_groups("replica_groups=mesh['a'=8] {'a':(4)2}", 8)
    assert np.array_equal(groups, [[0, 1], [2, 3], [4, 5], [6, 7]])
    groups = hlo.device_groups("replica_groups=mesh['a'=8] {'a':(1)2}", 8)
    assert np.array_equal(groups, [[0, 4], [1, 5], [2, 6], [3, 7]])


STARTED = """
ENTRY %main (p: bf16[64,8]) -> bf16[64,32] {
  %p = bf16[64,8]{1,0} parameter(0)
  %ag = (bf16[64,8]{1,0}, bf16[64,32]{1,0:T(8,128)(2,1)S(1)}) all-gather-start(%p), channel_id=3, \
replica_groups=[2,4]<=[4,2]T(1,0), dimensions={1}, use_global_device_ids=true
  ROOT %done = bf16[64,32]{1,0} all-gather-done(%ag)
}
"""


def test_a_collective_in_two_halves_is_one():
    """In the form of GPUs, cut from such a program."""
    (one,) = hlo.read(STARTED, SIZES).collectives
    assert (one.kind, one.where, str(one.whole[0])) == ("all-gather", "fsdp", "bf16[64,32]")
    assert one.sent == 64 * 32 * 2 * 3 / 4


def test_scores_are_found_as_squares_and_only_where_they_are_held():
    T = 64
    q = jnp.zeros((2, T, 4, 8))
    mask = Mask.of_rows(jnp.ones((2, T), jnp.int32))
    dense = compiled(lambda q: attend(q, q, q, mask, Scores(1.0, HERE)), q)
    assert {array.dims[-2:] for array in dense.squares(T)} >= {(T, T)}
    assert compiled(lambda x: x @ x.T @ x, jnp.zeros((8, T))).squares(T) == []


def test_the_largest_array_is_named_with_what_makes_it():
    found = compiled(lambda x, w: (x @ w) @ w.T, jnp.zeros((64, D)), jnp.zeros((D, 2 * D)))
    (array, kind, count), *_ = found.largest()
    assert (str(array), count) == (f"f32[64,{2 * D}]", 1)
    assert kind in ("dot", "fusion", "custom-call")


@pytest.mark.parametrize(
    ("text", "size"), [("bf16[3,5]", 30), ("f8e4m3fn[7]", 7), ("s4[8]", 4), ("pred[]", 1)]
)
def test_bytes_of_types(text, size):
    assert hlo_text.arrays(text)[0].nbytes == size
