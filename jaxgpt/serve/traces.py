"""OpenTelemetry traces: one span a request, sent to a collector over OTLP.

Names follow the semantic conventions of generative AI (`gen_ai.*`). Nothing of a request's texts is sent.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from jaxgpt.serve.seams import Exchange, Usage

OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
}
"""Of the conventions, by address; others go by their address."""


class Traces:
    """Spans of requests: a `seams.Observer`.

    Args:
      endpoint: of a collector, such as `http://localhost:4318`; spans go to `/v1/traces` there.
      model: name of the service's model.
    """

    def __init__(self, endpoint: str, model: str) -> None:
        exporter = OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces", timeout=5)
        self._provider = TracerProvider(resource=Resource.create({"service.name": "jaxgpt"}))
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("jaxgpt.serve")
        self._model = model

    def open(self, exchange: Exchange) -> TracedRequest:
        """As `seams.Observer`."""
        operation = OPERATIONS.get(exchange.path, exchange.path)
        span = self._tracer.start_span(
            f"{operation} {self._model}",
            context=TraceContextTextMapPropagator().extract({"traceparent": exchange.trace}),
            kind=SpanKind.SERVER,
            attributes={
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": "jaxgpt",
                "gen_ai.request.model": exchange.model[:200],
                "gen_ai.request.stream": exchange.stream,
                "http.route": exchange.path,
                "jaxgpt.adapter": exchange.adapter[:200],
                "jaxgpt.request_id": exchange.id,
            },
        )
        return TracedRequest(span)

    def refused(self, path: str, status: int, request_id: str) -> None:
        """As `seams.Observer`: what never was a request has no span."""

    def close(self) -> None:
        """Send what is left, as long as that takes no more than a few seconds."""
        self._provider.shutdown()


class TracedRequest:
    """One request: a `seams.Watch`."""

    def __init__(self, span: Span) -> None:
        self._span, self._began, self._first = span, time.perf_counter(), True

    def token(self, choice: int) -> None:
        """As `seams.Watch`."""
        if self._first:
            self._first = False
            seconds = time.perf_counter() - self._began
            self._span.set_attribute("gen_ai.response.time_to_first_chunk", seconds)

    def close(
        self, status: int, usage: Usage, reasons: Sequence[str] = (), error: str = "", filtered: str = ""
    ) -> None:
        """As `seams.Watch`."""
        self._span.set_attributes(
            {
                "http.response.status_code": status,
                "gen_ai.usage.input_tokens": usage.prompt,
                "gen_ai.usage.output_tokens": usage.completion,
                "gen_ai.response.finish_reasons": list(reasons),
            }
        )
        if status >= 500:
            self._span.set_attribute("error.type", str(status))
            self._span.set_status(StatusCode.ERROR)
        self._span.end()
