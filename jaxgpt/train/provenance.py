"""Where a run's numbers come from: each start of training leaves a record in `RUN/provenance`.

`N.json` is the record of the N-th start, `N.config.py` the config file's own text, and `N.diff` what the code
differed in from its git revision.
"""

from __future__ import annotations

import datetime
import getpass
import importlib.metadata
import os
import platform
import shlex
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax

from jaxgpt.files import write_bytes, write_json

FOLDER = "provenance"
MOST_DIFF = 2**20
"""Bytes of a diff that are kept."""
_PACKAGES = ("jaxgpt", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_PLATFORMS")
"""Environment variables that change what is computed; no others are kept, since they may be secrets."""


def environment() -> dict[str, Any]:
    """What a run is computed with: git revision, versions, devices, flags."""
    versions: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "git": revision(),
        "python": platform.python_version(),
        "versions": versions,
        "devices": jax.device_count(),
        "device": jax.devices()[0].device_kind,
        "processes": jax.process_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def note_start(folder: Path, source: Path | None) -> None:
    """Leave the record of a start in a run's folder.

    Args:
      folder: of the run.
      source: the config file that it is from, if there is one.
    """
    place, number = folder / FOLDER, 1
    while (place / f"{number}.json").exists():
        number += 1
    record: dict[str, Any] = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "directory": str(Path.cwd()),
        "host": socket.gethostname(),
        "user": _user(),
        "process": os.getpid(),
        "environment": environment() | {name: os.environ[name] for name in _FLAGS if name in os.environ},
    }
    if source is not None and source.is_file():
        record["config"] = str(source)
        with suppress(OSError):
            write_bytes(place / f"{number}.config{source.suffix}", source.read_bytes())
    if diff := _diff():
        record["diff_bytes"] = len(diff)
        write_bytes(place / f"{number}.diff", diff[:MOST_DIFF])
    write_json(place / f"{number}.json", record)


def _user() -> str | None:
    with suppress(OSError, KeyError, ImportError):  # an id without a name
        return getpass.getuser()
    return None


# -------------------------------------------------------------------------------------- the package's code


def revision(package: Path | None = None) -> str | None:
    """The git revision of the package's own repository, `-dirty` where files differ from it; None where the
    package is not in one, as when it is installed (perhaps inside somebody else's).
    """
    found = _git(package, "describe", "--always", "--dirty", "--abbrev=12") if _is_tracked(package) else None
    return found.decode().strip() or None if found else None


def _diff(package: Path | None = None) -> bytes:
    """How the repository's tracked files differ from the revision."""
    plain = ("diff", "HEAD", "--no-color", "--no-ext-diff")
    return (_git(package, *plain) or b"") if _is_tracked(package) else b""


def _is_tracked(package: Path | None) -> bool:
    return _git(package, "ls-files", "--error-unmatch", "__init__.py") is not None


def _git(package: Path | None, *words: str) -> bytes | None:
    """What git prints in the package's folder; None where it fails, or is not there."""
    where = package or Path(__file__).parents[1]
    try:
        done = subprocess.run(["git", "-C", str(where), *words], capture_output=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return None if done.returncode else done.stdout
