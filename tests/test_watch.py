"""A run's report in a browser: drawn anew when there is news, of this machine alone."""

from __future__ import annotations

import http.client
import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
from tiny import make_run

from jaxgpt import watch
from jaxgpt.cli import main
from jaxgpt.config import to_json
from jaxgpt.watch import serve

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    run = tmp_path / "mine"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"run": to_json(make_run())}))
    add(run, {"step": 1, "loss": 3.0}, {"step": 1, "val_loss": 2.75})
    return run


def add(run: Path, *records: dict) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def port(folder: Path) -> Iterator[int]:
    server = serve(folder, 0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


def get(port: int, path: str, host: str = "") -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("GET", path, headers={"Host": host or f"127.0.0.1:{port}"})
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def test_the_page_follows_the_run(folder: Path, port: int) -> None:
    before = get(port, "/state")[1]
    assert "2.75" in get(port, "/page")[1] and get(port, "/state")[1] == before
    add(folder, {"step": 2, "val_loss": 1.625})
    assert get(port, "/state")[1] != before
    assert "1.625" in get(port, "/page")[1]
    assert not (folder / "report.html").exists()  # nothing is written into the run


def test_nothing_else_is_served_and_to_nobody_else(folder: Path, port: int) -> None:
    for path in ("/config.json", "/../mine/config.json", "/metrics.jsonl", "/page/"):
        assert get(port, path)[0] == 404
    assert get(port, "/", f"localhost:{port}")[0] == 200
    assert get(port, "/", "evil.example")[0] == 403


def test_a_run_that_has_not_begun_is_waited_for(tmp_path: Path) -> None:
    from jaxgpt.watch import _drawn, _state

    run = tmp_path / "a <run>"
    assert "There is no run in" in _drawn(run, _state(run)) and "<run>" not in _drawn(run, _state(run))
    run.mkdir()
    (run / "config.json").write_text("{}")
    assert "It is compiling" in _drawn(run, _state(run))


def test_a_port_that_is_taken_is_passed_by(folder: Path, port: int) -> None:
    with serve(folder, port) as other:
        assert other.server_port > port


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
def test_a_browser_shows_it_and_reloads_by_itself(
    folder: Path, port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """News come after the page has asked for them twice; then the frame is fetched again, by itself."""
    asked: list[str] = []
    plain = watch._Handler._send

    def send(self: watch._Handler, words: str, kind: str) -> None:
        asked.append(self.path)
        if asked.count("/state") == 2 and self.path == "/state":
            add(folder, {"step": 2, "val_loss": 1.625})
        plain(self, words, kind)

    monkeypatch.setattr(watch._Handler, "_send", send)
    picture = tmp_path / "page.png"
    words = [
        *(str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu"),
        *(f"--user-data-dir={tmp_path / 'home'}", "--virtual-time-budget=20000", f"--screenshot={picture}"),
        f"http://127.0.0.1:{port}/",
    ]
    subprocess.run(words, capture_output=True, timeout=90)
    assert picture.stat().st_size > 5000
    assert asked[0] == "/"
    assert asked.count("/page") == 2, asked


def test_reports_are_drawn_anew(folder: Path, tmp_path: Path) -> None:
    with redirect_stdout(StringIO()) as said:
        assert main(["report", str(folder)]) == 0
        assert main(["report", str(tmp_path)]) == 2
    page = (folder / "report.html").read_text()
    assert said.getvalue() == f"{folder / 'report.html'}\n"
    assert "Settings that differ from the defaults" in page and "model.width" in page
