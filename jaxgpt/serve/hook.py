"""A command of the operator's that is told of an event."""

from __future__ import annotations

import logging
import shlex
import subprocess

log = logging.getLogger(__name__)

SECONDS = 30
"""That it may take."""


def run_hook(command: str, event: str) -> bool:
    """Run a command with a line on its standard input; whether it succeeded. What it prints goes to standard
    error.
    """
    try:
        subprocess.run(
            shlex.split(command), input=f"{event}\n".encode(), timeout=SECONDS, check=True, stdout=2
        )
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        log.error("the hook failed: %s", error)
        return False
    return True
