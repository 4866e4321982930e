"""launch/serve_ray.py on a Ray of this machine: keys, answers, streams, and replicas by the queue."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import httpx
import pytest
from tiny_evals import save_run

import jaxgpt
from jaxgpt.config import GPT, Chat
from jaxgpt.errors import UserError
from jaxgpt.serve import keys_command
from jaxgpt.text.tokenizer import ByteTokenizer

ray = pytest.importorskip("ray")
serve = pytest.importorskip("ray.serve")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
MODEL = GPT(vocab_size=ByteTokenizer().vocab_size, context=256, layers=1, width=16, heads=2)
QUESTION = [{"role": "user", "content": "What is a tuple?"}]


def statuses() -> dict[str, int]:
    """Replicas by what they do."""
    (deployment,) = serve.status().applications["jaxgpt"].deployments.values()
    return deployment.replica_states


def wait_for_replicas(count: int, seconds: float) -> None:
    until = time.monotonic() + seconds
    while statuses() != {"RUNNING": count}:
        assert time.monotonic() < until, statuses()
        time.sleep(0.2)


def start_ray(tries: int = 3) -> None:
    """Start Ray, which waits 30 seconds for its own processes: less than a busy machine may take."""
    try:
        ray.init(
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},
        )
    except Exception as error:
        ray.shutdown()
        if tries == 1:
            pytest.skip(f"Ray does not start on this machine now: {error}")
        start_ray(tries - 1)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run(tmp_path_factory.mktemp("ray") / "tiny", Chat(train=("a.jsonl",)), MODEL)


@pytest.fixture(scope="module")
def client(run: Path) -> Iterator[httpx.Client]:
    """A client with a key of an application of two slots a replica."""
    with pytest.MonkeyPatch.context() as patch, socket.socket() as free:
        patch.syspath_prepend(ROOT)
        from launch.serve_ray import Asked, application

        with redirect_stdout(StringIO()) as said:
            keys_command.add("ada", keys=run.parent / "keys.json")
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        start_ray()
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        flags = f"--keys {run.parent / 'keys.json'} --slots 2"
        asked = Asked(run=str(run), flags=flags, max_replicas=2, cpus=0.5, calm_seconds=1)
        try:
            serve.run(application(asked), name="jaxgpt")
            headers = {"authorization": f"Bearer {said.getvalue().strip()}"}
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=60) as made:
                yield made
        finally:
            serve.shutdown()
            ray.shutdown()


def body(**more: object) -> dict[str, object]:
    return {"model": "tiny", "messages": QUESTION, "temperature": 0, "max_tokens": 16} | more


def test_a_replica_answers_what_the_model_answers_to_those_who_have_a_key(
    client: httpx.Client, run: Path
) -> None:
    answer = client.post("/v1/chat/completions", json=body())
    text = answer.json()["choices"][0]["message"]["content"]
    assert text == jaxgpt.load(run).chat(QUESTION, temperature=0, max_new_tokens=16).text
    refused = client.post("/v1/chat/completions", json=body(), headers={"authorization": ""})
    assert refused.status_code == 401


def test_a_stream_comes_in_pieces_through_ray(client: httpx.Client) -> None:
    with client.stream("POST", "/v1/chat/completions", json=body(stream=True)) as answer:
        pieces = [line for line in answer.iter_lines() if line.startswith("data: ")]
    assert pieces[-1] == "data: [DONE]" and len(pieces) > 5
    assert answer.headers["x-request-id"]


def test_a_long_queue_starts_a_replica_and_calm_ends_it(client: httpx.Client) -> None:
    wait_for_replicas(1, 60)
    busy = threading.Event()
    busy.set()

    def ask() -> None:
        while busy.is_set():
            client.post("/v1/chat/completions", json=body(max_tokens=200))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    try:
        wait_for_replicas(2, 120)
    finally:
        busy.clear()
        for thread in threads:
            thread.join()
    wait_for_replicas(1, 120)


def test_a_cluster_is_not_open_to_everyone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    from launch.serve_ray import Asked, application

    with pytest.raises(UserError, match=r"^a Ray cluster answers others too; add --keys FILE to flags\.$"):
        application(Asked(run="runs/mine"))
    with pytest.raises(UserError, match="unknown option '--slot'; did you mean"):
        application(Asked(run="runs/mine", flags="--slot 3"))
