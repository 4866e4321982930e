"""A tiny corpus, tiny dialogues and one uninterrupted run, made once for the tests of this folder."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from tiny_runs import chat_run, text_run, write_config

from jaxgpt.data.prepare import prepare
from jaxgpt.text.tokenizer import ByteTokenizer
from jaxgpt.train.command import train

WORDS = "the cat sat on a mat while seven dogs ran over green hills and far away".split(" ")  # noqa: SIM905


@pytest.fixture(scope="module", autouse=True)
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compiled programs are kept for the other tests, and for the processes that they start."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    compilation_cache.reset_cache()
    jax.config.update("jax_compilation_cache_dir", str(folder / "programs"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    yield
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder of 60 short documents."""
    folder, chance = tmp_path_factory.mktemp("corpus"), random.Random(0)
    lines = [{"text": " ".join(chance.choices(WORDS, k=chance.randint(5, 40)))} for _ in range(60)]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    prepare([str(folder / "a.jsonl")], folder / "text", validation=0.2, workers=1)
    return folder / "text"


@pytest.fixture(scope="session")
def dialogues(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 80 dialogues; the folder `tokenizer` is beside it."""
    folder, chance = tmp_path_factory.mktemp("dialogues"), random.Random(1)
    ByteTokenizer().save(folder / "tokenizer")
    lines = [
        {"prompt": " ".join(chance.choices(WORDS, k=2)), "completion": " ".join(chance.choices(WORDS, k=3))}
        for _ in range(80)
    ]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "a.jsonl"


@pytest.fixture(scope="session")
def text_config(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config file of the pretraining run; other `runs` folders are given on the command line."""
    folder = tmp_path_factory.mktemp("configs")
    return write_config(text_run(corpus, folder / "runs"), folder)


@pytest.fixture(scope="session")
def chat_config(dialogues: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config file of the instruction run, on fsdp=8."""
    folder = tmp_path_factory.mktemp("configs")
    return write_config(chat_run(dialogues, dialogues.parent / "tokenizer", folder / "runs"), folder)


@pytest.fixture(scope="session")
def trained(text_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the pretraining run, done in this process in one go, and its `stdout.txt` beside it."""
    runs, said = tmp_path_factory.mktemp("runs"), StringIO()
    with redirect_stdout(said):
        assert train([str(text_config), "--runs", str(runs)]) == 0
    (runs / "stdout.txt").write_text(said.getvalue())
    return runs / "text"
