"""A stream of classified texts: windows, the share that is counted, and alarms by a control chart."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxgpt.evals.control_charts import Chart, Charting, make_chart, run_length_at

KEPT = 1000
"""Windows and alarms that the page shows."""
EXAMPLES, SHOWN = 3, 200
"""Texts of an alarm, and characters of each."""


class Scored(NamedTuple):
    """A text of the stream: its label and the probability of what is counted."""

    text: str
    label: str
    counted: bool
    score: float


class Window(NamedTuple):
    """What a window of the stream came to.

    Attributes:
      number: from 1.
      time: when it was full, in seconds since 1970.
      counted: texts of it that are counted.
      share: `counted` of all its texts.
      statistic: the chart's after it.
      alarm: whether that is above the limit.
    """

    number: int
    time: float
    counted: int
    share: float
    statistic: float
    alarm: bool


class Status(NamedTuple):
    """Where a monitor stands.

    Attributes:
      texts: seen so far, each label's number of them.
      share: of the baseline; None while it is learned.
      chart: of that share.
      windows, events: the newest ones.
      alarm: whether an alarm is on.
      alarms: begun so far.
    """

    texts: dict[str, int]
    share: float | None
    chart: Chart | None
    windows: tuple[Window, ...]
    events: tuple[dict[str, Any], ...]
    alarm: bool
    alarms: int


class Monitor:
    """Windows of a stream on a control chart.

    The first `learn` texts give the share that is usual, where none is given; nothing can alarm before. An
    alarm begins with the window that brings the statistic above its limit, and is over with the first one
    after which it is not.

    Args:
      how: the chart.
      share: that is usual; None learns it.
      learn: texts that it is learned from.
      tell: is given each event, a JSON object: `ready`, `window`, `alarm` and `over`. It is called in the
        thread of `add`.
    """

    def __init__(
        self, how: Charting, share: float | None, learn: int, tell: Callable[[dict[str, Any]], None]
    ) -> None:
        self.how, self._learn, self._tell = how, learn, tell
        self._lock = threading.Lock()
        self._texts: dict[str, int] = {}
        self._open: list[Scored] = []
        self._learned, self._learned_counted = 0, 0
        self._windows: deque[Window] = deque(maxlen=KEPT)
        self._events: deque[dict[str, Any]] = deque(maxlen=KEPT)
        self._count, self._alarms, self._alarm = 0, 0, False
        self._share, self._statistic = share, 0.0
        self._chart: Chart | None = None
        if share is not None:
            self._set(share)

    def add(self, scored: Sequence[Scored]) -> None:
        """Take texts in the order in which they came."""
        for one in scored:
            with self._lock:
                self._texts[one.label] = self._texts.get(one.label, 0) + 1
                events = self._learning(one) if self._chart is None else self._charting(one, self._chart)
                self._events += [event for event in events if event["event"] != "window"]
            for event in events:
                self._tell(event)

    def status(self) -> Status:
        """Where it stands; from any thread."""
        with self._lock:
            kept = tuple(self._windows), tuple(self._events)
            return Status(dict(self._texts), self._share, self._chart, *kept, self._alarm, self._alarms)

    def _learning(self, one: Scored) -> list[dict[str, Any]]:
        self._learned += 1
        self._learned_counted += one.counted
        if self._learned < self._learn:
            return []
        share = (self._learned_counted + 0.5) / (self._learned + 1)  # Jeffreys: never 0, never 1
        chart = self._set(share)
        error = (share * (1 - share) / self._learned) ** 0.5
        ends = [min(max(share + k * error, 1e-6), 1 - 1e-6) for k in (1.96, -1.96)]
        between = [round(run_length_at(chart, self.how, end), 1) for end in ends]
        # the share is an estimate, and so is how often a false alarm comes
        return [self._event("ready", share=round(share, 4), false_alarm_every=between)]

    def _set(self, share: float) -> Chart:
        self._share, self._chart = share, (chart := make_chart(self.how, share))
        self._statistic = chart.start
        return chart

    def _charting(self, one: Scored, chart: Chart) -> list[dict[str, Any]]:
        self._open.append(one)
        if len(self._open) < self.how.window:
            return []
        texts, self._open = self._open, []
        counted = sum(text.counted for text in texts)
        self._statistic, before = chart.add(self._statistic, counted), self._alarm
        self._alarm, self._count = self._statistic > chart.limit, self._count + 1
        window = Window(self._count, time.time(), counted, counted / len(texts), self._statistic, self._alarm)
        self._windows.append(window)
        about = {"window": self._count, "texts": len(texts), "counted": counted, "share": window.share}
        about |= {"usual": self._share, "statistic": self._statistic, "limit": chart.limit}
        events = [self._event("window", **about, alarm=self._alarm)]
        if self._alarm and not before:
            self._alarms += 1
            surest = sorted((t for t in texts if t.counted), key=lambda t: -t.score)[:EXAMPLES]
            events.append(self._event("alarm", **about, examples=[t.text[:SHOWN] for t in surest]))
        elif before and not self._alarm:
            events.append(self._event("over", **about))
        return events

    def _event(self, name: str, **about: Any) -> dict[str, Any]:
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        rounded = {key: round(v, 6) if isinstance(v, float) else v for key, v in about.items()}
        return {"event": name, "time": now, **rounded}
