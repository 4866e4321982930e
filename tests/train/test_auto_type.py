"""A run of `compute.dtype="auto"`: its folder says the type, and it goes on with that elsewhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tiny_runs import COMPUTE, OPTIM, TRAIN, text_run

from jaxgpt.config import load_run
from jaxgpt.layers import product_type
from jaxgpt.train import loop


def test_the_resolved_type_is_stored_and_kept(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(product_type, "fastest", lambda target: "float32")
    optim = replace(OPTIM, schedule="constant", warmup_steps=1)
    run = text_run(corpus, tmp_path, optim=optim, compute=replace(COMPUTE, dtype="auto"))
    loop.train(replace(run, train=replace(TRAIN, steps=2)), progress=False)
    assert load_run(run.folder).compute.dtype == "float32"

    monkeypatch.setattr(product_type, "fastest", lambda target: "bfloat16")  # another machine
    loop.train(replace(run, train=replace(TRAIN, steps=4)), progress=False)
    assert load_run(run.folder).compute.dtype == "float32"
