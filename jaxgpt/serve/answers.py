"""The engine's pieces as answers: through the filters, tool calls told from text, until their end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Sequence
from functools import partial
from typing import NamedTuple

from anyio.to_thread import run_sync

from jaxgpt.sample.request import Piece, Request
from jaxgpt.serve.errors import Refused
from jaxgpt.serve.seams import Outflow
from jaxgpt.serve.service import Engine, Handle
from jaxgpt.serve.session import Session
from jaxgpt.serve.tools import Call, CallReader


class Delta(NamedTuple):
    """What became certain of an answer.

    Attributes:
      choice: number of the answer.
      text: more of it.
      calls: tools that it calls.
      pieces: tokens made.
      finish: why it ended; empty until then.
    """

    choice: int
    text: str = ""
    calls: tuple[Call, ...] = ()
    pieces: tuple[Piece, ...] = ()
    finish: str = ""


class Answer:
    """One answer on its way.

    Args:
      choice: its number.
      outflow: the filters on its way.
      reader: tells calls of tools from text; None where none may be called.
    """

    def __init__(self, choice: int, outflow: Outflow, reader: CallReader | None) -> None:
        self.choice, self._outflow, self._reader = choice, outflow, reader
        self.stopped = ""
        """Why it must not go on, though its model would."""

    @property
    def filtered(self) -> str:
        """Why filters ended it; empty where they did not."""
        return self._outflow.stopped

    def feed(self, piece: Piece) -> Delta:
        """What is certain with this piece."""
        text = self._outflow.feed(piece.text)
        ended = piece.finish_reason is not None
        if ended and not self._outflow.stopped:
            text += self._outflow.flush()
        calls: tuple[Call, ...] = ()
        if self._reader is not None:
            text, calls = self._reader.feed(text)
            if ended or self._outflow.stopped:
                more, last = self._reader.flush()
                text, calls = text + more, calls + last
        if self._outflow.stopped:
            self.stopped = "content_filter"
        elif self._reader is not None and self._reader.stopped:
            self.stopped = "tool_calls"
        finish = self.stopped or piece.finish_reason or ""
        if self._reader is not None and self._reader.count and finish == "stop":
            finish = "tool_calls"
        pieces = (piece,) if piece.id >= 0 else ()
        return Delta(self.choice, text, calls, pieces, finish)


class Answers:
    """The answers of one request.

    Args:
      session: the request; counts tokens.
      requests: for the engine, one an answer.
      readers: of calls, one an answer.
    """

    def __init__(
        self, session: Session, requests: Sequence[Request], readers: Sequence[CallReader | None]
    ) -> None:
        self._session = session
        self._answers = [Answer(i, session.guard.leave(), reader) for i, reader in enumerate(readers)]
        self._requests, self._handles = requests, list[Handle]()
        self._made: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()

    async def begin(self, engine: Engine) -> None:
        """Ask the engine.

        Raises:
          UserError: it refuses; nothing is then left running.
        """
        submit = partial(self._submit, engine, asyncio.get_running_loop())
        if any(request.rule is not None for request in self._requests):
            await _kept(submit, self.cancel)  # rules take their time
        else:
            submit()
        for prompt in {id(request.prompt): request.prompt for request in self._requests}.values():
            self._session.prompted(len(prompt))

    def _submit(self, engine: Engine, loop: asyncio.AbstractEventLoop) -> None:

        def emit_to(choice: int, piece: Piece) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and with it who would listen
                loop.call_soon_threadsafe(self._made.put_nowait, (choice, piece))

        try:
            for i, request in enumerate(self._requests):
                self._handles.append(engine.submit(request, lambda piece, i=i: emit_to(i, piece)))
        except BaseException:
            self.cancel()
            raise

    def cancel(self) -> None:
        """Free what is not finished."""
        for handle in self._handles:
            handle.cancel()

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """All deltas, of all answers; closing this frees what is not finished.

        Raises:
          Refused: the engine failed at one.
        """
        waiting = set(range(len(self._answers)))
        try:
            while waiting:
                choice, piece = await self._made.get()
                if choice not in waiting:
                    continue
                if piece.finish_reason in _FAILED:
                    raise _FAILED[piece.finish_reason](self._handles[choice].error)
                if piece.id >= 0:
                    self._session.token(choice)
                delta = self._answers[choice].feed(piece)
                if delta.finish:
                    waiting.discard(choice)
                    if self._answers[choice].stopped:
                        self._handles[choice].cancel()
                    self._session.reasons.append(delta.finish)
                    self._session.filtered = self._answers[choice].filtered or self._session.filtered
                yield delta
        finally:
            self.cancel()


async def _kept(work: Callable[[], None], undo: Callable[[], None]) -> None:
    """Do work in a thread; undone where the request is cancelled meanwhile."""
    try:
        await run_sync(work)
    except BaseException:
        undo()
        raise


def _failed(why: str) -> Refused:
    return Refused(500, why or "the model failed at this answer; try another prompt.", code="failed")


def _cancelled(why: str) -> Refused:
    return Refused(
        503, "the server ended this request before its answer; ask again.", code="cancelled", retry_after=1
    )


_FAILED = {"error": _failed, "cancelled": _cancelled}
"""Ends that are no answers."""
