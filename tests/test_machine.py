"""What the machine or the launcher lacks is one sentence: memory, platforms, places among processes."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
from pathlib import Path

import jax
import pytest

import jaxgpt
from jaxgpt.cluster import place, several, told_while
from jaxgpt.errors import UserError
from jaxgpt.runtime import machine_memory, memory_errors, require_memory
from jaxgpt.streams import steady_text


def test_memory_that_is_not_there_is_named_before_it_is_asked_for() -> None:
    """CPU devices share the machine's."""
    free = machine_memory()
    assert free is not None and free > 2**20
    require_memory(dict.fromkeys(jax.devices(), 2**10), "parameters", "use less")
    with pytest.raises(
        UserError, match=r"parameters need at least 8192 GiB of memory on this machine, and .* GiB"
    ):
        require_memory(dict.fromkeys(jax.devices(), 2**40), "parameters", "use less")


def test_memory_that_only_trying_could_tell_of_is_one_sentence() -> None:
    with pytest.raises(UserError, match=r"out of memory .*; use less\.$"), memory_errors("use less"):
        jax.numpy.zeros((2**45,), "uint8").block_until_ready()
    with pytest.raises(ZeroDivisionError), memory_errors("use less"):
        _ = 1 / 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SLURM_NTASKS", "abc"),
        ("SLURM_NTASKS", "-2"),
        ("OMPI_COMM_WORLD_SIZE", ""),
        ("SLURM_NTASKS", "9" * 400),
    ],
)
def test_a_malformed_count_is_named(name, value, monkeypatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"{name} is .* it must be a whole number"):
        several()


PLACES = {
    "no port": ("localhost", "2", "1", "JAX_COORDINATOR_ADDRESS is 'localhost'; it must be HOST:PORT"),
    "a port too high": ("localhost:99999", "2", "1", "JAX_COORDINATOR_ADDRESS is 'localhost:99999'"),
    "none": ("localhost:1", "0", "0", "JAX_NUM_PROCESSES is 0; it must be at least 1"),
    "beyond": (
        "localhost:1",
        "2",
        "2",
        "JAX_PROCESS_ID is 2, of JAX_NUM_PROCESSES 2; it must be from 0 to 1",
    ),
    "no number": ("localhost:1", "2", "one", "JAX_PROCESS_ID is 'one'; it must be a whole number"),
}


@pytest.mark.parametrize("case", PLACES)
def test_places_that_cannot_be_are_named(case, monkeypatch) -> None:
    *values, words = PLACES[case]
    for name, value in zip(("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID"), values, strict=True):
        monkeypatch.setenv(f"JAX_{name}", value)
    with pytest.raises(UserError, match=words):
        place()
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "[::1]:1234")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "3")
    monkeypatch.setenv("JAX_PROCESS_ID", "2")
    assert place() == ("[::1]:1234", 3, 2)


def test_waiting_is_said_again_and_again(monkeypatch) -> None:
    told = threading.Event()

    class Told(io.StringIO):
        def write(self, words: str) -> int:
            written = super().write(words)
            if self.getvalue().count("waiting for b, 0 s so far\n") > 1:
                told.set()
            return written

    monkeypatch.setattr(sys, "stderr", Told())
    with told_while("waiting for b", seconds=0.01):
        assert told.wait(20)


def test_a_standard_error_that_cannot_be_written_stops_nothing() -> None:
    with open("/dev/full", "w") as full:
        stream = steady_text(full.fileno(), None)
        assert stream.write("a line\n") == 7
        stream.flush()


def test_closed_streams_are_opened_and_an_unknown_platform_is_one_sentence(tmp_path: Path) -> None:
    """No file of the run gets the number of standard error."""
    env = os.environ | {"PYTHONPATH": str(Path(jaxgpt.__file__).parents[1])}
    code = "from jaxgpt.streams import steady_streams as s; s(); f = open('a', 'w'); print(f.fileno())"
    words = ["sh", "-c", f'exec {sys.executable} -c "{code}" 2>&-']
    done = subprocess.run(words, env=env, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert int(done.stdout) > 2
    words = [sys.executable, "-m", "jaxgpt.cli", "info", "nothing.py"]
    bad = subprocess.run(
        words, env=env | {"JAX_PLATFORMS": "foo"}, capture_output=True, text=True, check=False
    )
    assert bad.returncode == 2
    assert bad.stderr.startswith("jaxgpt: JAX_PLATFORMS is 'foo', and JAX found no such devices")
    assert bad.stderr.count("\n") == 1
