"""What watches a service, and the address that Prometheus reads."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, NamedTuple

from fastapi import APIRouter, Request, Response

from jaxgpt.errors import UserError, require
from jaxgpt.sample.request import Load
from jaxgpt.serve.logs import RequestLog
from jaxgpt.serve.metrics import Metrics
from jaxgpt.serve.seams import Observer

if TYPE_CHECKING:
    from jaxgpt.serve.traces import Traces


class Monitoring(NamedTuple):
    """Parts of a service."""

    metrics: Metrics
    observers: tuple[Observer, ...]
    router: APIRouter
    """Of `/metrics`."""


def monitor(
    model: str, adapters: Collection[str] = (), load: Callable[[], Load] | None = None, otlp: str = ""
) -> Monitoring:
    """Metrics, a line of log for each request, and traces where a collector is named.

    Args:
      model: name of the service's model.
      adapters: names of its adapters.
      load: of its engine; None where it has none.
      otlp: address of an OpenTelemetry collector; empty for none.

    Raises:
      UserError: OpenTelemetry is not installed, or the collector's address is none.
    """
    metrics = Metrics(model, adapters, load)
    observers: tuple[Observer, ...] = (metrics, RequestLog())
    if otlp:
        observers += (traces(otlp, model),)
    return Monitoring(metrics, observers, metrics_router(metrics))


def metrics_router(metrics: Metrics) -> APIRouter:
    """The address `/metrics`."""
    router = APIRouter()

    @router.get("/metrics", summary="Numbers for Prometheus", response_class=Response)
    def read_metrics(request: Request) -> Response:
        page = metrics.page(request.headers.get("accept", ""))
        return Response(page.body, media_type=page.content_type)

    return router


def traces(endpoint: str, model: str) -> Traces:
    """Traces that are sent to a collector.

    Raises:
      UserError: OpenTelemetry is not installed, or the endpoint is no address.
    """
    require(
        endpoint.startswith(("http://", "https://")),
        f"--otlp is {endpoint!r:.200}, which is no HTTP address; give one such as http://localhost:4318.",
    )
    try:
        import opentelemetry.exporter.otlp.proto.http
        import opentelemetry.sdk  # noqa: F401
    except ImportError:
        raise UserError(
            "--otlp needs OpenTelemetry, which is not installed; run `pip install 'jaxgpt[serve]'`."
        ) from None
    from jaxgpt.serve.traces import Traces

    return Traces(endpoint, model)
