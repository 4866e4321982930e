"""Checksums of arrays, worked out by hand in numpy: equal on every mesh, changed by every bit."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tiny import ONE, mesh

from jaxgpt.checkpoint import Checkpoints, State, measure, not_finite
from jaxgpt.checkpoint.checksum import make_sums
from jaxgpt.checkpoint.damage import Damaged
from jaxgpt.checkpoint.read import read_step

RANDOM = np.random.default_rng(0)
ARRAYS = {
    "float32": jnp.asarray(RANDOM.standard_normal((16, 8, 3)), jnp.float32),
    "bfloat16": jnp.asarray(RANDOM.standard_normal((8, 8)), jnp.bfloat16),
    "int32": jnp.arange(-7, 9, dtype=jnp.int32),
    "int8": jnp.arange(-4, 4, dtype=jnp.int8),
    "uint8": jnp.arange(8, dtype=jnp.uint8),
    "bool": jnp.arange(8) % 3 == 0,
    "scalar": jnp.float32(-0.0),
    "empty": jnp.zeros((0, 4)),
}


def by_hand(array: np.ndarray) -> int:
    """Sum of bits times odd hashes of places, in integers of any size."""
    unsigned = {1: np.uint8, 2: np.uint16, 4: np.uint32}[array.dtype.itemsize]
    total = 0
    for place, bits in enumerate(np.ascontiguousarray(array).reshape(-1).view(unsigned).tolist()):
        hashed = place * 0x9E3779B1 % 2**32
        total += bits * ((hashed ^ hashed >> 15) | 1)
    return total % 2**32


def test_a_checksum_is_the_sum_of_bits_times_odd_numbers() -> None:
    leaves = measure(ARRAYS)
    assert {name: leaf.sum for name, leaf in leaves.items()} == {
        name: by_hand(np.asarray(array)) for name, array in ARRAYS.items()
    }
    assert leaves["float32"].shape == (16, 8, 3)
    assert leaves["bfloat16"].dtype == "bfloat16"
    assert not any(leaf.bad for leaf in leaves.values())


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"tensor": 2, "data": 4}, {"tensor": 4, "fsdp": 2}])
def test_a_checksum_is_the_same_on_every_mesh(sizes) -> None:
    on = mesh(ONE | sizes)
    big = {name: ARRAYS[name] for name in ("float32", "bfloat16", "int32")}
    layout = NamedSharding(on, PartitionSpec(("fsdp", "data"), "tensor"))
    flat = NamedSharding(on, PartitionSpec(("fsdp", "data", "tensor")))
    placed = {name: jax.device_put(a, layout if a.ndim > 1 else flat) for name, a in big.items()}
    assert measure(placed) == measure(big)


def test_elements_that_are_not_finite_are_counted_by_name() -> None:
    tree = {
        "a": jnp.asarray([1.0, np.nan, np.inf]),
        "b": {"c": jnp.ones(3, jnp.bfloat16)},
        "d": jnp.arange(2),
    }
    assert not_finite(measure(tree)) == "a (2)"
    assert not_finite(measure({"b": {"c": jnp.asarray([-np.inf], jnp.bfloat16)}})) == "b.c (1)"
    assert not not_finite(measure(ARRAYS))


# ------------------------------------------------------------------------------------ on disk


def state() -> State:
    params = {name: ARRAYS[name] for name in ("float32", "bfloat16", "uint8", "bool")}
    return State(jnp.int32(3), jnp.int32(0), params, {"count": jnp.int32(3), "m": ARRAYS["float32"] * 2})


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    checkpoints = Checkpoints(folder)
    checkpoints.save(state(), {"row": 24}, 2.5)
    checkpoints.close()
    return folder / "checkpoints" / "3"


def read(step: Path) -> Any:
    whole = state()
    rest = {"step": whole.step, "bad_steps": whole.bad_steps, "opt": whole.opt}
    trees, host = read_step(step, {"params": whole.params, "rest": rest}, dict)
    return jax.tree.map(lambda a: (np.asarray(a).tobytes(), a.dtype, a.shape), trees), host


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # reads under way elsewhere
def test_every_flipped_bit_is_found_or_changes_nothing(step: Path) -> None:
    """Each file in proportion to its size; and every file at least twice."""
    files = sorted(path for path in step.rglob("*") if path.is_file())
    sizes = [path.stat().st_size for path in files]
    chance, good, found = random.Random(0), read(step), 0
    for path in [*files, *files, *chance.choices(files, sizes, k=80)]:
        held = path.read_bytes()
        at, bit = chance.randrange(len(held)), chance.randrange(8)
        path.write_bytes(held[:at] + bytes([held[at] ^ 1 << bit]) + held[at + 1 :])
        try:
            assert read(step) == good, f"{path}, byte {at}, bit {bit}"
        except Damaged:
            found += 1
        finally:
            path.write_bytes(held)
    assert found > 40
    assert read(step) == good


def test_a_changed_element_that_the_files_do_not_tell_of_is_found_by_its_name(step: Path) -> None:
    """What is written anew, whole and well formed, is found by the checksums alone."""
    path = step / "sums" / "metadata"
    held = path.read_text()
    sums = json.loads(held)
    sums["arrays"]["params"]["bfloat16"][2] ^= 1
    made = make_sums(sums["arrays"], {"row": 24}, {"score": 2.5})
    path.write_text(json.dumps(made))
    try:
        with pytest.raises(Damaged, match=r"checksums of params differ: bfloat16$"):
            read(step)
        path.write_text(json.dumps(sums))  # and a record that was changed, by its own
        with pytest.raises(Damaged, match="its checksums are not those that were saved"):
            read(step)
    finally:
        path.write_text(held)
