"""Texts on their way to a monitor: from files, standard input or a webhook, through one queue to a classifier."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import IO

from jaxgpt.config import Labelled
from jaxgpt.data.lines import as_object, check_text, decode_line, field_of, parse_line
from jaxgpt.data.sources import expand
from jaxgpt.evals.predict_files import read_source
from jaxgpt.serve.errors import Refused

log = logging.getLogger(__name__)

ROOM = 4096
"""Texts that wait; a webhook that brings more is refused."""


class Feed:
    """A queue of texts, which a file fills as fast as it is emptied and a webhook only while there is room."""

    def __init__(self, room: int = ROOM) -> None:
        self._queue: queue.Queue[str | None] = queue.Queue(room)
        self._room, self._offering = room, threading.Lock()

    def put(self, texts: Iterable[str]) -> None:
        """Add texts, waiting for room."""
        for text in texts:
            self._queue.put(text)

    def offer(self, texts: Sequence[str]) -> None:
        """Add all of these texts at once, or none.

        Raises:
          Refused: 429, there is no room now.
        """
        with self._offering:
            if self._queue.qsize() + len(texts) > self._room:
                raise Refused(
                    429,
                    f"{self.waiting} texts wait and {len(texts)} more are beyond {self._room}; send them "
                    "later.",
                    code="queue_full",
                    retry_after=1,
                )
            self.put(texts)

    def end(self) -> None:
        """No more texts come."""
        self._queue.put(None)

    @property
    def waiting(self) -> int:
        return self._queue.qsize()

    def drain(self, most: int, take: Callable[[Sequence[str]], None]) -> None:
        """Give texts to `take` until the end: as many as wait, at most so many at a time."""
        texts: list[str] = []
        while True:
            try:
                text = self._queue.get(block=not texts)
            except queue.Empty:
                pass  # what came together is enough
            else:
                if text is not None:
                    texts.append(text)
                    if len(texts) < most:
                        continue
                elif not texts:
                    return
                else:
                    self._queue.put(None)
            take(texts)
            texts = []


def read_files(names: Sequence[str], data: Labelled, field: str) -> Iterable[str]:
    """The texts of files, as `jaxgpt predict` reads them, one file after the other.

    Raises:
      UserError: a file that cannot be read.
    """
    for path in expand(names, ("",)):
        for given in read_source(path, data, None, field).texts:
            yield str(given.text)


def read_stream(stream: IO[bytes], field: str) -> Iterable[str]:
    """The texts of a stream of lines, as they come: each line a text, or with `field` a JSON object that has
    it there. What is neither is left out, and said.
    """
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            if field:
                yield check_text(field_of(as_object(parse_line(line)), field), field)
            else:
                yield decode_line(line).rstrip("\r\n")
        except ValueError as error:
            log.warning("line %d of standard input is left out: %s", number, error)
