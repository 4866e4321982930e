"""What a service tells Prometheus: an engine's load, and the times, tokens and ends of requests.

Names and units follow Prometheus's conventions (seconds, `_total`); `launch/monitoring` reads them. Each
service has a registry of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import choose_encoder
from prometheus_client.gc_collector import GCCollector
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from jaxgpt import __version__
from jaxgpt.sample.request import Load
from jaxgpt.serve.seams import Exchange, Usage

OTHER = "other"
"""Label of what a client may name as it likes, so that no client can make more series."""
PATHS = frozenset(
    (
        "/v1/models",
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/embeddings",
        "/v1/classify",
        "/tokenize",
        "/detokenize",
        "/tokenizer_info",
        "/score",
        "/metrics",
    )
)
"""Addresses that are counted by themselves."""
FIRST_TOKEN = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64)
NEXT_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)
REQUEST = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
"""Upper bounds of the histograms, in seconds."""
GAUGES = {
    "queued": ("jaxgpt_requests_queued", "Requests that wait for a slot"),
    "running": ("jaxgpt_requests_running", "Requests that have a slot"),
    "slots": ("jaxgpt_slots", "Requests that can run at once"),
    "pages_used": ("jaxgpt_pages_used", "Pages of the key-value cache that running requests hold"),
    "pages": ("jaxgpt_pages", "Pages of the key-value cache"),
}
"""Fields of `Load` that rise and fall: name of the metric, and what it is."""
COUNTERS = {
    "steps": ("jaxgpt_steps", "Decode steps"),
    "prompt_tokens": ("jaxgpt_engine_prompt_tokens", "Tokens of prompts that got a slot"),
    "shared_tokens": ("jaxgpt_engine_shared_tokens", "Of these, found in the cache"),
    "new_tokens": ("jaxgpt_engine_new_tokens", "Tokens that were generated"),
    "preemptions": ("jaxgpt_preemptions", "Requests that lost their slot and are computed anew"),
    "proposed": ("jaxgpt_proposed_tokens", "Tokens that speculation proposed"),
    "accepted": ("jaxgpt_accepted_tokens", "Of these, kept"),
}
"""Fields of `Load` that only rise."""


class EngineNumbers(Collector):
    """`Load`, read when Prometheus asks."""

    def __init__(self, model: str, load: Callable[[], Load]) -> None:
        self._model, self._load = model, load

    def collect(self) -> Iterator[Metric]:
        numbers = self._load()._asdict()
        for kind, families in ((GAUGES, GaugeMetricFamily), (COUNTERS, CounterMetricFamily)):
            for field, (name, about) in kind.items():
                family = families(name, about, labels=["model"])
                family.add_metric([self._model], numbers[field])
                yield family


class Page(NamedTuple):
    """What `/metrics` answers."""

    body: bytes
    content_type: str


class Metrics:
    """The numbers of one service: a `seams.Observer`.

    Args:
      model: its name in the API.
      adapters: names of its adapters.
      load: of its engine; None where it has none.
    """

    def __init__(
        self,
        model: str,
        adapters: Iterable[str],
        load: Callable[[], Load] | None,
    ) -> None:
        self.registry = registry = CollectorRegistry()
        self._model, self._adapters = model, frozenset(("", *adapters))
        ProcessCollector(registry=registry)
        GCCollector(registry=registry)
        if load is not None:
            registry.register(EngineNumbers(model, load))
        about = Gauge("jaxgpt_info", "Version of jaxgpt", ["version", "model"], registry=registry)
        about.labels(__version__, model).set(1)
        whose = ["path", "model", "adapter"]
        self.requests = Counter(
            "jaxgpt_requests", "Requests that ended, by status", [*whose, "status"], registry=registry
        )
        self.open_requests = Gauge(
            "jaxgpt_requests_open", "Requests that have not ended", whose, registry=registry
        )
        self.answers = Counter(
            "jaxgpt_answers", "Answers that ended, by finish_reason", [*whose, "reason"], registry=registry
        )
        self.prompt_tokens = Counter("jaxgpt_prompt_tokens", "Tokens of requests", whose, registry=registry)
        self.completion_tokens = Counter(
            "jaxgpt_completion_tokens", "Tokens of answers", whose, registry=registry
        )
        self.filter_hits = Counter(
            "jaxgpt_filter_hits",
            "Places that a filter found",
            ["direction", "filter", "action", "model"],
            registry=registry,
        )
        self.first_token = Histogram(
            "jaxgpt_time_to_first_token_seconds",
            "From a request's admission to its first token",
            whose,
            buckets=FIRST_TOKEN,
            registry=registry,
        )
        self.next_token = Histogram(
            "jaxgpt_inter_token_seconds",
            "Between two tokens of an answer",
            whose,
            buckets=NEXT_TOKEN,
            registry=registry,
        )
        self.seconds = Histogram(
            "jaxgpt_request_seconds",
            "From a request's admission to its end",
            whose,
            buckets=REQUEST,
            registry=registry,
        )

    def open(self, exchange: Exchange) -> Watched:
        """As `seams.Observer`."""
        return Watched(self, self._path(exchange.path), self._model, self._adapter(exchange.adapter))

    def refused(self, path: str, status: int, request_id: str) -> None:
        """As `seams.Observer`."""
        self.requests.labels(self._path(path), self._model, "", str(status)).inc()

    def close(self) -> None:
        """As `seams.Observer`: nothing is left to do."""

    def hit(self, direction: str, check: str, action: str) -> None:
        """A filter found something.

        Args:
          direction: `in` or `out`.
          check: which one.
          action: what became of it.
        """
        self.filter_hits.labels(direction, check, action, self._model).inc()

    def page(self, accept: str = "") -> Page:
        """All numbers, in the format that the header `accept` asks for."""
        encode, content_type = choose_encoder(accept)
        return Page(encode(self.registry), content_type)

    def _path(self, path: str) -> str:
        return path if path in PATHS else OTHER

    def _adapter(self, adapter: str) -> str:
        return adapter if adapter in self._adapters else OTHER


class Watched:
    """One request, measured: a `seams.Watch`."""

    def __init__(self, metrics: Metrics, *whose: str) -> None:
        self._metrics, self._whose = metrics, whose
        self._began = time.perf_counter()
        self._last: dict[int, float] = {}
        self._next_token = metrics.next_token.labels(*whose)
        self._open = metrics.open_requests.labels(*whose)
        self._open.inc()

    def token(self, choice: int) -> None:
        """As `seams.Watch`."""
        now = time.perf_counter()
        if not self._last:
            self._metrics.first_token.labels(*self._whose).observe(now - self._began)
        if choice in self._last:
            self._next_token.observe(now - self._last[choice])
        self._last[choice] = now

    def close(
        self, status: int, usage: Usage, reasons: Sequence[str] = (), error: str = "", filtered: str = ""
    ) -> None:
        """As `seams.Watch`."""
        metrics, whose = self._metrics, self._whose
        self._open.dec()
        metrics.seconds.labels(*whose).observe(time.perf_counter() - self._began)
        metrics.requests.labels(*whose, str(status)).inc()
        metrics.prompt_tokens.labels(*whose).inc(usage.prompt)
        metrics.completion_tokens.labels(*whose).inc(usage.completion)
        for reason in reasons:
            metrics.answers.labels(*whose, reason).inc()
