"""What is damage, what is a mismatch, and what says nothing of the files."""

from __future__ import annotations

import errno
import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt.checkpoint import Checkpoints, State
from jaxgpt.checkpoint.damage import Damaged, as_damage
from jaxgpt.checkpoint.read import read_step
from jaxgpt.errors import NotFinite, UserError

MADE = State(
    jnp.int32(3),
    jnp.int32(0),
    {"w": jnp.ones((4, 2)), "b": jnp.zeros(2)},
    {"mu": {"w": jnp.zeros((4, 2))}},
)


def save(folder: Path, state: State) -> Checkpoints:
    checkpoints = Checkpoints(folder)
    checkpoints.save(state, {"row": 1})
    checkpoints.finish()
    return checkpoints


MISMATCHES: dict[str, tuple[State, str]] = {
    "shape": (
        replace(MADE, params={"w": jnp.ones((4, 3)), "b": jnp.zeros(2)}),
        r"w is float32\[4, 2\] there and float32\[4, 3\] here \(2 arrays there, 2 here\)",
    ),
    "type": (
        replace(MADE, params={"w": jnp.ones((4, 2), jnp.bfloat16), "b": jnp.zeros(2)}),
        r"w is float32\[4, 2\] there and bfloat16\[4, 2\] here",
    ),
    "another optimizer": (
        replace(MADE, opt={"nu": {"w": jnp.zeros((4, 2))}}),
        r"opt.mu.w is float32\[4, 2\] there and absent here; opt.nu.w is absent there and float32",
    ),
}


@pytest.mark.parametrize(
    ("name", "old"),
    [*((name, False) for name in MISMATCHES), ("shape", True), ("another optimizer", True)],
)
def test_a_whole_checkpoint_that_does_not_fit_is_refused_and_never_moved(name, old, tmp_path) -> None:
    """Also one of an older version, without checksums."""
    with closing(save(tmp_path, MADE)) as checkpoints:
        if old:
            shutil.rmtree(tmp_path / "checkpoints" / "3" / "sums")
        wanted, words = MISMATCHES[name]
        with pytest.raises(UserError, match=f"checkpoint 3 of {tmp_path} is whole .* make: {words}"):
            checkpoints.restore(wanted)
        assert checkpoints.steps() == [3]
        assert not (tmp_path / "damaged").exists()
        assert checkpoints.restore(MADE)[1] == {"row": 1}


def test_a_checkpoint_without_checksums_says_so_once_and_loads(tmp_path, caplog) -> None:
    caplog.set_level("INFO", "jaxgpt")
    with closing(save(tmp_path, MADE)) as checkpoints:
        shutil.rmtree(tmp_path / "checkpoints" / "3" / "sums")
        assert checkpoints.restore(MADE)[1] == {"row": 1}
    assert [r.message for r in caplog.records if "has no checksums" in r.message] == [caplog.messages[-1]]


def test_parameters_that_are_not_finite_are_refused_by_name(tmp_path) -> None:
    bad = replace(MADE, params={"w": jnp.ones((4, 2)), "b": jnp.asarray([1.0, np.nan])})
    save(tmp_path, bad).close()
    step = tmp_path / "checkpoints" / "3"
    with pytest.raises(
        NotFinite, match=rf"checkpoint 3 of {tmp_path} elements of parameters, namely b \(1\)"
    ):
        read_step(step, {"params": bad.params})
    assert np.isnan(read_step(step, {"params": bad.params}, verify=False)[0]["params"]["b"][1])


TENSORSTORE = (
    "UNKNOWN: Error reading {}: Failed to open: \"m\": {} [os_error_code='{}'] [tensorstore_spec='{{}}']"
)


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.EMFILE, errno.ENOMEM, errno.EACCES])
def test_what_the_system_lacked_is_no_damage(number) -> None:
    """As Python raises it, as the cause of another error, and as TensorStore writes it into words."""
    cause = ValueError("no metadata")
    cause.__cause__ = OSError(number, "said")
    for error in (OSError(number, "said"), cause, ValueError(TENSORSTORE.format("x", "said", number))):
        found: Any = as_damage(error, Path("runs/a/checkpoints/3"))
        assert isinstance(found, OSError)
        assert (found.errno, found.filename) == (number, "runs/a/checkpoints/3")
    passing = ValueError("UNAVAILABLE: no answer from the server")
    assert as_damage(passing, Path("a")) is passing


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "gone"),
        FileNotFoundError("Checkpoint at x not found."),
        ValueError("DATA_LOSS: Error decoding manifest"),
        ValueError(TENSORSTORE.format("x", "Too many levels of symbolic links", errno.ELOOP)),
        KeyError("tree_metadata"),
    ],
)
def test_missing_and_undecodable_files_are_damage(error) -> None:
    assert isinstance(as_damage(error, Path("a")), Damaged)
