"""`jaxgpt serve audit verify`: whether an audit log is as it was written."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from jaxgpt.errors import require
from jaxgpt.serve.audit import START, read_head
from jaxgpt.serve.audit import verify as verify_files

Files = Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]


def verify(files: Files, *, head: str = "") -> None:
    """Check the chain of an audit log's lines, and name the first one that was tampered with.

    Every line that was changed, removed, added or moved breaks the chain, and lines that are missing at the
    end show by FILE.head. Who may write both files can forge the whole log, or its end: against that, write
    the hash that this command prints down elsewhere now and then, and give it by --head. What a server
    answered while it did not log cannot be seen here.

    Args:
      files: of the log; of a rotated one in order, the oldest first.
      head: NUMBER:HASH of a line that must be there, as an earlier run of this command printed it.

    Raises:
      UserError: a line is not as it was written (exit code 6), or a file cannot be read.
    """
    require(bool(files), "no file is named; name an audit log.")
    found = verify_files(files, read_head(head, "--head") if head else START)
    count = found.head.number - found.first.number
    print(f"{count} lines are as they were written; the last is {found.head}")
    if found.first.number:
        print(f"the {found.first.number} before them are in older files")
