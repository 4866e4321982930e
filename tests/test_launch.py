"""The files of `launch/` for a service: alerts, dashboard, Kubernetes, Compose and nginx."""

from __future__ import annotations

import asyncio
import contextlib
import functools
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
import jsonschema
import pytest
import uvicorn
import yaml
from fastapi import FastAPI

from jaxgpt.config import Batching, parse_args
from jaxgpt.sample.request import Load
from jaxgpt.serve.command import serve
from jaxgpt.serve.limits import Limits
from jaxgpt.serve.monitoring import Monitoring, monitor
from jaxgpt.serve.opening import Options
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
    held = json.loads((MONITORING / "grafana" / "dashboards" / "jaxgpt.json").read_text("utf-8"))["panels"]
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


def promtool(*words: str | Path) -> None:
    """Run it; it must be content."""
    done = subprocess.run([tool("promtool"), *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_accepts_the_rules_and_they_fire_when_they_should() -> None:
    promtool("check", "config", MONITORING / "prometheus.yml")
    promtool("test", "rules", MONITORING / "alerts_test.yml")


@pytest.mark.parametrize("name", ["compose.yml", "kubernetes.yml"])
def test_promtool_accepts_how_prometheus_reads_containers(name: str, tmp_path: Path) -> None:
    held = yaml.safe_load((MONITORING / name).read_text("utf-8"))
    held["scrape_configs"][0].pop("kubernetes_sd_configs", None)  # Debian's Prometheus is built without
    (tmp_path / name).write_text(yaml.safe_dump(held))
    promtool("check", "config", "--syntax-only", tmp_path / name)


def test_every_alert_is_tried_out() -> None:
    tried = (MONITORING / "alerts_test.yml").read_text("utf-8")
    groups = yaml.safe_load((MONITORING / "alerts.yml").read_text("utf-8"))["groups"]
    for rule in (rule for group in groups for rule in group["rules"]):
        assert rule["alert"] in tried
        assert {"summary", "fix"} == rule["annotations"].keys()


@contextlib.contextmanager
def serving(app: Any, port: int) -> Iterator[None]:
    """An ASGI app on a port of this machine."""
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    yield
    server.should_exit = True
    thread.join()


def wait_for(url: str) -> None:
    """Wait until something answers there."""
    for _ in range(100):
        with contextlib.suppress(httpx.TransportError):
            httpx.get(url)
            return
        time.sleep(0.1)
    raise AssertionError(f"{url} does not answer")


@pytest.fixture
def prometheus(monitoring: Monitoring, tmp_path: Path) -> Iterator[str]:
    """The address of a Prometheus that reads a busy service."""
    program, port, ours = tool("prometheus"), free_port(), free_port()
    app = FastAPI()
    app.include_router(monitoring.router)
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
    words = [program, *(f"--{name}={value}" for name, value in options.items())]
    with serving(app, ours), subprocess.Popen(words) as process:
        yield f"http://127.0.0.1:{port}"
        process.terminate()


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


def test_the_autoscalers_metric_is_exported(monitoring: Monitoring) -> None:
    exported = {family.name for family in monitoring.metrics.registry.collect()}
    (rule,) = yaml.safe_load((MONITORING / "adapter.yaml").read_text("utf-8"))["rules"]["custom"]
    (metric,) = manifests()["HorizontalPodAutoscaler"]["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] in exported
    assert rule["seriesQuery"].startswith(metric["pods"]["metric"]["name"] + "{")


# ------------------------------------------------------------------------------ Kubernetes, Compose


def manifests() -> dict[str, Any]:
    """The objects of launch/kubernetes by their kind."""
    found = [yaml.safe_load(path.read_text("utf-8")) for path in (LAUNCH / "kubernetes").iterdir()]
    return {made["kind"]: made for made in found}


@pytest.mark.parametrize("version", ["1.30", "1.37"])
def test_kubernetes_knows_every_field(version: str) -> None:
    validate = pytest.importorskip("kubernetes_validate").validate
    assert len(manifests()) == 4
    for made in manifests().values():
        validate(made, version, strict=True)


def test_the_objects_are_about_the_same_pods() -> None:
    made = manifests()
    pods = made["Deployment"]["spec"]["template"]
    labels = pods["metadata"]["labels"]
    (container,) = pods["spec"]["containers"]
    assert made["Service"]["spec"]["selector"] == labels == {"app": "jaxgpt"}
    assert made["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    assert (
        made["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]["name"]
        == made["Deployment"]["metadata"]["name"]
    )
    assert {port["targetPort"] for port in made["Service"]["spec"]["ports"]} == {
        port["name"] for port in container["ports"]
    }
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in pods["spec"]["volumes"]
    }


def test_a_pod_has_the_time_to_drain() -> None:
    spec = manifests()["Deployment"]["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    waits = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert spec["terminationGracePeriodSeconds"] > waits + Limits().drain_seconds
    compose = yaml.safe_load((LAUNCH / "compose.yaml").read_text("utf-8"))["services"]["jaxgpt"]
    assert float(compose["stop_grace_period"].removesuffix("s")) > Limits().drain_seconds


@functools.wraps(serve)
def asked(*words: Any, **options: Any) -> dict[str, Any]:
    return options


def test_the_commands_of_containers_are_ours() -> None:
    (container,) = manifests()["Deployment"]["spec"]["template"]["spec"]["containers"]
    compose = yaml.safe_load((LAUNCH / "compose.yaml").read_text("utf-8"))["services"]["jaxgpt"]["command"]
    for command, *words in (container["args"], compose):
        options = parse_args(asked, words, command)
        assert command == "serve" and options["options"].keys == "/keys/keys.json"
        assert options["host"] == "0.0.0.0" and options["port"] == 8000


def test_what_alerts_say_to_change_can_be_changed() -> None:
    fields = {name for kind in (Options, Batching, Limits) for name in kind.__dataclass_fields__}
    for path in (MONITORING / "alerts.yml", LAUNCH / "nginx.conf"):
        for flag in re.findall(r"--([a-z][\w-]*)", path.read_text("utf-8")):
            assert flag.replace("-", "_") in fields, flag


def test_compose_and_grafana_find_their_files() -> None:
    schemas = pytest.importorskip("check_jsonschema")
    folder = Path(schemas.__file__).parent / "builtin_schemas" / "vendor"
    schema = json.loads((folder / "compose-spec.json").read_text("utf-8"))
    made = yaml.safe_load((LAUNCH / "compose.yaml").read_text("utf-8"))
    jsonschema.validate(made, schema)
    for service in made["services"].values():
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert not source.startswith(".") or (LAUNCH / source).exists(), source
    assert (LAUNCH.parent / made["services"]["jaxgpt"]["build"]["dockerfile"]).is_file()


# ------------------------------------------------------------------------------------------ nginx


async def tell_slowly(scope: Any, receive: Any, send: Any) -> None:
    """An ASGI app that streams its request's id and an end, which it tells only after a second."""
    if scope["type"] != "http":
        return
    headers = dict(scope["headers"])
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": headers[b"x-request-id"], "more_body": True})
    await asyncio.sleep(1)
    await send({"type": "http.response.body", "body": b" end"})


async def refuse(scope: Any, receive: Any, send: Any) -> None:
    """An ASGI app that drains."""
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 503, "headers": []})
        await send({"type": "http.response.body", "body": b""})


@pytest.fixture
def nginx(tmp_path: Path) -> Iterator[str]:
    """The address of an nginx before a service that streams and one that drains."""
    program, port, ours = tool("nginx"), free_port(), (free_port(), free_port())
    config = (LAUNCH / "nginx.conf").read_text("utf-8")
    there, *rest = re.findall(r"server jaxgpt:8000(.*?;)", config)
    assert not rest
    servers = "".join(f"server 127.0.0.1:{one}{there}" for one in ours)
    config = config.replace(f"server jaxgpt:8000{there}", servers).replace(
        "listen 8080", f"listen 127.0.0.1:{port}"
    )
    (tmp_path / "nginx.conf").write_text(config)
    options = f"daemon off; pid {tmp_path}/pid; error_log {tmp_path}/log;"
    words = [program, "-c", tmp_path / "nginx.conf", "-p", tmp_path, "-g", options]
    checked = subprocess.run([*words, "-t"], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    with serving(tell_slowly, ours[0]), serving(refuse, ours[1]), subprocess.Popen(words) as process:
        yield f"http://127.0.0.1:{port}"
        process.terminate()


def test_nginx_streams_keeps_ids_and_leaves_out_who_drains(nginx: str) -> None:
    wait_for(nginx + "/metrics")
    for i in range(4):
        began = time.monotonic()
        with httpx.stream("POST", nginx, headers={"x-request-id": f"mine-{i}"}, json={}) as answer:
            parts = [(part, time.monotonic() - began) for part in answer.iter_text()]
        assert [part for part, _ in parts] == [f"mine-{i}", " end"]
        assert parts[0][1] < 0.7 < parts[1][1]
    assert httpx.get(nginx + "/metrics").status_code == 404
    assert httpx.post(nginx, content=b"x" * (Limits().body_bytes + 1)).status_code == 413
