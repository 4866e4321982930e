"""Averages of runs: by hand on their parameters, and what has none is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import FLOAT32, HERE

from jaxgpt.checkpoint import Checkpoints
from jaxgpt.config import GPT, Run, Text, to_json
from jaxgpt.convert.soup import soup
from jaxgpt.errors import UserError
from jaxgpt.models import init_params
from jaxgpt.sample.load import load_trained
from jaxgpt.text.tokenizer import ByteTokenizer
from jaxgpt.train.state import State

MODEL = GPT(vocab_size=264, context=16, layers=1, width=16, heads=2)


def made(folder: Path, seed: int, steps=(5,), model=MODEL) -> Path:
    run = Run(name=folder.name, model=model, data=Text(path="none"), compute=FLOAT32)
    ByteTokenizer().save(folder / "tokenizer")
    (folder / "config.json").write_text(json.dumps({"run": to_json(run)}))
    checkpoints = Checkpoints(folder, keep=9)
    for step in steps:
        params = init_params(model, FLOAT32, HERE, jax.random.key(seed + step))
        count = np.int32(step)
        checkpoints.save(
            State(count, np.int32(0), params, (), None), {"data": {"row": 0, "data": ""}}, -float(step)
        )
    checkpoints.finish()
    checkpoints.close()
    return folder


def leaves(params):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(params)]


def test_a_soup_is_the_weighted_mean_of_its_runs(tmp_path):
    a, b = made(tmp_path / "a", 0), made(tmp_path / "b", 100)
    soup((str(a), str(b)), out=str(tmp_path / "soup"), weights=(3.0, 1.0))
    parts = [leaves(load_trained(folder).params) for folder in (a, b)]
    found = load_trained(tmp_path / "soup")
    for x, y, mean in zip(*parts, leaves(found.params), strict=True):
        np.testing.assert_allclose(mean, 0.75 * x + 0.25 * y, rtol=1e-5, atol=1e-7)
    record = json.loads((tmp_path / "soup" / "made_from.json").read_text())
    assert [part["weight"] for part in record["average"]] == [0.75, 0.25]


def test_the_last_checkpoints_of_one_run(tmp_path):
    a = made(tmp_path / "a", 0, steps=(1, 2, 3))
    soup((str(a),), out=str(tmp_path / "soup"), last=2)
    parts = [leaves(load_trained(a, which=step).params) for step in ("2", "3")]
    for x, y, mean in zip(*parts, leaves(load_trained(tmp_path / "soup").params), strict=True):
        np.testing.assert_allclose(mean, (x + y) / 2, rtol=1e-5, atol=1e-7)
    with pytest.raises(UserError, match="has 3 whole checkpoints, not 7"):
        soup((str(a),), out=str(tmp_path / "more"), last=7)


def test_what_has_no_average(tmp_path):
    a, b = made(tmp_path / "a", 0), made(tmp_path / "b", 1, model=replace(MODEL, width=32))
    with pytest.raises(UserError, match="another model"):
        soup((str(a), str(b)), out=str(tmp_path / "soup"))
    with pytest.raises(UserError, match="name two or more"):
        soup((str(a),), out=str(tmp_path / "soup"))
    with pytest.raises(UserError, match="--weights"):
        soup((str(a), str(a)), out=str(tmp_path / "soup"), weights=(1.0,))
    assert not (tmp_path / "soup").exists()
