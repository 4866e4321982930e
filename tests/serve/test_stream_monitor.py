"""A monitored stream: alarms where a label became more frequent, and nowhere else; webhook, metrics, page."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from tiny import HERE, MODERN
from tiny_evals import COMPUTE, save_run

from jaxgpt.cli import main
from jaxgpt.config import Classification, Classifier, Labelled
from jaxgpt.evals.control_charts import Charting
from jaxgpt.evals.predict import classify
from jaxgpt.models import init_params
from jaxgpt.sample.load import load_trained
from jaxgpt.serve.stream_monitor.app import monitor_app
from jaxgpt.serve.stream_monitor.feed import Feed
from jaxgpt.serve.stream_monitor.monitor import Monitor, Scored

BAD, GOOD = "what a dull film", "a joy to watch"
HOW = Charting(chart="ewma", window=10, run_length=100.0)
OPTIONS = ["--label", "bad", "--window", "10", "--learn", "100", "--run-length", "100"]
OPTIONS += ["--chart", "ewma", "--batch-size", "8"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of random parameters, with the bias that tells two texts apart."""
    folder = tmp_path_factory.mktemp("monitor")
    (folder / "own.tsv").write_text(f"{BAD}\tbad\n{GOOD}\tgood\n")
    files = (str(folder / "own.tsv"),)
    backbone = replace(MODERN, vocab_size=264, context=32, layers=1, windows=(), causal=False)
    model = Classifier(backbone=backbone, labels=("bad", "good"), pool="mean")
    params = init_params(model, COMPUTE, HERE, jax.random.key(1))
    params["head"]["weight"] *= 50
    data = Labelled(train=files, validation=files, tokenizer="byte")
    trained = load_trained(save_run(folder / "first", data, model, params, objective=Classification()))
    odds = [jax.scipy.special.logit(found.scores["bad"]) for found in classify(trained, [BAD, GOOD])]
    params["head"]["weight"] *= 1 if odds[0] > odds[1] else -1
    middle = (odds[0] + odds[1]) / 2 * (1 if odds[0] > odds[1] else -1)
    params["bias"] = params["bias"].at[0].add(-middle)
    return save_run(folder / "run", data, model, params, objective=Classification())


def stream(*parts: tuple[int, int]) -> str:
    """Lines, of which every so many are bad, for so many texts."""
    return "".join(f"{BAD if i % every == 0 else GOOD}\n" for count, every in parts for i in range(count))


def events(out: str) -> list[dict]:
    return [json.loads(line) for line in out.splitlines()]


def test_a_surge_alarms_once_and_is_over(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text(stream((300, 5)))
    (tmp_path / "b.txt").write_text(stream((100, 1), (200, 5)))
    hooked = tmp_path / "hooked"
    hook = f"{sys.executable} -c \"import sys; open('{hooked}', 'a').write(sys.stdin.read())\""
    files = [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    assert main(["monitor", str(run), *files, *OPTIONS, "--hook", hook]) == 5
    ready, alarm, over = events(capsys.readouterr().out)
    assert [e["event"] for e in (ready, alarm, over)] == ["ready", "alarm", "over"]
    assert ready["share"] == pytest.approx(20.5 / 101, abs=1e-4)
    few, many = ready["false_alarm_every"]
    assert few < 100 < many
    assert 21 <= alarm["window"] <= 22 and 31 <= over["window"] <= 35  # the surge is windows 21 to 30
    assert alarm["examples"] == [BAD] * 3 and alarm["statistic"] > alarm["limit"] > alarm["usual"]
    assert events(hooked.read_text()) == [alarm, over]


def test_standard_input_is_read_as_it_comes(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [json.dumps({"said": text}) for text in stream((200, 5)).splitlines()]
    data = "\n".join(["{", *lines, "\n"]).encode()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))
    options = ["--usual", "0.2", "--field", "said", "--every-window"]
    assert main(["monitor", str(run), "-", *OPTIONS, *options]) == 0
    found = events(capsys.readouterr().out)
    assert [(e["event"], e["counted"]) for e in found] == [("window", 2)] * 20


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["a.txt"], "no label is named; name what is counted with --label, of bad, good."),
        (["a.txt", "--label", "bda"], "--label is 'bda'; did you mean 'bad'?"),
        ([], "there is nothing to watch; name files, - or --listen HOST:PORT."),
        (
            ["--label", "bad", "--listen", "8000"],
            "--listen is '8000'; write HOST:PORT, such as 127.0.0.1:8090.",
        ),
        (["--label", "bad", "--listen", "0.0.0.0:1"], "--listen is '0.0.0.0:1', which others can reach, but"),
        (["no.txt"], "no.txt"),
    ],
)
def test_mistakes_are_one_sentence(
    run: Path, options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    named = [] if "--label" in options or options == ["a.txt"] else ["--label", "bad"]
    assert main(["monitor", str(run), *options, *named]) == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


def scored(text: str) -> list[Scored]:
    return [Scored(t, "bad" if t == BAD else "good", t == BAD, float(t == BAD)) for t in text.splitlines()]


def numbers(text: str) -> dict[str, float]:
    families = text_string_to_metric_families(text)
    return {f"{s.name}{''.join(s.labels.values())}": s.value for f in families for s in f.samples}


def test_webhook_metrics_and_page() -> None:
    monitor, feed = Monitor(HOW, None, 100, lambda event: None), Feed(room=2)
    client = TestClient(monitor_app(monitor, feed, "bad", token="secret"))
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/metrics").status_code == 401
    assert client.get("/", headers={"Authorization": "Bearer nö".encode("latin-1")}).status_code == 401
    client.headers["Authorization"] = "Bearer secret"
    assert "learning what is usual" in client.get("/").text
    assert client.post("/v1/texts", json={"texts": [BAD, GOOD]}).json() == {"accepted": 2}
    for body, status, words in (
        (b"{", 400, "the body is damaged (not JSON"),
        (b'{"texts": []}', 400, "texts must hold 1 to 1024 texts"),
        (b'{"texts": [" "]}', 400, "that are not blank"),
        (b'{"text": "a"}', 400, "the body is damaged"),
        (b" " * 2**20 + b"1", 413, "the body has more than"),
    ):
        answer = client.post("/v1/texts", content=body)
        assert answer.status_code == status and words in answer.json()["error"]["message"]
    assert client.get("/no").json()["error"]["message"] == "GET /no: Not Found."
    client.post("/v1/texts", json={"texts": [BAD]})
    full = client.post("/v1/texts", json={"texts": [BAD]})
    assert full.status_code == 429 and full.headers["retry-after"] == "1"
    assert numbers(client.get("/metrics").text)["jaxgpt_monitor_waiting"] == 2
    monitor.add(scored(stream((300, 5), (100, 1))))
    found = numbers(client.get("/metrics").text)
    assert found["jaxgpt_monitor_texts_totalbad"] == 160 and found["jaxgpt_monitor_alarm"] == 1
    assert found["jaxgpt_monitor_alarms_total"] == 1 and found["jaxgpt_monitor_windows"] == 30
    assert found["jaxgpt_monitor_statistic"] > found["jaxgpt_monitor_limit"]
    page = client.get("/")
    assert page.headers["refresh"] and BAD in page.text and page.text.count("<svg") == 2
    assert "<script" not in page.text and "windows between false alarms" in page.text


def test_a_feed_gives_what_waits_and_ends() -> None:
    feed, taken = Feed(), list[list[str]]()
    feed.put("abcdefg", 2)
    feed.offer(["h"])
    feed.end()
    feed.drain(3, lambda texts: taken.append(list(texts)))
    assert [text for texts in taken for text in texts] == list("abcdefgh") and max(map(len, taken)) <= 3


def fetch(address: str, body: object = None) -> str:
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(address, data), timeout=20) as answer:
        return answer.read().decode()


def test_a_service_takes_texts_and_ends_with_a_signal(run: Path) -> None:
    command = [sys.executable, "-m", "jaxgpt.cli", "monitor", str(run), *OPTIONS]
    command += ["--usual", "0.2", "--listen", "127.0.0.1:0"]
    environment = os.environ | {"COLUMNS": "200", "JAX_NUM_CPU_DEVICES": "1"}
    process = subprocess.Popen(command, stdout=-1, stderr=-1, text=True, env=environment)
    try:
        assert process.stderr is not None
        address = next(m[0] for line in process.stderr if (m := re.search(r"http://\S+/", line)))
        fetch(f"{address}v1/texts", {"texts": stream((100, 1)).splitlines()})
        ends = time.monotonic() + 60
        while numbers(fetch(f"{address}metrics"))["jaxgpt_monitor_windows"] < 10:
            assert time.monotonic() < ends
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=60)
        assert events(out)[0]["event"] == "alarm" and process.returncode == 0
    finally:
        process.kill()
        process.wait()
