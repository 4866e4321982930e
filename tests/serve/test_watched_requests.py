"""What metrics and logs say of requests to a real server, against what its clients saw."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tiny_serving import HI, serving, tiny_model

from jaxgpt.sample.engine import Engine
from jaxgpt.serve.app import make_app
from jaxgpt.serve.logs import JsonFormatter
from jaxgpt.serve.monitoring import monitor
from jaxgpt.serve.service import Service

CHAT = "/v1/chat/completions"


@pytest.fixture
def client(engine: Engine) -> Iterator[httpx.Client]:
    """A client of a service that is watched from its first request on."""
    monitoring = monitor("tiny", load=engine.load)
    service = Service(
        name="tiny",
        model=tiny_model(),
        engine=engine,
        observers=monitoring.observers,
        routers=(monitoring.router,),
    )
    with serving(make_app(service)) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


def body(**more: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": HI, "max_tokens": 6, "seed": 1} | more


def total(client: httpx.Client, name: str, **labels: str) -> float:
    """The sum of a metric's samples that have these labels."""
    families = text_string_to_metric_families(client.get("/metrics").text)
    samples = [sample for family in families for sample in family.samples if sample.name == name]
    return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())


def test_metrics_count_what_clients_saw(client: httpx.Client) -> None:
    made = [client.post(CHAT, json=body(n=n)).json() for n in (1, 3)]
    with client.stream("POST", CHAT, json=body(stream=True)) as answer:
        assert answer.read().endswith(b"data: [DONE]\n\n")
    assert client.post(CHAT, json=body(model="huge")).status_code == 404
    assert client.post(CHAT, content=b"{").status_code == 400
    assert client.get("/nowhere").status_code == 404
    with client.stream("POST", CHAT, json=body(stream=True, max_tokens=900)) as answer:
        next(answer.iter_lines())
    until = time.monotonic() + 20
    while total(client, "jaxgpt_requests_open") and time.monotonic() < until:
        time.sleep(0.05)
    seen = {
        status: total(client, "jaxgpt_requests_total", path=CHAT, status=status) for status in ("200", "499")
    }
    assert seen == {"200": 3, "499": 1}
    assert total(client, "jaxgpt_requests_total", path=CHAT, status="404") == 1
    assert total(client, "jaxgpt_requests_total", path=CHAT, status="400") == 1
    assert total(client, "jaxgpt_requests_total", path="other", status="404") == 1
    assert total(client, "jaxgpt_time_to_first_token_seconds_count") in (3, 4)  # one left early
    tokens = sum(one["usage"]["completion_tokens"] for one in made)
    assert total(client, "jaxgpt_completion_tokens_total") > tokens
    assert (
        total(client, "jaxgpt_answers_total", reason="length")
        + total(client, "jaxgpt_answers_total", reason="stop")
        == sum(len(one["choices"]) for one in made) + 1
    )
    assert total(client, "jaxgpt_slots") == 4


def test_a_log_line_has_the_id_that_the_client_gave(
    client: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "jaxgpt.serve")
    answer = client.post(CHAT, json=body(), headers={"x-request-id": "mine-7"})
    assert answer.headers["x-request-id"] == "mine-7"
    lines = [json.loads(JsonFormatter().format(record)) for record in caplog.records]
    (line,) = [line for line in lines if line.get("request_id") == "mine-7"]
    assert line["completion_tokens"] == answer.json()["usage"]["completion_tokens"]
    assert line["status"] == 200 and 0 < line["seconds_to_first_token"] <= line["seconds"]
