"""The files of `launch/` for a service: alerts, dashboard, Kubernetes, Compose and nginx."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
import yaml
from fastapi import FastAPI

from jaxgpt.sample.request import Load
from jaxgpt.serve.monitoring import Monitoring, monitor
from jaxgpt.serve.seams import Client, Exchange, Usage

LAUNCH = Path(__file__).parents[1] / "launch"
MONITORING = LAUNCH / "monitoring"


def tool(name: str) -> str:
    """The path of a program of the system; the test is skipped where it is not installed."""
    return shutil.which(name) or pytest.skip(f"{name} is not installed")


def free_port() -> int:
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        return asked.getsockname()[1]


# ------------------------------------------------------------------------------------- monitoring


def rising() -> Load:
    """A load of which every number has risen since it was asked for last."""
    return Load(*[int(100 * time.monotonic())] * len(Load._fields))


def busy(monitoring: Monitoring) -> None:
    """Requests that end in every way."""
    metrics = monitoring.metrics
    for status in (200, 429, 500):
        exchange = Exchange(id="r", path="/v1/completions", client=Client(), model="small")
        watch = metrics.open(exchange)
        watch.token(0)
        watch.token(0)
        watch.close(status, Usage(5, 2), ("stop", "content_filter"))
    metrics.refused("/v1/completions", 401, "r")
    metrics.hit("in", "PersonalData", "mask")


@pytest.fixture(scope="module")
def monitoring() -> Monitoring:
    made = monitor("small", load=rising)
    busy(made)
    return made


def panels() -> list[Any]:
    held = json.loads((MONITORING / "grafana.json").read_text("utf-8"))["panels"]
    return [panel for panel in held if panel["type"] != "row"]


def dashboard_queries() -> list[str]:
    return [target["expr"] for panel in panels() for target in panel["targets"]]


def alert_queries() -> list[str]:
    groups = yaml.safe_load((MONITORING / "alerts.yml").read_text("utf-8"))["groups"]
    return [rule["expr"] for group in groups for rule in group["rules"]]


PROMQL = {"and", "or", "unless", "by", "on", "offset", "bool", "time"}


def names(query: str) -> tuple[set[str], set[str]]:
    """Metrics and labels that a query names."""
    plain = re.sub(r'"[^"]*"', "", query)
    grouped = re.findall(r"\bby \(([^)]*)\)", plain)
    matched = re.findall(r"\{([^}]*)\}", plain)
    labels = {word for part in grouped for word in part.split(", ")}
    labels |= set(re.findall(r"(\w+) *(?:=|!)", " ".join(matched)))
    rest = re.sub(r"\bby \([^)]*\)|\{[^}]*\}|\[[^]]*\]", "", plain)
    return set(re.findall(r"\b[a-z_]\w*\b(?! *\()", rest)) - PROMQL, labels


def test_what_alerts_and_dashboard_name_is_what_metrics_exports(monitoring: Monitoring) -> None:
    samples = [sample for family in monitoring.metrics.registry.collect() for sample in family.samples]
    exported = {sample.name for sample in samples} | {"up"}
    labels = {label for sample in samples for label in sample.labels} | {"job", "instance"}
    queries = [*dashboard_queries(), *alert_queries()]
    assert len(queries) > 35
    for query in queries:
        metrics, matched = names(query)
        assert metrics and metrics <= exported, query
        assert matched <= labels, query


def test_what_the_service_exports_is_on_the_dashboard(monitoring: Monitoring) -> None:
    shown = {name for query in dashboard_queries() for name in names(query)[0]}
    for family in monitoring.metrics.registry.collect():
        if family.name.startswith("jaxgpt_") and family.name != "jaxgpt_requests_open":
            assert any(name.startswith(family.name) for name in shown), family.name


def test_promtool_accepts_the_rules_and_they_fire_when_they_should() -> None:
    promtool = tool("promtool")
    for words in (["check", "config", "prometheus.yml"], ["test", "rules", "alerts_test.yml"]):
        done = subprocess.run([promtool, *words], cwd=MONITORING, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_tried_out() -> None:
    tried = (MONITORING / "alerts_test.yml").read_text("utf-8")
    groups = yaml.safe_load((MONITORING / "alerts.yml").read_text("utf-8"))["groups"]
    for rule in (rule for group in groups for rule in group["rules"]):
        assert rule["alert"] in tried
        assert {"summary", "fix"} == rule["annotations"].keys()


@pytest.fixture
def prometheus(monitoring: Monitoring, tmp_path: Path) -> Iterator[str]:
    """The address of a Prometheus that reads a busy service."""
    program, port, ours = tool("prometheus"), free_port(), free_port()
    app = FastAPI()
    app.include_router(monitoring.router)
    server = uvicorn.Server(uvicorn.Config(app, port=ours, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text("utf-8"))
    config["global"]["scrape_interval"] = "500ms"
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [f"127.0.0.1:{ours}"]
    config["rule_files"] = [str(MONITORING / "alerts.yml")]
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    options = {
        "config.file": tmp_path / "prometheus.yml",
        "storage.tsdb.path": tmp_path / "data",
        "web.listen-address": f"127.0.0.1:{port}",
        "log.level": "error",
    }
    with subprocess.Popen([program, *(f"--{name}={value}" for name, value in options.items())]) as process:
        yield f"http://127.0.0.1:{port}"
        process.terminate()
    server.should_exit = True
    thread.join()


def ask(address: str, query: str) -> list[Any]:
    """What Prometheus answers; nothing while it starts."""
    try:
        answer = httpx.get(f"{address}/api/v1/query", params={"query": query})
    except httpx.ConnectError:
        return []
    assert answer.status_code in (200, 503), answer.text
    return answer.json()["data"]["result"] if answer.status_code == 200 else []


def test_every_query_of_the_dashboard_shows_something(prometheus: str, monitoring: Monitoring) -> None:
    queries = {re.sub(r"\$__rate_interval", "5s", query) for query in dashboard_queries()}
    queries = {re.sub(r"\$\w+", ".*", query) for query in queries}
    until = time.monotonic() + 30
    while queries and time.monotonic() < until:
        busy(monitoring)
        time.sleep(0.2)
        queries = {query for query in queries if not ask(prometheus, query)}
    assert not queries
