"""Programs compiled for absent hardware, and their analysis.

The first part compiles for simulated CPU devices, where the same counts hold. The tests marked
`aot` compile for a TPU slice and need libtpu: `pytest -m aot -n 0`.

Shapes: V vocabulary, D hidden size.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import pytest
from tiny import MIXED, make_run, mesh

from jaxgpt import aot
from jaxgpt.aot import programs
from jaxgpt.aot.hlo import traffic
from jaxgpt.aot.topology import CHIPS, Topology
from jaxgpt.config import GPT, Compute, Mesh, Run, Text, Train
from jaxgpt.errors import UserError
from jaxgpt.models import parameter_counts

V, D, LAYERS, LENGTH, HEADS = 32_000, 512, 4, 1024, 8
SLICE = "v5e:2x4"
LLAMA = GPT(
    vocab_size=V,
    context=LENGTH,
    layers=LAYERS,
    width=D,
    heads=HEADS,
    mlp_width=1536,
    position="rope",
    norm="rmsnorm",
    mlp="swiglu",
    bias=False,
    tied=False,
)


def small(axes: Mapping[str, int] = MappingProxyType({"fsdp": 8}), **parts: Any) -> Run:
    """A small Llama on 8 devices."""
    parts = {"train": Train(batch_size=16), "compute": Compute(remat="full")} | parts
    mesh = Mesh(**{"data": 1, **axes})
    return Run(name="small", model=LLAMA, data=Text(path="absent"), mesh=mesh, **parts)


@functools.cache
def report(program: str, **axes: int) -> aot.Report:
    """The program of `config` on 8 v5e.

    XLA hides a gather behind a product by splitting both into a ring of N + 1 sends instead of N - 1, a
    quarter more for 8 devices. It is kept whole here, because the test is about the bytes that must be sent.
    """
    decoding = aot.Decoding(rows=8, prompt=256, slots=LENGTH)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIBTPU_INIT_ARGS", "--xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000")
        return aot.compile_for(small(axes), SLICE, [program], decoding)[0]


def dims_of(collective) -> set[tuple[int, ...]]:
    """Shapes of the whole arrays that a collective moves, without axes of length 1."""
    return {tuple(n for n in array.dims if n > 1) for array in collective.whole}


# On CPU devices --------------------------------------------------------------------------------


@pytest.mark.parametrize("program", aot.PROGRAMS)
def test_every_program_compiles_for_a_mesh(program):
    decoding = aot.Decoding(rows=8, prompt=8, slots=16)
    found = programs.compile_on(make_run(), mesh(MIXED), program, decoding)
    assert found.fits and (found.product_flops > 0 or program == "checksum")
    assert found.mesh == {"data": 2, "fsdp": 2, "tensor": 2}
    assert found.memory["arguments"] > 0 and found.needed == sum(found.memory.values())
    # Decoding until all rows are done is a loop whose iterations are known only at run time.
    loops = ("decode", "beams", "rollout", "chunk", "step")  # the engine reads pages up to the longest row
    assert found.unknown_loops == (program in loops) or (program in loops[3:] and found.unknown_loops)
    assert {axis for one in found.collectives for axis in one.axes} <= set(MIXED)
    assert aot.Report.of(json.loads(json.dumps(dataclasses.asdict(found)))) == found


def test_a_rollout_leaves_no_second_copy_of_the_parameters():
    """It reads those of training; what decoding makes of them is gone when it ends."""
    run, one = make_run(), mesh(dict.fromkeys(MIXED, 1))
    found = programs.compile_on(run, one, "rollout", aot.Decoding(rows=8, prompt=8, slots=16))
    size = 4 * parameter_counts(run.model)["total"]
    assert size < found.memory["arguments"] < 1.1 * size
    assert found.memory["results"] < size / 10


def test_evaluation_is_a_forward_pass_and_a_step_is_three():
    """By hand, per token: 12 D^2 for a layer's matrices, 2 T D for its attention, V D for the projection."""
    layers, width, length, one = 2, 64, 64, mesh(dict.fromkeys(MIXED, 1))
    model = GPT(vocab_size=128, context=length, layers=layers, width=width, heads=4)
    run = make_run(model, train=Train(batch_size=8))
    products = layers * (12 * width**2 + 2 * length * width) + 128 * width
    forward = 8 * length * 2 * products
    assert programs.compile_on(run, one, "eval").product_flops == forward
    step = programs.compile_on(run, one, "train")
    assert step.product_flops == 3 * forward
    assert step.model_flops == pytest.approx(3 * forward, rel=0.02)  # it also counts biases and norms


def sends_sums_only(found: aot.Report) -> bool:
    """Whether devices send each other two numbers for every array, and no part of one."""
    return 0 < found.sent < 10_000


def test_checksums_are_made_where_the_parameters_lie():
    found = programs.compile_on(make_run(), mesh(MIXED), "checksum")
    assert sends_sums_only(found), traffic(found.collectives)


def test_a_topology_is_a_chip_and_a_shape():
    assert (Topology("v5p:4x4x4").devices, Topology("h100:64x8").devices) == (64, 512)
    # v4 and v5p are named by cores, two per chip.
    assert Topology("v5p:4x4x4").environment["TPU_ACCELERATOR_TYPE"] == "v5p-128"
    assert Topology("v5e:16x16").environment["TPU_ACCELERATOR_TYPE"] == "v5litepod-256"
    assert Topology("h200:1x8").environment == {}


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("h101:1x8", "names the chip 'h101'; did you mean 'h100'"),
        ("v5p:8x8", "shape '8x8'; write v5p:4x4x4"),
        ("h100:8", "write NODESxGPUS, such as h100:1x8"),
        ("v5e", "shape ''; write v5e:4x4"),
        ("v5e:0x4", "shape '0x4'"),
    ],
)
def test_a_wrong_topology_is_one_sentence(name, says):
    with pytest.raises(UserError, match=says):
        Topology(name)


def test_without_its_compiler_a_topology_is_one_sentence():
    missing = [name for name, chip in CHIPS.items() if not aot.installed(chip.platform)]
    if not missing:
        pytest.skip("the compilers of all platforms are installed")
    where = {"v4": "v4:2x2x1", "h100": "h100:1x8"}[missing[0]]
    with pytest.raises(UserError, match=r"not installed; pip install 'jaxgpt\["):
        aot.compile_for(make_run(), where)


def test_an_unknown_program_is_one_sentence():
    with pytest.raises(UserError, match="program 'trains' is not known; did you mean 'train'"):
        aot.compile_for(make_run(), "v5e:2x4", ["trains"])


# On a TPU slice --------------------------------------------------------------------------------------

needs_libtpu = pytest.mark.skipif(not aot.installed("tpu"), reason="libtpu is not installed (extra `tpu`)")
MESHES = [{"fsdp": 8}, {"fsdp": 4, "tensor": 2}]


@pytest.mark.aot
@needs_libtpu
@pytest.mark.parametrize("axes", MESHES, ids=str)
class TestTraining:
    def test_nothing_of_the_projections_shape_moves_inside_a_loop(self, axes):
        found = report("train", **axes)
        rows = {V, V // axes.get("tensor", 1)}
        inside = [c for c in found.collectives if c.depth and any(rows & set(d) for d in dims_of(c))]
        assert inside == []

    def test_gathered_arrays_have_the_compute_type_and_never_are_optimizer_state(self, axes):
        found = report("train", **axes)
        gathered = [a for c in found.collectives if c.kind == "all-gather" for a in c.whole]
        assert [str(a) for a in gathered if a.dtype == "f32" and a.nbytes >= 4 * D * D] == []

    def test_bytes_are_within_a_tenth_of_the_lower_bound(self, axes):
        found = report("train", **axes)
        least = aot.step_traffic(small(axes), dict.fromkeys(MIXED, 1) | axes)
        assert found.sent == pytest.approx(least, rel=0.1), traffic(found.collectives)

    def test_attention_is_the_kernel_in_every_layer_and_holds_no_scores(self, axes):
        found = report("train", **axes)
        kernels = {name.split("_segmented")[0]: runs for name, runs in found.kernels.items()}
        # Forward twice, because full remat recomputes it.
        assert kernels == {"splash_mha_fwd": 2 * LAYERS, "splash_mha_dkv": LAYERS, "splash_mha_dq": LAYERS}
        assert found.squares == ()

    def test_flops_are_the_models_plus_a_forward_pass_of_the_layers(self, axes):
        found = report("train", **axes)
        # The loss takes 3 x 2VD FLOPs per token, and attention's gradients 7 products instead of 4.
        assert 1.1 < found.flops_ratio < 4 / 3 + 0.1


@pytest.mark.aot
@needs_libtpu
class TestDecoding:
    def test_a_token_sends_only_sums_two_per_layer_and_three_more(self):
        found = report("decode", tensor=8)
        inside = [c for c in found.collectives if c.depth]
        # Only the logits of the 8 rows may be gathered, before one is chosen.
        gathered = [a for c in inside if c.kind == "all-gather" for a in c.whole if a.size != 8 * V]
        assert gathered == [], "a parameter or the cache is gathered"
        assert sum(c.runs for c in inside if c.kind == "all-reduce") <= 2 * LAYERS + 3


@pytest.mark.aot
@needs_libtpu
def test_checksums_are_made_where_the_parameters_lie_on_a_tpu():
    found = report("checksum", fsdp=8)
    assert sends_sums_only(found), traffic(found.collectives)
    assert found.memory["temporaries"] < found.memory["arguments"] / 10


@pytest.mark.aot
@needs_libtpu
def test_a_program_that_is_too_large_is_a_result():
    run = small(train=Train(batch_size=32_768))
    (found,) = aot.compile_for(run, SLICE, ["eval"])
    assert not found.fits
    assert found.needed > 15.75 * 2**30


@pytest.mark.aot
@needs_libtpu
def test_the_engine_reads_pages_by_the_kernel_and_writes_them_in_place():
    """Its step on 8 v5e, a head on each: no copy of the cache, which no device sends."""
    run = small({"tensor": 8}, train=Train(batch_size=8), compute=Compute(dtype="bfloat16"))
    run = dataclasses.replace(run, model=dataclasses.replace(LLAMA, width=1024))
    decoding = aot.Decoding(rows=32, prompt=128, slots=LENGTH)
    for found in aot.compile_for(run, SLICE, ["chunk", "step"], decoding):
        assert found.kernels == {"ragged_paged_attention_kernel": LAYERS}
        cache = 2 * LAYERS * 2 * 128 * (32 * LENGTH + decoding.page)  # bytes of a head's keys and values
        assert cache < found.memory["arguments"]
        assert found.memory["temporaries"] + found.memory["results"] < cache / 10
        assert found.sent < cache / 10
