"""One process owns a folder: another one is told who, and the system lets go when it dies."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import jaxgpt
from jaxgpt.errors import UserError
from jaxgpt.lock import owned

OTHER = """
import sys, time
from pathlib import Path
from jaxgpt.lock import owned
with owned(Path(sys.argv[1])):
    print("owned", flush=True)
    sys.stdin.read()
"""


def test_the_second_process_is_told_who_has_it_until_that_one_dies(tmp_path: Path) -> None:
    env = os.environ | {"PYTHONPATH": str(Path(jaxgpt.__file__).parents[1])}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    other = subprocess.Popen([sys.executable, "-c", OTHER, str(tmp_path)], env=env, **pipes)
    try:
        assert other.stdout is not None and other.stdout.readline() == b"owned\n"
        said = f"{tmp_path} is in use by process {other.pid} on {socket.gethostname()}; "
        for _ in range(2):  # asking does not let go of it
            with pytest.raises(UserError) as error, owned(tmp_path):
                pass
            assert str(error.value).startswith(said)
    finally:
        other.kill()
        other.communicate()
    with owned(tmp_path):
        pass


def test_a_process_does_not_own_a_folder_twice(tmp_path: Path) -> None:
    with owned(tmp_path / "a"):
        with pytest.raises(UserError, match=f"in use by process {os.getpid()} on"), owned(tmp_path / "a"):
            pass
        with owned(tmp_path / "b"):
            pass
    with owned(tmp_path / "a"):
        pass
