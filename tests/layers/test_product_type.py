"""`compute.dtype="auto"`: measured once per machine, said, and kept."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import jax
import pytest

from jaxgpt.config import Compute, Run, to_json
from jaxgpt.files import write_json
from jaxgpt.layers import product_type
from jaxgpt.layers.product_type import fastest, measure, with_type
from jaxgpt.target import Target

CPU = Target.of()


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where measurements are kept during a test."""
    monkeypatch.setattr(product_type, "CACHE", str(tmp_path / "cache" / "products.json"))
    monkeypatch.setattr(product_type, "WIDTH", 32)
    return tmp_path / "cache" / "products.json"


def keep(path: Path, bfloat16: float) -> None:
    """As measured before on this machine, float32 in one second."""
    path.parent.mkdir(exist_ok=True)
    key = f"{product_type._cpu()}, jax {jax.__version__}"
    write_json(path, {key: {"float32": 1.0, "bfloat16": bfloat16}})


@pytest.mark.parametrize(("seconds", "chosen"), [(0.2, "bfloat16"), (0.9, "float32"), (3.0, "float32")])
def test_bfloat16_where_it_is_clearly_faster(
    kept: Path, caplog: pytest.LogCaptureFixture, seconds: float, chosen: str
) -> None:
    keep(kept, seconds)
    caplog.set_level(logging.INFO)
    assert fastest(CPU) == chosen
    assert [line for line in caplog.messages if f"auto: {chosen}" in line] == caplog.messages


@pytest.mark.parametrize("damage", ["", '{"a": 1', '{"x": {"float32": -1, "bfloat16": 0}}'])
def test_a_machine_is_measured_once(kept: Path, caplog: pytest.LogCaptureFixture, damage: str) -> None:
    if damage:
        kept.parent.mkdir()
        kept.write_text(damage)
    caplog.set_level(logging.INFO)
    assert fastest(CPU) == fastest(CPU)
    assert ["measured now" in line for line in caplog.messages] == [True, False]
    ((key, seconds),) = json.loads(kept.read_text()).items()
    assert key.endswith(f"jax {jax.__version__}")
    assert set(seconds) == {"float32", "bfloat16"}


def test_without_a_place_to_keep_it_the_answer_is_given_anyway(
    kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept.parent.write_text("a file where the folder should be")
    assert fastest(CPU) in ("float32", "bfloat16")


def test_accelerators_are_not_measured(kept: Path) -> None:
    assert fastest(Target("tpu", "TPU v5e")) == fastest(Target("gpu", "H100")) == "bfloat16"
    assert not kept.exists()


def test_it_times_both(kept: Path) -> None:
    assert all(seconds > 0 for seconds in measure(CPU).values())


def test_a_run_that_has_begun_keeps_its_type(kept: Path, tmp_path: Path) -> None:
    keep(kept, 0.1)
    run = Run(name="a", runs=str(tmp_path), compute=Compute(dtype="auto"))
    assert with_type(run).compute.dtype == "bfloat16"
    assert with_type(replace(run, compute=Compute(dtype="float32"))).compute.dtype == "float32"
    run.folder.mkdir()
    held = replace(run, compute=Compute(dtype="float32"))
    write_json(run.folder / "config.json", {"run": to_json(held)})
    assert with_type(run).compute.dtype == "float32"
