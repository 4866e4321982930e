"""`jaxgpt COMMAND`: a command's module is imported only when it is called."""

from __future__ import annotations

import functools
import importlib
import logging
import os
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from jaxgpt import __version__
from jaxgpt.cluster import several, supervise
from jaxgpt.streams import quiet_libraries, steady_streams


class Command(NamedTuple):
    """Where a command's function is, and how to call it.

    Attributes:
      module, function: what to import once it is called.
      about: one line of help.
      jax: whether it computes.
      config: whether it takes a config with overrides: the function then parses its own arguments.
    """

    module: str
    function: str
    about: str
    jax: bool = False
    config: bool = False


COMMANDS = {
    "quickstart": Command(
        "jaxgpt.quickstart", "quickstart", "the whole recipe in a few minutes, on any machine", jax=True
    ),
    "tokenizer train": Command(
        "jaxgpt.data.train_tokenizer", "train_tokenizer", "learn a SentencePiece vocabulary"
    ),
    "data prepare": Command("jaxgpt.data.prepare", "prepare", "turn text files into shards of token ids"),
    "data show": Command("jaxgpt.data.show", "show", "print what a config trains on, loss mask in colour"),
    "data ratings": Command(
        "jaxgpt.evals.recommend_command", "ratings", "MovieLens's ratings as histories, candidates and clicks"
    ),
    "info": Command("jaxgpt.plan", "info", "parameters, FLOPs and memory of a config", jax=True, config=True),
    "train": Command("jaxgpt.train_command", "train", "train a config, or resume it", jax=True, config=True),
    "sweep": Command(
        "jaxgpt.sweep", "sweep", "train the runs of a config's sweep(), compare them", jax=True, config=True
    ),
    "lr-find": Command(
        "jaxgpt.lr_find", "lr_find", "find a learning rate: loss while it rises", jax=True, config=True
    ),
    "compare": Command("jaxgpt.compare", "compare", "settings, numbers and curves of several runs"),
    "advise": Command("jaxgpt.advise", "advise", "what a run's curves say, and what to try next"),
    "report": Command("jaxgpt.watch", "report", "draw report.html of runs anew"),
    "watch": Command("jaxgpt.watch", "watch", "a run's report in the browser, while it trains"),
    "eval": Command("jaxgpt.evals.command", "evaluate", "losses, perplexities and tasks of a run", jax=True),
    "explain": Command(
        "jaxgpt.explain", "explain", "why a model predicts what it predicts, as a page", jax=True
    ),
    "predict": Command(
        "jaxgpt.evals.predict_command",
        "predict",
        "label new texts with a trained tagger or classifier",
        jax=True,
    ),
    "monitor": Command(
        "jaxgpt.serve.stream_monitor.command",
        "monitor",
        "watch a stream of texts: alarm when a label becomes more frequent",
        jax=True,
    ),
    "label": Command(
        "jaxgpt.evals.few_labels_command", "label", "label texts that a trained run is sure of", jax=True
    ),
    "select": Command(
        "jaxgpt.evals.few_labels_command", "select", "find the texts that a person should label", jax=True
    ),
    "sample": Command("jaxgpt.sample.commands", "sample", "complete prompts with a trained run", jax=True),
    "chat": Command("jaxgpt.sample.commands", "chat", "talk to a trained run", jax=True),
    "serve": Command("jaxgpt.serve.command", "serve", "answer requests over HTTP, as OpenAI's API", jax=True),
    "serve keys add": Command("jaxgpt.serve.keys_command", "add", "make a key for a server, printed once"),
    "serve keys list": Command("jaxgpt.serve.keys_command", "list_", "the keys of a server, without secrets"),
    "serve keys remove": Command("jaxgpt.serve.keys_command", "remove", "let a key open nothing any more"),
    "serve documents": Command(
        "jaxgpt.serve.documents_command", "calibrate", "below which score a question counts as unknown"
    ),
    "serve audit verify": Command(
        "jaxgpt.serve.audit_command", "verify", "whether a server's audit log is as it was written"
    ),
    "import": Command("jaxgpt.convert.commands", "import_", "make a run of a Hugging Face model", jax=True),
    "prune": Command(
        "jaxgpt.convert.prune", "prune", "a smaller run, of what matters most in another", jax=True
    ),
    "merge": Command("jaxgpt.convert.merge", "merge", "put a tuned run and its base into one", jax=True),
    "soup": Command("jaxgpt.convert.soup", "soup", "average the parameters of several runs", jax=True),
    "quantize": Command(
        "jaxgpt.convert.quantize", "quantize", "hold a run's matrices in 8 or 4 bits", jax=True
    ),
    "export": Command("jaxgpt.convert.commands", "export", "write a run as a Hugging Face model", jax=True),
}

USAGE_ERROR = 2


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    if argv is None:
        steady_streams()
    args = sys.argv[1:] if argv is None else argv
    if not args or args[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if args[0] in ("-V", "--version"):
        print(f"jaxgpt {__version__}")
        return 0
    for words in (3, 2, 1):
        name, rest = " ".join(args[:words]), args[words:]
        if name in COMMANDS:
            return _run(name, rest)
        if group := [other for other in COMMANDS if other.startswith(f"{name} ")]:
            return _explain_group(name, group, rest)
    return _unknown(args[0], list(COMMANDS))


def _explain_group(name: str, group: list[str], rest: list[str]) -> int:
    """List the commands that begin so; an error unless that was asked for."""
    if rest and rest[0] not in ("-h", "--help"):
        return _unknown(f"{name} {rest[0]}", group)
    print(usage(group), file=sys.stdout if rest else sys.stderr)
    return 0 if rest else USAGE_ERROR


def _unknown(name: str, known: list[str]) -> int:
    from jaxgpt.glossary import look_up

    print(f"jaxgpt: unknown command {name!r}{look_up(name, known)}", file=sys.stderr)
    return USAGE_ERROR


def usage(names: list[str] | None = None) -> str:
    """The list of commands."""
    lines = ["usage: jaxgpt COMMAND [OPTIONS]", "", "commands:"]
    lines += [f"  {name:<18} {COMMANDS[name].about}" for name in names or COMMANDS]
    lines += [
        "",
        "`jaxgpt COMMAND --help` explains one; `jaxgpt quickstart` is the place to begin.",
        "Any command takes --trust-code: run Python code that a run brings with it and that never ran here.",
    ]
    return "\n".join(lines)


def _run(name: str, args: list[str]) -> int:
    computes = COMMANDS[name].jax and not {"-h", "--help"} & set(args)
    from jaxgpt.errors import UserError

    try:
        together = computes and several()
    except UserError as error:
        print(f"jaxgpt: {error}", file=sys.stderr)
        return error.exit_code
    call = functools.partial(_call, name, args, computes)
    return supervise(call) if together else call()


TRUST = "--trust-code"
"""An option of every command: run Python code that a run brings with it (`jaxgpt.config.code`)."""


def _call(name: str, args: list[str], computes: bool) -> int:
    from jaxgpt.config import parse_args
    from jaxgpt.errors import UserError, system_fix

    command = COMMANDS[name]
    if TRUST in args:
        args = [word for word in args if word != TRUST]
        os.environ["JAXGPT_TRUST_CODE"] = "1"
    try:
        _log_to_stderr()
        if computes:
            importlib.import_module("jaxgpt.runtime").set_up()
        function: Callable[..., Any] = getattr(importlib.import_module(command.module), command.function)
        if command.config:
            return function(args) or 0

        @functools.wraps(function)  # parsed first and called later: what it prints is its own
        def later(*args: Any, **options: Any) -> Callable[[], Any]:
            return functools.partial(function, *args, **options)

        return parse_args(later, args, f"jaxgpt {name}")() or 0
    except UserError as error:
        print(f"jaxgpt: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # `jaxgpt sample ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a folder that cannot be written, a full disk: no fault of the code
        if error.strerror is None or os.environ.get("JAXGPT_LOG", "").upper() == "DEBUG":
            raise
        where = f"{error.filename or 'the output'} cannot be used ({error.strerror})"
        print(f"jaxgpt: {where}; {system_fix(error.errno)}.", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        print("jaxgpt: interrupted", file=sys.stderr)
        return 130


def _log_to_stderr() -> None:
    from rich.console import Console
    from rich.logging import RichHandler

    from jaxgpt.errors import require_known

    handler = RichHandler(console=Console(stderr=True), show_path=False, show_time=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    level, levels = os.environ.get("JAXGPT_LOG", "INFO").upper(), logging.getLevelNamesMapping()
    require_known(level, levels, f"JAXGPT_LOG is {level!r}")
    logging.getLogger("jaxgpt").setLevel(level)
    if level != "DEBUG":
        quiet_libraries()


if __name__ == "__main__":
    sys.exit(main())
