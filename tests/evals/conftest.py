"""Runs and scorers that the tests of evaluation share."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import HERE, mesh, sharp_params
from tiny_evals import COMPUTE, MODEL, ONE, ROWS, TEXT, save_run

from jaxgpt.config import GPT, Classification, Classifier, Labelled, Text
from jaxgpt.data.prepare import prepare
from jaxgpt.evals.loss import validation_loss
from jaxgpt.evals.scoring import Scorer
from jaxgpt.models import init_params
from jaxgpt.text.tokenizer import ByteTokenizer


@pytest.fixture(scope="session")
def text_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on text whose validation part is one document, longer than its context."""
    folder = tmp_path_factory.mktemp("evals")
    (folder / "a.txt").write_text(TEXT, "utf-8")
    prepare([str(folder / "a.txt")], folder / "text", validation=0.3, split="tail", workers=1)
    return save_run(folder / "run", Text(path=str(folder / "text")))


@pytest.fixture(scope="session")
def labels_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier whose every text is a "yes", as those of its own files are."""
    folder = tmp_path_factory.mktemp("labels")
    (folder / "own.tsv").write_text("Ada runs\tyes\nParis is large\tyes\n")
    files = (str(folder / "own.tsv"),)
    data = Labelled(train=files, validation=files, tokenizer="byte")
    model = Classifier(backbone=replace(MODEL, causal=False), labels=("no", "yes"), pool="mean")
    params = init_params(model, COMPUTE, HERE, jax.random.key(1))
    params["bias"] = jnp.array([0.0, 2.0])
    params["head"]["weight"] *= 0
    return save_run(folder / "run", data, model, params, objective=Classification())


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
