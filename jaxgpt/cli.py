"""`jaxgpt COMMAND`: a command's module is imported only when it is called."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

from jaxgpt import __version__

COMMANDS = {
    # name: (module, function, needs jax, what it does)
    "quickstart": (
        "jaxgpt.quickstart",
        "quickstart",
        True,
        "the whole recipe in a few minutes, on any machine",
    ),
    "tokenizer train": (
        "jaxgpt.data.train_tokenizer",
        "train_tokenizer",
        False,
        "learn a SentencePiece vocabulary",
    ),
    "data prepare": (
        "jaxgpt.data.prepare",
        "prepare",
        False,
        "turn text files into shards of token ids",
    ),
    "data show": (
        "jaxgpt.data.show",
        "show",
        False,
        "print what a config trains on, loss mask in colour",
    ),
    "info": ("jaxgpt.plan", "info", True, "parameters, FLOPs and memory of a config"),
    "train": ("jaxgpt.train.command", "train", True, "train a config, or resume it"),
    "sample": ("jaxgpt.sample.commands", "sample", True, "complete prompts with a trained run"),
    "chat": ("jaxgpt.sample.commands", "chat", True, "talk to a trained run"),
}

USAGE_ERROR = 2


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    args = sys.argv[1:] if argv is None else argv
    if not args or args[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if args[0] in ("-V", "--version"):
        print(f"jaxgpt {__version__}")
        return 0
    for words in (2, 1):
        name = " ".join(args[:words])
        if name in COMMANDS:
            return _run(name, args[words:])
    group = [name for name in COMMANDS if name.split()[0] == args[0]]
    if group:
        print(
            usage(group), file=sys.stderr if args[1:2] not in (["-h"], ["--help"]) else sys.stdout
        )
        return 0 if args[1:2] in (["-h"], ["--help"]) else USAGE_ERROR
    from jaxgpt.config import nearest

    print(f"jaxgpt: unknown command {args[0]!r}{nearest(args[0], COMMANDS)}", file=sys.stderr)
    return USAGE_ERROR


def usage(names: list[str] | None = None) -> str:
    """The list of commands."""
    lines = ["usage: jaxgpt COMMAND [OPTIONS]", "", "commands:"]
    lines += [f"  {name:<16} {COMMANDS[name][3]}" for name in names or COMMANDS]
    lines += [
        "",
        "`jaxgpt COMMAND --help` explains one; `jaxgpt quickstart` is the place to begin.",
    ]
    return "\n".join(lines)


def _run(name: str, args: list[str]) -> int:
    from jaxgpt.config import UserError

    module, function, needs_jax, _ = COMMANDS[name]
    _log_to_stderr()
    try:
        if needs_jax and not {"-h", "--help"} & set(args):
            _set_up_jax()
        command: Callable[..., Any] = getattr(importlib.import_module(module), function)
        if hasattr(command, "takes_overrides"):
            return command(args) or 0
        import tyro

        return tyro.cli(command, args=args, prog=f"jaxgpt {name}") or 0
    except UserError as error:
        print(f"jaxgpt: {error}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        print("jaxgpt: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `jaxgpt sample ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _log_to_stderr() -> None:
    from rich.console import Console
    from rich.logging import RichHandler

    handler = RichHandler(console=Console(stderr=True), show_path=False, show_time=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    logging.getLogger("absl").setLevel(
        logging.ERROR
    )  # Orbax and grain: what matters we say ourselves
    logging.getLogger("jaxgpt").setLevel(os.environ.get("JAXGPT_LOG", "INFO"))


def _set_up_jax() -> None:
    """The persistent compilation cache, and the other processes where a launcher started several."""
    import jax

    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/jaxgpt/xla"))
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    several = (
        "JAX_COORDINATOR_ADDRESS" in os.environ
        or int(os.environ.get("SLURM_NTASKS", "1")) > 1
        or "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
    )
    if several:  # SLURM and TPU pods are recognised by jax; launch/local.sh sets the two numbers
        count, index = os.environ.get("JAX_NUM_PROCESSES"), os.environ.get("JAX_PROCESS_ID")
        jax.distributed.initialize(
            num_processes=int(count) if count else None, process_id=int(index) if index else None
        )


if __name__ == "__main__":
    sys.exit(main())
