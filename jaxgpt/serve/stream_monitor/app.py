"""The web side of a monitor: a webhook that takes texts, metrics for Prometheus, and a page."""

from __future__ import annotations

import hmac
from collections.abc import Iterator

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from starlette.exceptions import HTTPException

from jaxgpt.errors import UserError
from jaxgpt.files import parse_json
from jaxgpt.report.monitored import monitor_page
from jaxgpt.serve.errors import Refused, error_body
from jaxgpt.serve.stream_monitor.feed import Feed
from jaxgpt.serve.stream_monitor.monitor import Monitor

MOST_BYTES = 2**20
"""Of a request."""
MOST_TEXTS = 1024
"""In a request."""
REFRESH = "5"
"""Seconds after which the page is asked for again."""


class Texts(msgspec.Struct, forbid_unknown_fields=True):
    """What the webhook takes."""

    texts: list[str]


def monitor_app(monitor: Monitor, feed: Feed, label: str, token: str = "") -> FastAPI:
    """A web application around a monitor.

    Args:
      monitor: what is shown.
      feed: where texts go.
      label: what is counted.
      token: that requests must bring (`Authorization: Bearer TOKEN`); empty for none.
    """
    app = FastAPI(title="jaxgpt monitor", docs_url=None, redoc_url=None)
    registry = CollectorRegistry()
    registry.register(_Collector(monitor, feed))

    @app.middleware("http")
    async def admit(request: Request, go_on):  # noqa: ANN001, ANN202
        given = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
        if token and request.url.path != "/health" and not hmac.compare_digest(given, token.encode()):
            return _refusal(Refused(401, "the token is wrong or missing; send Authorization: Bearer TOKEN."))
        return await go_on(request)

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> JSONResponse:
        return _refusal(error)

    @app.exception_handler(HTTPException)
    async def no_such(request: Request, error: HTTPException) -> JSONResponse:
        return _refusal(Refused(error.status_code, f"{request.method} {request.url.path}: {error.detail}."))

    @app.post("/v1/texts", status_code=202)
    async def texts(request: Request) -> dict[str, int]:
        found = _parse(await _body(request))
        feed.offer(found)
        return {"accepted": len(found)}

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/")
    async def page() -> HTMLResponse:
        return HTMLResponse(monitor_page(monitor.status(), monitor.how, label), headers={"Refresh": REFRESH})

    return app


async def _body(request: Request) -> bytes:
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MOST_BYTES:
            raise Refused(413, f"the body has more than {MOST_BYTES:,} bytes; send fewer texts at a time.")
    return body


def _parse(body: bytes) -> list[str]:
    try:
        found = parse_json(body, Texts, "the body", 'send {"texts": ["...", ...]}').texts
    except UserError as error:
        raise Refused(400, str(error)) from None
    if not 0 < len(found) <= MOST_TEXTS or not all(text.strip() for text in found):
        raise Refused(400, f"texts must hold 1 to {MOST_TEXTS} texts that are not blank.", param="texts")
    return found


def _refusal(error: Refused) -> JSONResponse:
    return JSONResponse(
        error_body(error.status, str(error), error.code, error.param), error.status, error.headers
    )


class _Collector:
    """Reads a monitor's numbers when Prometheus asks."""

    def __init__(self, monitor: Monitor, feed: Feed) -> None:
        self._monitor, self._feed = monitor, feed

    def collect(self) -> Iterator[Metric]:
        status = self._monitor.status()
        texts = CounterMetricFamily("jaxgpt_monitor_texts", "Texts classified, by label", labels=["label"])
        for label, count in status.texts.items():
            texts.add_metric([label], count)
        yield texts
        yield CounterMetricFamily("jaxgpt_monitor_alarms", "Alarms begun", value=status.alarms)
        last = status.windows[-1] if status.windows else None
        gauges = {
            "alarm": ("1 while an alarm is on", float(status.alarm)),
            "waiting": ("Batches of texts that wait to be classified", self._feed.waiting),
            "windows": ("Windows seen", last.number if last else 0),
            "usual_share": ("Share of counted texts that is usual", status.share),
            "limit": ("Limit of the chart's statistic", status.chart.limit if status.chart else None),
            "share": ("Share of counted texts in the newest window", last.share if last else None),
            "statistic": ("The chart's statistic after the newest window", last.statistic if last else None),
        }
        for name, (about, value) in gauges.items():
            if value is not None:
                yield GaugeMetricFamily(f"jaxgpt_monitor_{name}", about, value=value)
