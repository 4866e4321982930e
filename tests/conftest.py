"""Eight simulated devices for every test, and the array types of public functions checked."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"  # and in the processes that tests start
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
# Tiny programs take longer to optimise than to run: without LLVM's passes the tests take half the time.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax
import pytest
from jaxtyping import install_import_hook
from story import story

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

CHECKED = ("layers", "models", "objectives", "optim", "sharding")
install_import_hook([f"jaxgpt.{name}" for name in CHECKED], "beartype.beartype")


@pytest.fixture(autouse=True)
def no_shared_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch):
    """Commands called in a test neither read nor write the user's compilation cache."""
    folder = tmp_path_factory.getbasetemp() / "xla"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder))
    monkeypatch.setattr("jaxgpt.runtime.set_up", lambda: None)
    return folder


MOST_MAPPINGS = 15_000
"""Memory mappings of a process above which compiled programs are dropped."""


@pytest.fixture(scope="module", autouse=True)
def few_programs() -> Iterator[None]:
    """Programs of earlier files are dropped before there are too many.

    Each compiled program is some twenty memory mappings. Linux allows a process 65,530 of them; where
    there are no more, XLA ends with a segmentation fault.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPPINGS:
        jax.clear_caches()


@pytest.fixture(scope="session")
def sentencepiece():
    from jaxgpt.text.train import train_sentencepiece

    texts = [story(i, 40) for i in range(200)] + [
        "你好，世界。今天天气很好。",
        "naïve café — 😀\t!\r\n",
    ] * 20
    return train_sentencepiece(texts, 420, threads=1)


@pytest.fixture(params=["byte", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest, sentencepiece):
    from jaxgpt.text.tokenizer import ByteTokenizer

    return ByteTokenizer() if request.param == "byte" else sentencepiece


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked `aot` are run by `-m aot` alone, whatever else a `-m` says."""
    if "aot" in config.option.markexpr:
        return
    left_out = [item for item in items if item.get_closest_marker("aot")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("aot")]
