"""Where a run's numbers come from: each start of training leaves a record in `RUN/provenance`.

`N.json` is the record of the N-th start, `N.config.py` the config file's own text, and `N.diff` what the code
differed in from its git revision. Of files that git does not track only the names are kept.
"""

from __future__ import annotations

import datetime
import getpass
import importlib.metadata
import logging
import os
import platform
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax

from jaxgpt.files import write_bytes, write_json

log = logging.getLogger(__name__)

FOLDER = "provenance"
MOST_DIFF = 2**20
"""Bytes of a diff that are kept: whole files, and the names of the others."""
MOST_NAMES = 100
"""Of files that git does not track."""
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


def note_start(
    folder: Path, source: Path | None, step: int, changes: Mapping[str, tuple[Any, Any]] | None = None
) -> None:
    """Leave the record of a start in a run's folder.

    Args:
      folder: of the run.
      source: the config file that it is from, if there is one.
      step: that it goes on after.
      changes: of the config since the start before, as (before, now) by the fields' full names.
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
        "step": step,
        "changes": changes or {},
        "environment": environment() | {name: os.environ[name] for name in _FLAGS if name in os.environ},
    }
    if source is not None and source.is_file():
        record["config"] = str(source)
        try:
            write_bytes(place / f"{number}.config{source.suffix}", source.read_bytes())
        except OSError as error:
            log.warning("no copy of %s is kept with the run: %s", source, error.strerror)
    if diff := _diff():
        kept, record["diff_left_out"] = bounded(diff)
        write_bytes(place / f"{number}.diff", kept)
        if record["diff_left_out"]:
            log.warning("%s lacks what makes it longer than %d bytes", place / f"{number}.diff", MOST_DIFF)
    if names := _untracked():
        record["untracked"], record["untracked_in_all"] = names[:MOST_NAMES], len(names)
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


def bounded(diff: bytes, most: int = MOST_DIFF) -> tuple[bytes, list[str]]:
    """The parts of a diff that fit, each of a whole file, and the heads of those left out."""
    kept, left = b"", list[str]()
    for part in re.split(rb"^(?=diff --git )", diff, flags=re.MULTILINE):
        if len(kept) + len(part) <= most:
            kept += part
        else:
            left.append(part.split(b"\n", 1)[0].decode(errors="replace"))
    return kept, left


def _untracked() -> list[str]:
    """Files of the repository that git neither tracks nor ignores."""
    words = ("ls-files", "--others", "--exclude-standard", "--full-name", "-z", ":/")
    found = _git(None, *words) if _is_tracked(None) else None
    return [name.decode(errors="replace") for name in (found or b"").split(b"\0") if name]


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
