"""docs/serving.md: its commands, run in order on a tiny run, and what it says of metrics and addresses."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tiny_evals import save_run

from jaxgpt.config import GPT, Chat, parse_args
from jaxgpt.sample.request import Load
from jaxgpt.serve.command import serve
from jaxgpt.serve.metrics import Metrics
from jaxgpt.text.tokenizer import ByteTokenizer

ROOT = Path(__file__).parents[2]
MODEL = GPT(vocab_size=ByteTokenizer().vocab_size, context=256, layers=1, width=16, heads=2)
WORDS = (ROOT / "docs" / "serving.md").read_text("utf-8")
BLOCKS = re.findall(r"```(bash|python)\n(.*?)```", WORDS, re.DOTALL)
NOT_RUN = {
    "pip install": "installs from the network",
    "docker build": "needs images from the network; test_launch.py checks the files",
    "kubectl create": "needs a cluster; test_launch.py checks the files",
    "prometheus --config.file": "test_launch.py runs it",
    "jaxgpt serve runs/mine --adapters": "is parsed: there is no such adapter here",
}
"""Blocks that begin so, with the reason."""


class Shell:
    """Runs blocks of the document in a folder; the server of the last one that starts one runs meanwhile."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.server = folder, None
        with socket.socket() as asked:
            asked.bind(("127.0.0.1", 0))
            self.port = str(asked.getsockname()[1])
        (folder / "jaxgpt").write_text(f'#!/bin/sh\nexec {sys.executable} -m jaxgpt.cli "$@"\n')
        (folder / "lm_eval").write_text(f'#!/bin/sh\nexec {sys.executable} -m lm_eval "$@"\n')
        for name in ("jaxgpt", "lm_eval"):
            (folder / name).chmod(0o755)
        (folder / ".curlrc").write_text("fail-with-body\nsilent\nshow-error\n")
        paths = f"{folder}{os.pathsep}{os.environ['PATH']}"
        libraries = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        own = {"PATH": paths, "HOME": str(folder), "PYTHONPATH": libraries, "HF_HOME": str(folder / "hf")}
        self.environment = os.environ | own | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

    def run(self, kind: str, block: str) -> None:
        block = block.replace("8000", self.port).replace("0.0.0.0", "127.0.0.1")
        if kind == "python":
            self.call([sys.executable, "-c", block])
        elif re.match(r"jaxgpt serve \S*/", block):
            self.stop()
            words = [*shlex.split(block), "--port", self.port]
            self.server = subprocess.Popen(words, cwd=self.folder, env=self.environment)
            self.wait()
        else:
            self.call(["bash", "-euo", "pipefail", "-c", block])

    def call(self, words: list[str]) -> None:
        done = subprocess.run(
            words, cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{words[-1]}\n{done.stdout}{done.stderr}"

    def wait(self) -> None:
        assert self.server is not None
        for _ in range(600):
            assert self.server.poll() is None
            try:
                if httpx.get(f"http://127.0.0.1:{self.port}/ready", timeout=1).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        raise AssertionError("the server is not ready")

    def stop(self) -> None:
        if self.server is not None:
            self.server.send_signal(signal.SIGTERM)
            assert self.server.wait(60) == 0
            self.server = None


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    save_run(tmp_path / "runs" / "mine", Chat(train=("a.jsonl",)), MODEL)
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    made = Shell(tmp_path)
    yield made
    if made.server is not None:
        made.server.kill()
        made.server.wait()


@pytest.mark.slow
def test_every_block_runs(shell: Shell) -> None:
    for start in NOT_RUN:
        assert any(block.startswith(start) for _, block in BLOCKS), start
    for kind, block in BLOCKS:
        if any(block.startswith(start) for start in NOT_RUN) or any(
            f"{program} " in block and not there for program, there in installed().items()
        ):
            continue
        shell.run(kind, block)
    shell.stop()


def installed() -> dict[str, bool]:
    """Programs of others, and whether they are here; the harness asks servers with its extra `api`."""
    there = {program: bool(shutil.which(program)) for program in ("promtool", "llm")}
    return there | {"lm_eval": all(map(importlib.util.find_spec, ("lm_eval", "tenacity")))}


@functools.wraps(serve)
def asked(*words: Any, **options: Any) -> dict[str, Any]:
    return options


def test_every_flag_is_one_of_the_command() -> None:
    for _, block in BLOCKS:
        for words in re.findall(r"jaxgpt serve (runs/.*)", block):
            parse_args(asked, shlex.split(words), "jaxgpt serve")
    known = {"keys", "requests-per-minute", "scopes", "trust-code", "head", "model_args"}  # of others
    for flag in set(re.findall(r"`--([a-z][\w.-]*)", WORDS)) - known:
        field = flag.removeprefix("mesh.").removeprefix("no-").replace("-", "_")
        assert re.search(rf"\b{field}\b", told()), flag


@functools.cache
def told() -> str:
    """Names of all options."""
    from jaxgpt.config import Batching, Mesh
    from jaxgpt.serve.limits import Limits
    from jaxgpt.serve.opening import Options

    fields = [name for kind in (Options, Batching, Limits, Mesh) for name in kind.__dataclass_fields__]
    return " ".join([*fields, "host", "port", "log_format"])


def test_every_metric_of_the_table_is_exported_and_the_other_way_round() -> None:
    metrics = Metrics("m", (), lambda: Load(*[0] * len(Load._fields)))
    exported = {
        family.name + ("_total" if family.type == "counter" else "")
        for family in metrics.registry.collect()
        if family.name.startswith("jaxgpt_")
    }
    assert set(re.findall(r"`(jaxgpt_\w+)`", WORDS)) == exported
