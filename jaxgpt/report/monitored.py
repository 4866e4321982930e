"""The page of a monitored stream: shares by window, the chart's statistic and its limit, alarms."""

from __future__ import annotations

from typing import Any

from jaxgpt.report.charts import chart, smooth
from jaxgpt.report.page import Html, facts, figure, render, table

HALF = 3
"""Windows on either side in the running mean of shares."""


def monitor_page(status: Any, how: Any, label: str) -> str:
    """The page as HTML, without script.

    Args:
      status: `jaxgpt.serve.stream_monitor.monitor.Status`.
      how: `jaxgpt.evals.control_charts.Charting`.
      label: what is counted.
    """
    texts = sum(status.texts.values())
    tiles: dict[str, Any] = {
        "state": "alarm" if status.alarm else "quiet" if status.chart else "learning what is usual",
        "texts": (texts, ", ".join(f"{name}: {count:,}" for name, count in sorted(status.texts.items()))),
        "alarms": status.alarms,
    }
    sections: list[list[str]] = [["Now", facts(tiles)]]
    if status.chart is not None:
        tiles |= {
            f"usual share of {label}": status.share,
            "windows between false alarms": (status.chart.run_length, f"of {how.window} texts, on average"),
        }
        sections = [["Now", facts(tiles)], _charts(status, how, label)]
    if status.events:
        sections.append(["Events", _events(status.events)])
    return render("Monitored texts", sections)


def _charts(status: Any, how: Any, label: str) -> list[str]:
    windows = status.windows
    if not windows:
        return ["Windows", f"The first window of {how.window} texts is not full yet."]
    alarms = [(w.number, 0.0) for w in windows if w.alarm]
    shares, ends = [(w.number, w.share) for w in windows], (windows[0].number, windows[-1].number)
    lines = {"raw": shares, "mean": smooth(shares, HALF), "skips": alarms}
    limit = {
        "raw": [(n, status.chart.limit) for n in ends],
        "mean": [(w.number, w.statistic) for w in windows],
    }
    return [
        "Windows",
        Html(figure(f"share of {label}", "by window; line: running mean", chart("share", lines, zero=True))),
        Html(figure(how.chart, "its statistic; faint: limit", chart(how.chart, limit | {"skips": alarms}))),
    ]


def _events(events: Any) -> Html:
    rows = [
        {
            "time": event["time"],
            "event": event["event"],
            "window": event.get("window"),
            "share": event["share"],
            "examples": " | ".join(event.get("examples", ())) or None,
        }
        for event in reversed(events[-50:])
    ]
    return table(rows, "newest first")
