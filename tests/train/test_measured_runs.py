"""Runs with measures: resumed bitwise, what EWC has measured, and runs without any as they were."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import ONE, VOCABULARY, assert_close, mesh
from tiny import make_run as tiny_run
from tiny_runs import COMPUTE, curve, interrupt_at, restore, text_run

from jaxgpt.checkpoint import load_params
from jaxgpt.config import EWC, GPT, L2SP, Optim, Run, Train, load_run
from jaxgpt.data.loader import train_iterator
from jaxgpt.models import abstract_model, abstract_params, assemble
from jaxgpt.objectives import make_objective
from jaxgpt.objectives.measures import measured, measured_optimizer
from jaxgpt.target import Target
from jaxgpt.text.load import load_tokenizer
from jaxgpt.text.vocabulary import Vocabulary
from jaxgpt.train.loop import train

MODEL = GPT(vocab_size=264, context=32, layers=1, width=32, heads=4)
FAST = Optim(peak_lr=2e-2, final_lr=2e-2, schedule="constant", warmup_steps=0)
SHORT = Train(steps=4, batch_size=8, log_every=1, eval_every=4, save_every=2)
KEPT = (L2SP(weight=0.1), EWC(weight=10, rows=11))


@pytest.fixture(scope="module")
def runs(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and a run that goes on from it under penalties."""
    folder = tmp_path_factory.mktemp("measured")
    train(of(corpus, folder, "base"), progress=False)
    train(of(corpus, folder, "kept", KEPT), progress=False)
    return folder


def of(corpus: Path, folder: Path, name: str, measures: tuple = ()) -> Run:
    run = text_run(corpus, folder, name, model=MODEL, train=SHORT, optim=FAST)
    return replace(run, measures=measures, init_from=str(folder / "base")) if measures else run


def test_an_interrupted_run_goes_on_bitwise_equal(
    runs: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = replace(of(corpus, runs, "kept", KEPT), runs=str(tmp_path))
    with monkeypatch.context() as patch:
        interrupt_at(patch, 1, 15)
        assert train(run, progress=False).reason == "SIGTERM"
    assert train(run, progress=False).reason == "finished"
    assert curve(tmp_path / "kept") == curve(runs / "kept")


def test_importance_is_the_mean_of_squared_gradients_of_rows(runs: Path) -> None:
    """Eight devices measure 16 rows (11 rounded up): here each by itself, on one."""
    state, _ = restore(runs / "kept")
    anchor = state.opt[0]
    base = load_run(runs / "base")
    params, _ = load_params(runs / "base", base, mesh(ONE))
    jax.tree.map(np.testing.assert_array_equal, anchor.start, params)
    tokenizer = load_tokenizer(runs / "base" / "tokenizer")
    data = train_iterator(base.data, tokenizer, seed=0, model_length=32, batch_size=16)
    batch = jax.tree.map(jnp.asarray, next(data))
    data.close()
    graphdef, _ = abstract_model(MODEL, COMPUTE, Target.of(mesh(ONE)))
    objective = make_objective(base.objective, Vocabulary.of(tokenizer))
    loss = lambda params, row: objective(assemble(graphdef, params), row, None).loss  # noqa: E731
    slope = jax.jit(jax.grad(loss))
    rows = [slope(params, jax.tree.map(lambda a, i=i: a[i : i + 1], batch)) for i in range(16)]
    expected = jax.tree.map(lambda *parts: sum(np.square(p) for p in parts) / batch.weights_BT.sum(), *rows)
    assert_close(expected, anchor.importance, 1e-4)


def test_without_measures_nothing_of_the_step_is_another() -> None:
    """The very same objective and optimizer, so the program that it was."""
    run, optimizer = tiny_run(), optax.sgd(1.0)
    objective = make_objective(run.objective, VOCABULARY)
    assert measured(run.measures, objective, VOCABULARY) is objective
    assert measured_optimizer(run.measures, optimizer, abstract_params(run.model)) is optimizer
