"""A chat template as a function, run by the process of jinja_worker.py.

One worker serves all templates of a process: it starts (some 0.2 s) with the first template, ends with
its standard input, hence with its parent, and is started again after a template made it end. Threads
take turns; a forked child starts a worker of its own.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from jaxgpt.errors import UserError
from jaxgpt.text import jinja_worker
from jaxgpt.text.jinja_worker import MEMORY, OUT_OF_MEMORY, SECONDS

Messages = Sequence[dict[str, Any]]
Rendering = tuple[Messages, bool]
"""Turns, and whether the opening of an answer follows them."""
_PATIENCE = 3  # dialogues that may end the worker before a template is no longer tried


class _Worker:
    """The process and what was sent to it."""

    def __init__(self) -> None:
        path = os.pathsep.join(filter(None, sys.path))  # where this process finds Jinja
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-P", jinja_worker.__file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": path},
                start_new_session=True,  # Ctrl-C is for us
            )
        except OSError as error:
            raise UserError(
                f"the process that renders chat templates cannot be started ({error.strerror}); see what the "
                "system still allows (`ulimit -a`)."
            ) from None
        self.known = set[str]()

    def ask(self, request: dict[str, Any]) -> Any:
        """The reply; None where the process ended instead."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except OSError:  # it is gone
            return None
        return json.loads(line) if line.endswith(b"\n") else None

    def end(self, kill: bool = False) -> int:
        """Its exit code, as `subprocess` has it."""
        if kill:
            self.process.kill()
        for stream in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                assert stream is not None
                stream.close()
        try:
            return self.process.wait(10)
        except subprocess.TimeoutExpired:
            return self.end(kill=True)


_lock = threading.Lock()
_worker: _Worker | None = None
_inherited: list[_Worker | None] = []  # kept, so that a forked child does not end its parent's worker


def _forked() -> None:
    global _lock, _worker
    _inherited.append(_worker)
    _lock, _worker = threading.Lock(), None


os.register_at_fork(after_in_child=_forked)


@atexit.register
def _end() -> None:
    global _worker
    if _worker is not None:
        _worker.end()
        _worker = None


class Jinja:
    """A template.

    Dates that it asks for are of the moment when it was made, so that they stay the same for as long
    as a process runs.

    Args:
      source: Jinja.
      names: special tokens by the names that a template has for them.
      where: names the tokenizer in errors.

    Raises:
      UserError: the source does not compile.
    """

    def __init__(self, source: str, names: dict[str, str], where: str) -> None:
        self._where, self._ended, self._last = where, 0, ""
        self._definition = {"source": source, "names": names, "now": time.time()}
        self._key = hashlib.sha256(json.dumps(self._definition).encode()).hexdigest()
        reply = self._ask({"turns": [], "renderings": []}, "while it was read")
        if reply:
            raise UserError(f"{where}: the chat template is not valid ({reply[1]}); fix it.")

    def render(
        self, renderings: Sequence[Rendering], tools: Sequence[dict[str, Any]] = ()
    ) -> list[str | UserError]:
        """The text of each rendering, with the marks of `{% generation %}` in it, or why there is none.

        Args:
          renderings: dialogues.
          tools: that the template is told of, as OpenAI writes them.

        Raises:
          UserError: the template took too much time or memory.
        """
        about = f"for a dialogue of {roles(max((r[0] for r in renderings), key=len, default=()))}"
        turns = {id(turn): turn for messages, _ in renderings for turn in messages}  # each is sent once
        place = {key: i for i, key in enumerate(turns)}
        calls = [([place[id(turn)] for turn in messages], prompt) for messages, prompt in renderings]
        replies = self._ask({"turns": list(turns.values()), "renderings": calls, "tools": [*tools]}, about)
        return [
            text if kind == "text" else UserError(self._refusal(kind, text, messages))
            for (kind, text), (messages, _) in zip(replies, renderings, strict=True)
        ]

    def _refusal(self, kind: str, why: str, messages: Messages) -> str:
        start = f"the chat template of {self._where}"
        if kind == "limit":
            return f"{start} {why} for a dialogue of {roles(messages)}; fix the template."
        return (
            f"{start} refuses a dialogue of {roles(messages)} ({why}); change the dialogue or leave it out."
        )

    def _ask(self, work: dict[str, Any], about: str) -> Any:
        global _worker
        if self._ended >= _PATIENCE:  # each try may take as long again
            raise UserError(self._last)
        code = 0
        for _ in range(2):  # again where the process ended for a reason of its own
            with _lock:
                if _worker is None or _worker.process.poll() is not None:
                    _end()
                    _worker = _Worker()
                try:
                    reply = self._exchange(_worker, work)
                except BaseException:  # such as Ctrl-C: the reply would be taken for the next one's
                    _worker.end(kill=True)
                    _worker = None
                    raise
                if reply is not None:
                    return reply
                code, _worker = _worker.end(), None
            if code in (-signal.SIGPROF, OUT_OF_MEMORY):
                break
        what = {
            -signal.SIGPROF: f"took longer than {SECONDS:g} s",
            OUT_OF_MEMORY: f"needed more than {MEMORY >> 20} MiB of memory",
        }.get(code, f"ended the process that renders it (code {code})")
        self._ended += 1
        self._last = f"the chat template of {self._where} {what} {about}; fix the template."
        raise UserError(self._last)

    def _exchange(self, worker: _Worker, work: dict[str, Any]) -> Any:
        request = {"template": self._key, **work}
        whole = request | self._definition
        reply = worker.ask(request if self._key in worker.known else whole)
        if reply == ["unknown", ""]:  # forgotten, to make room for others
            reply = worker.ask(whole)
        worker.known.add(self._key)
        return reply


def roles(messages: Messages) -> str:
    """The turns of a dialogue, in words."""
    return ", ".join(str(message["role"]) for message in messages) or "no turns"
