"""Checkpoints: any mesh reads them, the right ones are kept, damage and a full disk cost no whole one."""

from __future__ import annotations

import logging
import resource
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import MIXED, ONE, assert_same, mesh
from tiny_runs import STEPS, command, copy, curve, records, restore, saved, tree

from jaxgpt.checkpoint import Checkpoints, SaveError, load_params
from jaxgpt.cli import main
from jaxgpt.config import load
from jaxgpt.errors import UserError
from jaxgpt.train.state import State, make_program

# ---------------------------------------------------------------------------------- any mesh

MESHES = {
    "tensor=2,data=4": ONE | {"tensor": 2, "data": 4},
    "data=2,fsdp=2,tensor=2": MIXED,
    "one device": ONE,
}


@pytest.mark.parametrize("name", MESHES)
def test_a_checkpoint_of_fsdp_8_restores_on_any_mesh(trained, name) -> None:
    """Parameters, optimizer and counters, bitwise, each laid out as the mesh wants it."""
    state, host = restore(trained, MESHES[name])
    before, position = restore(trained)
    assert max(len(a.sharding.device_set) for a in jax.tree.leaves(before)) == 8
    assert_same(state, before)
    assert host == position
    program = make_program(load(trained), mesh(MESHES[name]))
    layouts = jax.tree.map(lambda a, s: a.sharding.is_equivalent_to(s, a.ndim), state, program.shardings)
    assert jax.tree.all(layouts)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tensor=2,data=4", "one device"])
def test_a_run_goes_on_where_another_mesh_left_it(trained, text_config, tmp_path, caplog, name) -> None:
    folder = copy(trained, tmp_path)
    shutil.rmtree(folder / "checkpoints" / str(STEPS))
    sizes = [word for axis, size in MESHES[name].items() for word in (f"--mesh.{axis}", str(size))]
    args = (str(text_config), "--runs", str(tmp_path), *sizes)
    if name == "one device":
        done = command(*args, devices=1)
        assert done.returncode == 0, done.stderr
        assert "at step 9 of 12" in done.stderr
    else:
        assert main(["train", *args]) == 0
        assert "at step 9 of 12" in caplog.text
    before, after = records(trained), records(folder)
    assert after[:9] == before[:9]
    for a, b in zip(before, after, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
    assert after[9:] != before[9:]


# ------------------------------------------------------------------------------ what is kept


def at(step: int) -> State:
    """Some state at a step."""
    return State(jnp.int32(step), jnp.int32(0), {"w": jnp.full(3, step)}, {"m": jnp.zeros(3)})


@pytest.mark.parametrize("keep", [1, 3])
def test_the_newest_and_the_best_are_kept(tmp_path, keep) -> None:
    checkpoints = Checkpoints(tmp_path, keep=keep)
    losses = {1: 3.0, 2: 1.0, 3: None, 4: 2.0, 5: None, 6: 1.5, 7: None}
    for step, loss in losses.items():
        checkpoints.save(at(step), {}, loss)
    checkpoints.close()
    assert saved(tmp_path) == [2, *range(8 - keep, 8)]
    assert Checkpoints(tmp_path, read_only=True).best() == 2


def test_the_best_may_hold_parameters_alone_and_nothing_is_resumed_from_it(tmp_path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(at(1), {"row": 1}, 3.0)
    checkpoints.save(at(2), {"row": 2})
    for step in (3, 4):
        checkpoints.save(at(step), {}, 3.0 - step / 10, whole=False)
    checkpoints.finish()
    assert (checkpoints.best(), checkpoints.steps()) == (4, [2, 4])
    state, host = checkpoints.restore(at(0))
    assert (int(state.step), host) == (2, {"row": 2})
    checkpoints.save(at(4), {"row": 4}, 2.6)  # the resumed run comes by again
    checkpoints.finish()
    assert int(checkpoints.restore(at(0))[0].step) == 4
    checkpoints.close()


def test_the_newest_is_the_best_where_nothing_was_measured(tmp_path) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2, 3):
        checkpoints.save(at(step), {})
    checkpoints.finish()
    assert (checkpoints.best(), checkpoints.steps()) == (3, [2, 3])
    checkpoints.close()


# ---------------------------------------------------------------------------------- damage


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES: dict[str, Callable[[Path], object]] = {
    "parameters cut": lambda p: [cut(f) for f in p.glob("params/**/d/*")],
    "parameters gone": lambda p: shutil.rmtree(p / "params"),
    "their list cut": lambda p: cut(p / "params" / "_METADATA"),
    "optimizer cut": lambda p: cut(p / "rest" / "manifest.ocdbt"),
    "data position gone": lambda p: (p / "host" / "metadata").unlink(),
    "data position cut": lambda p: cut(p / "host" / "metadata"),
    "everything gone": lambda p: [shutil.rmtree(f) if f.is_dir() else f.unlink() for f in p.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(trained, tmp_path, caplog, damage) -> None:
    folder = copy(trained, tmp_path)
    before = restore(copy(trained, tmp_path / "whole"))
    assert int(before[0].step) == STEPS
    DAMAGES[damage](folder / "checkpoints" / str(STEPS))
    with caplog.at_level(logging.WARNING, "jaxgpt"):
        state, host = restore(folder)
    assert int(state.step) == 9
    assert host["data"]["row"] == 9 * 8
    assert f"checkpoint {STEPS} is damaged" in caplog.text
    assert "using step 9 instead" in caplog.text
    assert saved(folder) == [9]
    assert [p.name.split("-")[0] for p in (folder / "damaged").iterdir()] == [str(STEPS)]


def test_a_run_with_a_damaged_checkpoint_ends_as_if_nothing_had_happened(
    trained, text_config, tmp_path, caplog
) -> None:
    folder = copy(trained, tmp_path)
    DAMAGES["parameters cut"](folder / "checkpoints" / str(STEPS))
    half = folder / "checkpoints" / "15.orbax-checkpoint-tmp"  # cut off while it was written
    shutil.copytree(folder / "checkpoints" / "9", half)
    assert main(["train", str(text_config), "--runs", str(tmp_path)]) == 0
    assert "using step 9 instead" in caplog.text
    assert not half.exists()
    assert curve(folder) == curve(trained)
    assert saved(folder) == saved(trained)
    again, first = restore(folder), restore(trained)
    assert_same(again[0], first[0])
    assert again[1] == first[1]


def test_a_run_whose_checkpoints_are_all_damaged_never_starts_over(trained, tmp_path, caplog) -> None:
    folder = copy(trained, tmp_path)
    for step in saved(folder):
        DAMAGES["parameters gone"](folder / "checkpoints" / str(step))
    before = tree(folder)
    for _ in range(2):
        with pytest.raises(UserError, match=r"every checkpoint of .* is damaged .12, 9. and left as it is"):
            restore(folder)
    assert "checkpoint 9 is damaged" in caplog.text
    assert tree(folder) == before
    (folder / "damaged").mkdir()
    for step in saved(folder):
        (folder / "checkpoints" / str(step)).rename(folder / "damaged" / f"{step}-1")
    with pytest.raises(UserError, match=r"every checkpoint of .* was damaged and is in .*to start over"):
        restore(folder)


def test_a_damaged_validation_loss_costs_no_checkpoint(trained, tmp_path, caplog) -> None:
    folder = copy(trained, tmp_path)
    cut(folder / "checkpoints" / str(STEPS) / "metrics" / "metrics")
    state, _ = restore(folder)
    assert_same(state, restore(trained)[0])
    assert f"{STEPS}/metrics/metrics is damaged" in caplog.text


def test_sampling_falls_back_to_a_whole_checkpoint(trained, tmp_path, caplog) -> None:
    folder, run, on = copy(trained, tmp_path), load(trained), mesh(ONE)
    whole = load_params(folder, run, on, "9")[0]
    assert load_params(folder, run, on)[1] == STEPS
    half = folder / "checkpoints" / "15.orbax-checkpoint-tmp"
    shutil.copytree(folder / "checkpoints" / "9", half)
    DAMAGES["parameters cut"](folder / "checkpoints" / str(STEPS))
    for which in ("best", "newest"):
        params, step = load_params(folder, run, on, which)
        assert step == 9
        assert_same(params, whole)
    assert f"checkpoint {STEPS} is damaged" in caplog.text
    with pytest.raises(UserError, match=f"no checkpoint .* could be read .{STEPS} are"):
        load_params(folder, run, on, str(STEPS))
    assert saved(folder) == [9, STEPS]  # who only reads moves nothing
    assert half.exists()
    DAMAGES["parameters gone"](folder / "checkpoints" / "9")
    with pytest.raises(UserError, match=r"no checkpoint in .* could be read"):
        load_params(folder, run, on)


# ---------------------------------------------------------------------------------- full disk


@pytest.mark.slow
def test_a_full_disk_costs_no_whole_checkpoint(trained, text_config, tmp_path) -> None:
    done = command(text_config, "--runs", str(tmp_path), fault="record|step 9 loss|FULL")
    folder = tmp_path / trained.name
    assert done.returncode == 3, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("jaxgpt: ")]
    assert len(said) == 1, done.stderr
    newest = max(saved(folder))  # whether that of step 8 was whole in time is a matter of luck
    assert f"the last whole one is step {newest}" in said[0]
    assert "run the same command again" in said[0]
    assert "Traceback" not in done.stderr, done.stderr
    assert done.stdout == ""
    assert newest in (6, 8)
    assert int(restore(copy(folder, tmp_path / "copy"))[0].step) == newest
    assert main(["train", str(text_config), "--runs", str(tmp_path)]) == 0
    assert curve(folder) == curve(trained)
    assert_same(restore(folder)[0], restore(trained)[0])


def test_a_save_that_fails_says_which_checkpoint_is_whole(tmp_path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(at(1), {})
    checkpoints.finish()
    with pytest.raises(SaveError, match="the last whole one is step 1"):
        checkpoints.save(at(1), {})
    checkpoints.close()


def test_a_save_that_fails_in_the_background_is_noticed_before_the_next(tmp_path) -> None:
    """So that a run with rare saves does not go on for hours without one."""
    checkpoints, (soft, hard) = Checkpoints(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    noise = jnp.asarray(np.random.default_rng(0).standard_normal(50_000), jnp.float32)
    checkpoints.save(at(1), {})
    checkpoints.finish()
    checkpoints.check()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))  # as on a disk that is nearly full
        checkpoints.save(replace(at(2), params={"w": noise}), {})
        with pytest.raises(SaveError, match="the last whole one is step 1"):
            for _ in range(600):
                checkpoints.check()
                time.sleep(0.05)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        checkpoints.manager.close()
