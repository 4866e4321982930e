"""Metrics, logs and traces of requests, as Prometheus, a log reader and a collector see them."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from jaxgpt.errors import UserError
from jaxgpt.sample.request import Load
from jaxgpt.serve.logs import JsonFormatter
from jaxgpt.serve.metrics import Metrics
from jaxgpt.serve.monitoring import monitor
from jaxgpt.serve.seams import Client, Exchange, Observer, Usage

LOAD = Load(
    queued=3,
    running=2,
    slots=8,
    pages_used=5,
    pages=64,
    steps=100,
    prompt_tokens=40,
    shared_tokens=16,
    new_tokens=90,
    preemptions=1,
    proposed=10,
    accepted=7,
)


def exchange(**changes: Any) -> Exchange:
    fields = {"id": "r1", "path": "/v1/chat/completions", "client": Client("ada"), "model": "small"}
    return Exchange(**fields | changes)


def values(metrics: Metrics) -> dict[tuple[str, ...], float]:
    """Each sample by its name and the values of its labels."""
    families = metrics.registry.collect()
    return {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}


def ask(observer: Observer, status: int = 200, **changes: Any) -> None:
    """A request of two choices, of two tokens and one."""
    watch = observer.open(exchange(**changes))
    for choice in (0, 1, 0):
        watch.token(choice)
    watch.close(status, Usage(5, 3), ("stop", "length"))


def test_load_is_read_when_it_is_asked_for() -> None:
    now = [LOAD]
    metrics = Metrics("small", (), lambda: now[0])
    assert values(metrics)["jaxgpt_requests_queued", "small"] == 3
    now[0] = LOAD._replace(queued=0, steps=101)
    found = values(metrics)
    assert found["jaxgpt_requests_queued", "small"] == 0
    assert found["jaxgpt_steps_total", "small"] == 101
    assert {name for name, *rest in found if rest == ["small"]} >= {"jaxgpt_slots", "jaxgpt_pages_used"}


def test_requests_are_counted_by_path_adapter_and_status() -> None:
    metrics = Metrics("small", ("legal",), None)
    ask(metrics)
    ask(metrics, adapter="legal")
    ask(metrics, status=503)
    metrics.refused("/v1/completions", 401, "r2")
    found, chat = values(metrics), ("/v1/chat/completions", "small")
    assert found["jaxgpt_requests_total", *chat, "", "200"] == 1
    assert found["jaxgpt_requests_total", *chat, "legal", "200"] == 1
    assert found["jaxgpt_requests_total", *chat, "", "503"] == 1
    assert found["jaxgpt_requests_total", "/v1/completions", "small", "", "401"] == 1
    assert found["jaxgpt_prompt_tokens_total", *chat, ""] == 10
    assert found["jaxgpt_completion_tokens_total", *chat, "legal"] == 3
    assert found["jaxgpt_answers_total", *chat, "", "length"] == 2
    assert found["jaxgpt_requests_open", *chat, ""] == 0


def test_tokens_are_timed_within_their_own_choice() -> None:
    metrics = Metrics("small", (), None)
    watch = metrics.open(exchange())
    assert values(metrics)["jaxgpt_requests_open", "/v1/chat/completions", "small", ""] == 1
    for choice in (0, 1, 2, 0):
        watch.token(choice)
    found, labels = values(metrics), ("/v1/chat/completions", "small", "")
    assert found["jaxgpt_time_to_first_token_seconds_count", *labels] == 1
    assert found["jaxgpt_inter_token_seconds_count", *labels] == 1


def test_no_client_can_make_more_series() -> None:
    metrics = Metrics("small", ("legal",), None)
    for i in range(50):
        metrics.refused(f"/{i}", 404, str(i))
        ask(metrics, model=f"m{i}", adapter=f"a{i}")
    assert len(values(metrics)) < 120
    assert values(metrics)["jaxgpt_requests_total", "other", "small", "", "404"] == 50


def test_two_services_share_nothing() -> None:
    one, two = Metrics("one", (), None), Metrics("two", (), None)
    one.hit("out", "personal data", "mask")
    assert values(one)["jaxgpt_filter_hits_total", "out", "personal data", "mask", "one"] == 1
    assert not [key for key in values(two) if "filter" in key[0]]


@pytest.mark.parametrize("accept", ["", "application/openmetrics-text;version=1.0.0"])
def test_the_address_answers_in_the_format_that_is_asked_for(accept: str) -> None:
    monitoring = monitor("small", load=lambda: LOAD)
    app = FastAPI()
    app.include_router(monitoring.router)
    answer = TestClient(app).get("/metrics", headers={"accept": accept})
    kind = "application/openmetrics-text" if accept else "text/plain"
    assert answer.status_code == 200 and answer.headers["content-type"].startswith(kind)
    assert 'jaxgpt_requests_queued{model="small"} 3.0' in answer.text
    assert ("# EOF" in answer.text) == bool(accept)


# ------------------------------------------------------------------------------------------- logs


def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [json.loads(JsonFormatter().format(record)) for record in caplog.records]


def test_a_request_is_one_line_of_json_without_its_text(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "jaxgpt.serve")
    _, log = monitor("small").observers
    watch = log.open(exchange(stream=True))
    watch.token(0)
    watch.close(400, Usage(5, 1), ("stop",), error="'my secret' is no prompt.", filtered="toxicity")
    (line,) = lines(caplog)
    assert line["message"].startswith("400 /v1/chat/completions of ada in 0.")
    assert line["request_id"] == "r1" and line["client"] == "ada" and line["status"] == 400
    assert line["prompt_tokens"] == 5 and line["reasons"] == ["stop"] and line["filtered"] == "toxicity"
    assert 0 <= line["seconds_to_first_token"] <= line["seconds"]
    assert "secret" not in json.dumps(line)


def test_what_fails_in_the_server_is_logged_as_an_error(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "jaxgpt.serve")
    _, log = monitor("small").observers
    log.open(exchange(id="r9")).close(500, Usage(), error="The model's memory ran out.")
    log.refused("/v1/nothing", 404, "r10")
    failed, refused = lines(caplog)
    assert (failed["level"], failed["error"]) == ("error", "The model's memory ran out.")
    assert failed["seconds_to_first_token"] is None
    assert (refused["request_id"], refused["status"], refused["level"]) == ("r10", 404, "info")


def test_other_messages_of_the_request_bear_its_id_too() -> None:
    code = (
        "import asyncio, logging\n"
        "from jaxgpt.serve.logs import RequestLog, log_json\n"
        "from jaxgpt.serve.seams import Client, Exchange\n"
        "log_json()\n"
        "async def answer(name):\n"
        "    RequestLog().open(Exchange(id=name, path='/', client=Client(), model='m'))\n"
        "    await asyncio.sleep(0)\n"
        "    await asyncio.to_thread(logging.getLogger('uvicorn.error').warning, 'slow %s', name)\n"
        "async def both():\n"
        "    await asyncio.gather(answer('a'), answer('b'))\n"
        "asyncio.run(both())\n"
        "try:\n"
        "    1 / 0\n"
        "except ZeroDivisionError:\n"
        "    logging.getLogger('x').exception('two\\nlines')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    one, two, failed = sorted(map(json.loads, done.stderr.splitlines()), key=lambda line: line["message"])
    assert (one["message"], one["request_id"], one["logger"]) == ("slow a", "a", "uvicorn.error")
    assert (two["message"], two["request_id"]) == ("slow b", "b")
    assert "ZeroDivisionError" in failed["exception"] and "request_id" not in failed


# ------------------------------------------------------------------------------------------ traces


@pytest.fixture
def collector() -> Iterator[tuple[str, list[Any]]]:
    """A collector of spans on this machine, and what it got."""
    spans: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            told = ExportTraceServiceRequest.FromString(body)
            spans.extend(s for r in told.resource_spans for scope in r.scope_spans for s in scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", spans
        server.shutdown()
        thread.join()


def test_a_request_is_one_span(collector: tuple[str, list[Any]]) -> None:
    endpoint, spans = collector
    traces = monitor("small", otlp=endpoint + "/").observers[-1]
    caller = "0af7651916cd43dd8448eb211c80319c"
    ask(traces, trace=f"00-{caller}-b7ad6b7169203331-01")
    ask(traces, status=500, path="/score", trace="nonsense")
    traces.close()
    chat, score = sorted(spans, key=lambda span: span.name, reverse=True)
    told = {a.key: a.value for a in chat.attributes}
    assert chat.name == "chat small" and score.name == "/score small"
    assert told["gen_ai.usage.output_tokens"].int_value == 3
    assert told["jaxgpt.request_id"].string_value == "r1"
    assert told["gen_ai.response.time_to_first_chunk"].double_value > 0
    assert [v.string_value for v in told["gen_ai.response.finish_reasons"].array_value.values] == [
        "stop",
        "length",
    ]
    assert (chat.status.code, score.status.code) == (0, 2)
    assert chat.trace_id.hex() == caller != score.trace_id.hex()
    assert chat.parent_span_id.hex() == "b7ad6b7169203331" and not score.parent_span_id


def test_traces_are_off_and_say_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(monitor("small").observers) == 2
    with pytest.raises(UserError, match=r"^--otlp is 'localhost:4318', which is no HTTP address; .*\.$"):
        monitor("small", otlp="localhost:4318")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk", None)
    with pytest.raises(UserError, match=r"^--otlp needs OpenTelemetry, .* `pip install 'jaxgpt\[serve\]'`.$"):
        monitor("small", otlp="http://localhost:4318")
