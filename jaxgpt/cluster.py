"""One process of several: whether there are others, and what becomes of it when one of them ends.

JAX's runtime notices by missed heartbeats that another process is gone, also while the main thread
waits in a collective, and then aborts this one from a thread of its own, with a stack trace. No
Python code of the aborted process can prevent that. So the work is done in a child process, and its
parent, which never imports jax, turns the abort into one sentence and an exit code.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NamedTuple

from jaxgpt.errors import require
from jaxgpt.streams import steady_text

PEER_ENDED = 4
"""Exit code: another process of the cluster ended, or cannot be reached any more."""

HEARTBEAT = 20
"""Seconds without a sign of life after which a process counts as gone."""

PR_SET_PDEATHSIG = 1
"""The number of the setting in Linux's sys/prctl.h."""

_DONE = (0, 75)
_FATAL = b"JAX distributed service detected fatal errors"
_SIGNALS = [
    getattr(signal, name)
    for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)  # Windows has but the first two
]


def several() -> bool:
    """Whether a launcher started several processes.

    SLURM and TPU pods are recognised by JAX; launch/local.sh sets the two numbers itself.

    Raises:
      UserError: a number that a launcher sets is none.
    """
    for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        _number(name)
    return (
        "JAX_COORDINATOR_ADDRESS" in os.environ
        or (_number("SLURM_NTASKS") or 1) > 1
        or (_number("OMPI_COMM_WORLD_SIZE") or 1) > 1
        or "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
    )


class Place(NamedTuple):
    """What the launcher says of this process; None where JAX finds it out itself."""

    coordinator: str | None
    count: int | None
    index: int | None


def place() -> Place:
    """The place of this process among the others, by the variables that launch/local.sh sets.

    Raises:
      UserError: one is malformed, or they contradict each other.
    """
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    count, index = _number("JAX_NUM_PROCESSES"), _number("JAX_PROCESS_ID")
    if address is not None:
        host, _, port = address.rpartition(":")
        require(
            bool(host) and port.isascii() and port.isdecimal() and 0 < int(port[:6]) < 2**16,
            f"JAX_COORDINATOR_ADDRESS is {address!r}; it must be HOST:PORT of the first process.",
        )
    require(count != 0, "JAX_NUM_PROCESSES is 0; it must be at least 1.")
    require(
        count is None or index is None or index < count,
        f"JAX_PROCESS_ID is {index}, of JAX_NUM_PROCESSES {count}; it must be from 0 to {(count or 0) - 1}.",
    )
    return Place(address, count, index)


def _number(name: str) -> int | None:
    """A whole number that a launcher sets; None where it does not."""
    value = os.environ.get(name)
    if value is None:
        return None
    require(
        value.isascii() and value.isdecimal() and len(value) < 8,
        f"{name} is {value!r:.80}; it must be a whole number, as its launcher sets it.",
    )
    return int(value)


@contextlib.contextmanager
def told_while(words: str, seconds: float = 10.0) -> Iterator[None]:
    """Say on standard error what is being waited for, every so many seconds; Ctrl-C ends it at once.

    Python's own handler would not run while a library waits.
    """
    done = threading.Event()

    def tell() -> None:
        since = time.monotonic()
        while not done.wait(seconds):
            print(f"jaxgpt: {words}, {time.monotonic() - since:.0f} s so far", file=sys.stderr, flush=True)

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        done.set()
        thread.join()


def supervise(work: Callable[[], int]) -> int:
    """Do the work in a child process, and return its exit code, or `PEER_ENDED`.

    It must be called before jax is imported. Returns in both processes: in the child after work that
    is done, so that its interpreter ends in the usual way. A signal to the parent is passed on. Where
    the system cannot fork, the work is done here, and the end of another process is jax's own trace.
    """
    if not hasattr(os, "fork"):
        return work()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        return _work(work, writing)
    os.close(writing)

    def pass_on(number: int, frame: FrameType | None) -> None:
        os.kill(child, number)

    for number in _SIGNALS:
        signal.signal(number, pass_on)
    said = _Said(reading)
    _, status = os.waitpid(child, 0)
    fatal = said.end()
    if fatal:
        print(f"jaxgpt: {_sentence(fatal)}", file=sys.stderr)
        return PEER_ENDED
    if os.WIFSIGNALED(status):  # and so does this process, for whoever looks at its end
        number = os.WTERMSIG(status)
        if number in _SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    return os.waitstatus_to_exitcode(status)


def _sentence(fatal: bytes) -> str:
    gone = re.findall(rb"(?:task:|^)(\d+)\s*$", fatal.split(_FATAL)[-1].split(b"RPC:")[0], re.MULTILINE)
    if b"RegisterTask" in fatal:
        return "not every process of the cluster came; look at the output of the others and start all again."
    who = "the first process" if b"leader task" in fatal else "another process"
    if gone:
        who = f"another process ({', '.join(sorted({n.decode() for n in gone}, key=int))})"
    return (
        f"{who} ended or cannot be reached any more, and its own output says why; "
        "run the same command again: a training run goes on from its last checkpoint."
    )


# -------------------------------------------------------------------------------------- the parent


class _Said:
    """What the runtime of the child says, passed on to standard error but for its last words.

    These begin where the coordination service says that something is wrong; they are passed on a
    little later if the child lives on or ends for another reason.
    """

    WAIT = 2.0

    def __init__(self, source: int) -> None:
        self._source, self._held = source, b""
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        while True:
            if self._held and not select.select([self._source], [], [], self.WAIT)[0]:
                self._pass_on()
            if not (piece := os.read(self._source, 65536)):
                return
            self._held += piece
            if b"coordination_service" not in self._held and _FATAL not in self._held:
                self._pass_on()

    def _pass_on(self) -> None:
        held, self._held = self._held, b""
        with contextlib.suppress(OSError):  # nobody listens any more: the child must not wait for that
            while held:
                held = held[os.write(2, held) :]

    def end(self) -> bytes:
        """The child's last words if another process ended it; else they are passed on."""
        self._thread.join(self.WAIT)  # a process that the child left behind may hold the pipe open
        if _FATAL in self._held:
            return self._held
        self._pass_on()
        return b""


# --------------------------------------------------------------------------------------- the child


def _work(work: Callable[[], int], runtime_output: int) -> int:
    """Standard output and error stay Python's; what the runtime writes there goes to the parent."""
    sys.stdout.flush()
    sys.stdout = os.fdopen(os.dup(1), "w", encoding="utf-8", errors=sys.stdout.errors)
    sys.stderr = steady_text(os.dup(2), sys.stderr)
    for number in (1, 2):
        os.dup2(runtime_output, number)
    os.close(runtime_output)
    _end_with_the_parent()
    try:
        code = work()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(bool(error.code))
    except BaseException as error:
        if _may_be_peers(error):
            time.sleep(HEARTBEAT + 10)  # the runtime ends this process if another one is gone
        traceback.print_exc()
        code = 1
    if code in _DONE:
        return code
    # JAX would wait for the others at exit, and they may wait for this one in a collective. Those that
    # make the same mistake come to say so themselves while the first one, which serves them, is there.
    time.sleep(2)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _end_with_the_parent() -> None:
    """Linux ends this process where the parent is killed, even one that was halted."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _may_be_peers(error: BaseException | None) -> bool:
    """Whether a collective failed, or something that did because of it: another process may be gone."""
    while error is not None:
        text = str(error)
        if any(word in text for word in ("Gloo", "NCCL", "UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED")):
            return True
        error = error.__cause__ or error.__context__
    return False
