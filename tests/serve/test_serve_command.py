"""`jaxgpt serve` as a process: it starts, answers, drains and says what is wrong in one line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from tiny_evals import save_run

from jaxgpt.cli import main
from jaxgpt.config import Chat

BODY = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "Hi"}],
    "stream": True,
    "max_tokens": 20,
    "response_format": {"type": "regex", "regex": "a{30}"},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "tiny"
    save_run(folder, Chat(train=("a.jsonl",)))
    return folder


@pytest.fixture
def process(run: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "jaxgpt.cli", "serve", str(run), "--port", "0", "--slots", "2"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        yield process
        process.kill()


def address(process: subprocess.Popen[str]) -> str:
    """Where it answers, once it does."""
    assert process.stderr is not None
    for line in process.stderr:
        if " answers this machine alone" in line:
            threading.Thread(target=process.stderr.read, daemon=True).start()
            return line.split(": ")[1].split()[0].rstrip("/")
    raise AssertionError("it ended")


def test_a_process_answers_and_sigterm_drains_it(process: subprocess.Popen[str]) -> None:
    url = address(process)
    assert httpx.get(f"{url}/ready", timeout=60).json() == {"status": "ready"}
    assert "<html" in httpx.get(url).text
    assert "jaxgpt_" in httpx.get(f"{url}/metrics").text
    assert httpx.get(f"{url}/v1/models", headers={"host": "evil.example"}).status_code == 403
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=BODY, timeout=60) as made:
        lines = made.iter_lines()
        assert next(lines).startswith("data: ")
        process.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert '"finish_reason":"length"' in rest[-2]
    assert process.wait(60) == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--host", "0.0.0.0"], "there are no keys"),
        (["--name", "a:b"], "a colon"),
        (["--adapters", "b"], "NAME=FOLDER"),
        (["--seconds", "0"], "seconds is 0"),
        (["--slots", "0"], "slots is 0"),
        (["--origins", "https://a.example/"], "--origins has 'https://a.example/'; write an origin"),
        (["--origins", "*"], "add --keys FILE, or name the pages' origins."),
        (["--redis", "redis://localhost"], "give --keys too"),
        (["--filters", "no.toml"], "no.toml cannot be read"),
        (["--keys", "env:NOTHING"], "NOTHING"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(
    run: Path, options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(["serve", str(run), "--port", "0", *options])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert words in " ".join(capsys.readouterr().err.replace("│", " ").split())
