"""Folders and files that a command writes whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from jaxgpt.errors import UserError, require

_SPACE = "free some space or name a folder on another disk"
_FIXES = {errno.ENOSPC: _SPACE, errno.EDQUOT: _SPACE, errno.EFBIG: "raise the limit of `ulimit -f`"}
"""What to do about a file that cannot be written; the rest is a matter of rights."""


def refuse_filled(target: Path, what: str) -> None:
    """Refuse to write into a folder that holds something."""
    require(
        not target.exists() or (target.is_dir() and not any(target.iterdir())),
        f"{target} exists and is not empty; {what} is written into a folder of its own.",
    )


@contextlib.contextmanager
def whole(target: Path, size: int, *, file: bool = False) -> Iterator[Path]:
    """A folder, or a file, to write into, which takes its place only when all is written.

    Raises:
      UserError: it cannot be made or written, or the disk has not the bytes of `size` free.
    """
    from jaxgpt.checkpoint import SaveError

    work, what = None, f"{target} cannot be written"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
        require(
            size <= free,
            f"{what}: it takes {size / 1e9:.2f} GB and {target.parent} has {free / 1e9:.2f} GB free; "
            f"{_SPACE}.",
        )
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        work.chmod(0o755)  # mkdtemp makes it private
        part = work / target.name if file else work
        yield part
        os.replace(part, target)
    except OSError as error:
        if error.filename and not Path(error.filename).is_relative_to(target.parent):
            raise
        fix = _FIXES.get(error.errno or 0, "check the path and its rights")
        raise UserError(f"{what} ({error.strerror}); nothing is left of it: {fix}.") from None
    except SaveError as error:
        raise UserError(f"{what}: {str(error).replace(str(work), str(target))}") from None
    finally:
        if work is not None:
            _remove(work)


def _remove(folder: Path) -> None:
    """Remove a folder into which threads of a failed save may write for a moment longer."""
    for _ in range(50):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.1)


@contextlib.contextmanager
def progress(size: int) -> Iterator[Callable[[int], None]]:
    """A bar of bytes on a terminal's standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

    columns = (BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("", total=size)
        yield lambda count: bar.advance(task, count)
