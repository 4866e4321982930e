"""Texts on their way to a monitor: from files, standard input or a webhook, through one queue to a
classifier.
"""

from __future__ import annotations

import itertools
import logging
import queue
from collections.abc import Callable, Iterable, Sequence
from typing import IO

from jaxgpt.config import Labelled
from jaxgpt.data.lines import as_object, check_text, decode_line, field_of, parse_line
from jaxgpt.data.sources import expand
from jaxgpt.evals.predict_files import read_source
from jaxgpt.serve.errors import Refused

log = logging.getLogger(__name__)

ROOM = 64
"""Batches of texts that wait; a webhook that brings another one is refused."""


class Feed:
    """A queue of batches of texts, which a file fills as fast as it is emptied and a webhook while there is
    room.
    """

    def __init__(self, room: int = ROOM) -> None:
        self._queue: queue.Queue[Sequence[str] | None] = queue.Queue(room)

    def put(self, texts: Iterable[str], size: int = 1) -> None:
        """Add texts, so many at a time, waiting for room."""
        texts = iter(texts)
        while batch := list(itertools.islice(texts, size)):
            self._queue.put(batch)

    def offer(self, texts: Sequence[str]) -> None:
        """Add these texts, or none of them.

        Raises:
          Refused: 429, there is no room now.
        """
        try:
            self._queue.put_nowait(texts)
        except queue.Full:
            why = f"{self.waiting} batches of texts wait, and no more may; send these later."
            raise Refused(429, why, code="queue_full", retry_after=1) from None

    def end(self) -> None:
        """No more texts come."""
        self._queue.put(None)

    @property
    def waiting(self) -> int:
        """Batches that wait."""
        return self._queue.qsize()

    def drain(self, most: int, take: Callable[[Sequence[str]], None]) -> None:
        """Give texts to `take` until the end: as many as wait, at most so many at a time."""
        ended = False
        while not ended and (first := self._queue.get()) is not None:
            texts = list(first)
            while len(texts) < most and not ended:
                try:
                    more = self._queue.get_nowait()
                except queue.Empty:
                    break
                texts += more or ()
                ended = more is None
            for at in range(0, len(texts), most):
                take(texts[at : at + most])


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
