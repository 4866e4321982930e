"""`jaxgpt train CONFIG [--field value ...]`."""

from __future__ import annotations

import errno
import math
import sys

from jaxgpt import config
from jaxgpt.config import CausalLM, Run
from jaxgpt.errors import UserError


def read_args(args: list[str], command: str) -> Run:
    """The config named by the first argument, with the overrides that follow it.

    Asking for help needs no config and prints every field.
    """
    prog = f"jaxgpt {command} CONFIG"
    if args and not args[0].startswith("-"):
        return config.override(config.load(args[0]), args[1:], prog)
    if {"-h", "--help"} & set(args):
        config.override(Run(name="NAME"), ["--help"], prog)
    raise UserError(
        f"`jaxgpt {command}` needs a CONFIG first: a .py file, a run's config.json or a run folder."
    )


def train(args: list[str]) -> int:
    """Train a config, or resume it. Exit codes: 0 done, 2 a mistake to mend, 3 diverged or not
    saved, 4 another process ended, 75 stopped by a signal with everything saved.
    """
    run = read_args(args, "train")
    from jaxgpt.checkpoint import SaveError
    from jaxgpt.train import loop

    try:
        result = loop.train(run)
    except (loop.Diverged, SaveError) as error:
        print(f"jaxgpt: {error}", file=sys.stderr)
        return 3
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        print(
            f"jaxgpt: {run.folder} cannot be written ({error.strerror}): free some space and run "
            "the same command again, it goes on from the last checkpoint.",
            file=sys.stderr,
        )
        return 3
    stopped = result.reason not in ("finished", "patience")
    writes = isinstance(run.objective, CausalLM)
    talk = "eval" if not writes else "chat" if run.templated else "sample"
    test = " --split test" if getattr(run.data, "test", ()) else ""
    then = "run the same command to go on" if stopped else f"try `jaxgpt {talk} {run.folder}{test}`"
    measured = math.isfinite(result.best)
    best = f", best validation {run.train.best_by} {result.best:.4f}" if measured else ""
    print(f"{run.folder}: {result.reason} at step {result.step}{best}; {then}")
    return loop.STOPPED_BY_SIGNAL if stopped else 0
