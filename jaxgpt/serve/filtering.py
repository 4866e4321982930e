"""What may pass: checks both ways and the audit log, as the seam `Filters` of a service."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jaxgpt.config.checks import Checks, read_checks
from jaxgpt.serve.audit import AuditLog
from jaxgpt.serve.checks import Hit
from jaxgpt.serve.errors import Refused
from jaxgpt.serve.keys import redacted
from jaxgpt.serve.screen import Screen, Screens
from jaxgpt.serve.seams import Exchange, Filters, Outflow, Passage, Unfiltered
from jaxgpt.text.filters import masked, personal_data

log = logging.getLogger(__name__)

OnHit = Callable[[str, str, str], None]
"""Counts a place that a check found: `in` or `out`, the check, its action."""
SHOWN = 200
"""Characters of a text in the audit log."""
_AHEAD = 4 * SHOWN
"""Characters that are looked at for these."""
DECISIONS = {"refuse": "refused", "mask": "masked", "flag": "flagged"}
"""Of a request, by the strongest action that was taken; else it is `allowed`."""


def make_filters(filters: str, audit: str, on_hit: OnHit = lambda *_: None) -> Filters:
    """The filters of a service.

    Args:
      filters: file of `Checks`; empty for none.
      audit: file of the audit log; empty for none.
      on_hit: counts what checks find.

    Raises:
      UserError: a file cannot be read or written, or a package is not installed.
    """
    if not (filters or audit):
        return Unfiltered()
    checks = read_checks(Path(filters)) if filters else Checks()
    personal_data("")  # the audit log is masked: a missing package is told at once
    return Filtering(Screens(checks), AuditLog(Path(audit)) if audit else None, on_hit)


@dataclass
class Filtering:
    """Checks of prompts and answers; each request's decision is logged.

    While the log cannot be written, requests are refused.

    Attributes:
      screens: the checks.
      audit: the log.
      on_hit: counts what they find.
      failed: why the log could not be written last; empty where it could.
    """

    screens: Screens
    audit: AuditLog | None = None
    on_hit: OnHit = lambda *_: None
    failed: str = ""

    @property
    def changes_output(self) -> bool:
        """As `seams.Filters`."""
        return self.screens.changes_answers

    def open(self, exchange: Exchange) -> Passing:
        """As `seams.Filters`."""
        return Passing(self, exchange)

    def write(self, passing: Passing, status: int) -> None:
        """Log the end of a request."""
        if self.audit is None:
            return
        try:
            self.audit.append(passing.record(status))
            self.failed = ""
        except OSError as error:
            self.failed = error.strerror or str(error)
            log.error("the audit log cannot be written (%s): requests are refused until it can", self.failed)

    def close(self) -> None:
        """Let another process write the log."""
        if self.audit is not None:
            self.audit.close()


@dataclass
class Passing:
    """One request under the filters: the seam `Guard`."""

    filtering: Filtering
    exchange: Exchange
    _system: str = ""
    _last: str = ""
    _hits: list[tuple[str, Hit]] = field(default_factory=list)
    _answers: list[Answer] = field(default_factory=list)

    def enter(self, passages: Sequence[Passage]) -> list[str]:
        """As `seams.Guard`.

        Raises:
          Refused: 400 a check refuses a text, 503 the log cannot be written.
        """
        if self.filtering.failed:
            raise Refused(503, "the audit log cannot be written now; try again soon.", retry_after=10)
        self._last = passages[-1].text if passages else ""
        screened = [self.filtering.screens.prompt(passage.text) for passage in passages]
        self._hits = [("in", hit) for one in screened for hit in one.hits]
        refusing = sorted({hit.check for _, hit in self._hits if hit.action == "refuse"})
        if refusing:
            raise Refused(
                400,
                f"the prompt was refused by this server's filters ({', '.join(refusing)}); change it.",
                code="content_filter",
            )
        texts = [one.text for one in screened]
        self._system = "\n".join(
            text for text, one in zip(texts, passages, strict=True) if one.role == "system"
        )
        return texts

    def leave(self) -> Outflow:
        """As `seams.Guard`."""
        answer = Answer(self.filtering.screens.answer(self._system))
        self._answers.append(answer)
        return answer

    def close(self, status: int) -> None:
        """As `seams.Guard`."""
        self._hits += [("out", hit) for answer in self._answers for hit in answer.screen.hits]
        for direction, hit in self._hits:
            self.filtering.on_hit(direction, hit.check, hit.action)
        self.filtering.write(self, status)

    def record(self, status: int) -> dict[str, object]:
        """What is logged: who asked what, what was found, and beginnings of texts without personal data."""
        found = Counter((way, hit.check, hit.kind, hit.action) for way, hit in self._hits)
        actions = {hit.action for _, hit in self._hits}
        decision = next((DECISIONS[one] for one in DECISIONS if one in actions), "allowed")
        asked = self.exchange
        return {
            "request": asked.id,
            "client": asked.client.name,
            "path": asked.path,
            "model": asked.model,
            "status": status,
            "decision": decision,
            "found": [
                {"way": way, "check": check, "kind": kind, "action": action, "times": times}
                for (way, check, kind, action), times in found.items()
            ],
            "prompt": beginning(self._last),
            "answers": [beginning(answer.shown) for answer in self._answers],
        }


@dataclass
class Answer:
    """One answer on its way out: the seam `Outflow`.

    Attributes:
      screen: its checks.
      shown: its beginning, as it was given.
    """

    screen: Screen
    shown: str = ""

    @property
    def stopped(self) -> str:
        """As `seams.Outflow`: the check that refused it."""
        refusing = (hit.check for hit in self.screen.hits if hit.action == "refuse")
        return next(refusing, "") if self.screen.refused else ""

    def feed(self, text: str) -> str:
        """As `seams.Outflow`."""
        return self._noted(self.screen.feed(text))

    def flush(self) -> str:
        """As `seams.Outflow`."""
        return self._noted(self.screen.finish())

    def _noted(self, text: str) -> str:
        if len(self.shown) < _AHEAD:
            self.shown += text[: _AHEAD - len(self.shown)]
        return text


def beginning(text: str) -> str:
    """The beginning of a text without personal data and keys, for a log."""
    part = redacted(text[:_AHEAD])
    return masked(part, personal_data(part))[:SHOWN]
