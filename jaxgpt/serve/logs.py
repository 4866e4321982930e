"""Structured logs: one JSON object a line, each with the id of the request that it belongs to.

No text of a request is logged, and no key: only names, numbers and the sentence of an error of the server.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextvars import ContextVar
from datetime import UTC, datetime

from jaxgpt.files import to_json
from jaxgpt.serve.keys import redacted
from jaxgpt.serve.seams import Exchange, Usage

log = logging.getLogger("jaxgpt.serve")
REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")
"""Of the request that the running task answers; threads that it waits for have it too."""
FIELDS = "fields"
"""Name of the attribute of a log record that holds more fields of its object."""


class JsonFormatter(logging.Formatter):
    """A record as JSON: `time` (UTC), `level`, `logger`, `message`, `request_id`, then the record's
    fields.
    """

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if request_id := REQUEST_ID.get():
            line["request_id"] = request_id
        line |= getattr(record, FIELDS, {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return to_json(line)


def log_json() -> None:
    """Write what is logged to standard error as JSON, uvicorn's messages too."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for name in ("uvicorn", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [], True


class RequestLog:
    """A line for each request as it ends: a `seams.Observer`."""

    def open(self, exchange: Exchange) -> LoggedRequest:
        """As `seams.Observer`."""
        REQUEST_ID.set(exchange.id)
        return LoggedRequest(exchange)

    def refused(self, path: str, status: int, request_id: str) -> None:
        """As `seams.Observer`."""
        shown = redacted(path)[:200]
        fields = {"request_id": request_id, "path": shown, "status": status}
        log.info("%d %r refused", status, shown, extra={FIELDS: fields})

    def close(self) -> None:
        """As `seams.Observer`: nothing is left to do."""


class LoggedRequest:
    """One request: a `seams.Watch`."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange, self._began = exchange, time.perf_counter()
        self._first: float | None = None

    def token(self, choice: int) -> None:
        """As `seams.Watch`."""
        if self._first is None:
            self._first = time.perf_counter()

    def close(
        self, status: int, usage: Usage, reasons: Sequence[str] = (), error: str = "", filtered: str = ""
    ) -> None:
        """As `seams.Watch`."""
        exchange, seconds = self._exchange, time.perf_counter() - self._began
        fields = {
            "request_id": exchange.id,
            "path": exchange.path,
            "status": status,
            "client": exchange.client.name,
            "model": exchange.model[:200],
            "adapter": exchange.adapter[:200],
            "stream": exchange.stream,
            "seconds": round(seconds, 6),
            "seconds_to_first_token": None if self._first is None else round(self._first - self._began, 6),
            "prompt_tokens": usage.prompt,
            "completion_tokens": usage.completion,
            "reasons": list(reasons),
        }
        if status >= 500:
            fields["error"] = error
        if filtered:
            fields["filtered"] = filtered
        log.log(
            logging.ERROR if status >= 500 else logging.INFO,
            "%d %s of %s in %.3f s: %d + %d tokens",
            *(status, exchange.path, exchange.client.name, seconds, usage.prompt, usage.completion),
            extra={FIELDS: fields},
        )
