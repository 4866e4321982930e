"""`jaxgpt train CONFIG [--field value ...]`."""

from __future__ import annotations

import errno
import math
import sys
from pathlib import Path
from typing import Any

from jaxgpt import config
from jaxgpt.config import Run
from jaxgpt.errors import UserError, system_fix

NO_VERIFY, SELF_CONTAINED = "--no-verify", "--self-contained"
HELP = """Train a config, or resume it; every other option sets a field of the config. --no-verify loads
checkpoints without comparing their checksums; --self-contained keeps a copy of the model that is tuned in
the run's folder, not only its place (for `tune` other than Full). --profile A:B traces the steps A to B into
the run's folder and prints what took their time.
"""


def read_args(args: list[str], command: str, description: str | None = None) -> Run:
    """The config named by the first argument, with the overrides that follow it.

    Asking for help needs no config and prints every field.
    """
    prog = f"jaxgpt {command} CONFIG"
    if args and not args[0].startswith("-"):
        return config.override(config.load(args[0]), args[1:], prog, description)
    if {"-h", "--help"} & set(args):  # of no config: that of the defaults
        config.override(Run(name="NAME"), ["--help"], prog, description)
    raise UserError(
        f"`jaxgpt {command}` needs a CONFIG first: a .py file, a run's config.json or a run folder."
    )


def train(args: list[str], scores: Any = None, profile: Any = None) -> int:
    """Train a config, or resume it. Exit codes: 0 done, 2 a user error, 3 diverged or not saved,
    4 another process ended, 75 stopped by a signal with everything saved.

    `scores` and `profile` are for `loop.train`.
    """
    verify, self_contained = NO_VERIFY not in args, SELF_CONTAINED in args
    args = [word for word in args if word not in (NO_VERIFY, SELF_CONTAINED)]
    run = read_args(args, "train", HELP)
    from jaxgpt.checkpoint import SaveError
    from jaxgpt.train import loop
    from jaxgpt.train.hooks import best_of
    from jaxgpt.train.signals import STOPPED_BY_SIGNAL

    try:
        result = loop.train(
            run,
            verify=verify,
            source=Path(args[0]),
            self_contained=self_contained,
            scores=scores,
            profile=profile,
        )
    except (loop.Diverged, SaveError) as error:
        print(f"jaxgpt: {error}", file=sys.stderr)
        return 3
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        print(
            f"jaxgpt: {error.filename or run.folder} cannot be written ({error.strerror}): "
            f"{system_fix(error.errno)} and run the same command again, it goes on from the last checkpoint.",
            file=sys.stderr,
        )
        return 3
    stopped = result.reason not in ("finished", "patience")
    talk = "eval" if not run.writes else "chat" if run.templated else "sample"
    test = " --split test" if getattr(run.data, "test", ()) else ""
    then = "run the same command to go on" if stopped else f"try `jaxgpt {talk} {run.folder}{test}`"
    measured = math.isfinite(result.best)
    found = best_of(run.folder) if measured else None
    best = f", best validation {found['by']} {found['value']:.4f} at step {found['step']}" if found else ""
    print(f"{run.folder}: {result.reason} at step {result.step}{best}; {then}")
    return STOPPED_BY_SIGNAL if stopped else 0
