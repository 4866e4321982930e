"""A run of random parameters with a text of its own, and a model that knows one sentence by heart."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import FLOAT32, HERE, MODERN, mesh, sharp_params

from jaxgpt.checkpoint import Checkpoints
from jaxgpt.config import GPT, Run, Text, to_json
from jaxgpt.data.prepare import prepare
from jaxgpt.evals.loss import validation_loss
from jaxgpt.evals.scoring import Scorer
from jaxgpt.models import init_params
from jaxgpt.text.tokenizer import ByteTokenizer
from jaxgpt.train.state import State

ONE = {"data": 1, "fsdp": 1, "tensor": 1, "expert": 1}
MODEL = replace(MODERN, vocab_size=264, context=32, layers=1, windows=(), logit_softcap=30.0)
COMPUTE = replace(FLOAT32, unroll=1)  # compiles in half the time
ROWS = 4
"""Rows of a batch in every test: they share one compiled program."""
TEXT = "the cat sat on a mat while seven dogs ran over green hills — and far away. " * 9


def save_run(folder: Path, data: Any, model: GPT = MODEL) -> Path:
    """A run's folder with one checkpoint at step 5, as training leaves it."""
    run = Run(name=folder.name, model=model, data=data, compute=COMPUTE)
    ByteTokenizer().save(folder / "tokenizer")
    (folder / "config.json").write_text(json.dumps({"run": to_json(run)}))
    (folder / "metrics.jsonl").write_text('{"step": 5, "loss": 2.0}\n')
    checkpoints = Checkpoints(folder)
    state = State(jnp.int32(5), jnp.int32(0), sharp_params(model), {"unused": jnp.zeros(1)})
    checkpoints.save(state, {}, 1.0)
    checkpoints.close()
    return folder


@pytest.fixture(scope="session")
def text_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on text whose validation part is one document, longer than its context."""
    folder = tmp_path_factory.mktemp("evals")
    (folder / "a.txt").write_text(TEXT, "utf-8")
    prepare([str(folder / "a.txt")], folder / "text", validation=0.3, split="tail", workers=1)
    return save_run(folder / "run", Text(path=str(folder / "text")))


@pytest.fixture(scope="session")
def own_loss(text_run: Path) -> dict[str, float]:
    """What training measures on that run's validation data."""
    return validation_loss(text_run, batch_size=ROWS)


@pytest.fixture(scope="session")
def scorer() -> Scorer:
    """The same model without a folder, on one device."""
    return Scorer(MODEL, COMPUTE, sharp_params(MODEL), ByteTokenizer(), mesh(ONE))


@pytest.fixture(scope="session")
def reciter() -> Scorer:
    """A model sure that `xyz ` or a line's end is followed by `abc`, whatever came before."""
    tokenizer = ByteTokenizer()
    links = dict(pairwise("xyz abc\n")) | {"\n": "a"}
    model = GPT(vocab_size=264, context=48, layers=1, width=264, heads=1, tied=False)
    shapes = jax.eval_shape(lambda: init_params(model, COMPUTE, HERE, jax.random.key(0)))
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    params["norm"]["scale"] += 1
    params["embed"]["weight"] = 10 * np.eye(model.vocab_size, dtype=np.float32)
    head = np.zeros((model.vocab_size, model.width), np.float32)
    for token, following in links.items():
        head[ord(following), ord(token)] = 1
    params["head"]["weight"] = head
    return Scorer(model, COMPUTE, jax.tree.map(jnp.asarray, params), tokenizer, mesh(ONE))
