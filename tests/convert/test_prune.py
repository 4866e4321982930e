"""Pruning: what does nothing goes first and takes nothing with it; the new run is an ordinary one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import native_run
from tiny import FLOAT32, MODERN, ONE, mesh, model_of, plain, sharp_params

from jaxgpt.cli import main
from jaxgpt.config import GPT, Run, load_run
from jaxgpt.convert import importance
from jaxgpt.convert.prune import RECORD, prune
from jaxgpt.errors import UserError
from jaxgpt.sample.load import Trained, load_trained
from jaxgpt.text.tokenizer import ByteTokenizer

WORDS = ByteTokenizer()
MODEL = replace(MODERN, vocab_size=WORDS.vocab_size, layers=4, mlp_width=24)
ROWS_RT = np.random.default_rng(0).integers(1, 200, (4, 12)).astype(np.int32)


def trained(params: dict, model: GPT = MODEL) -> Trained:
    run = Run(name="x", model=model, compute=FLOAT32)
    return Trained(Path("x"), run, params, WORDS, mesh(ONE), 0)


def logits(model: Any, params: dict) -> np.ndarray:
    module = model_of(model)(params)
    return np.asarray(module.logits(module.hidden(plain(jnp.asarray(ROWS_RT))).x_BTD))


def changed(params: dict, module: str, leaf: str, index: Any, to: float = 0.0) -> dict:
    """Parameters with a part of one of a block's weights set to a number."""
    blocks = jax.tree.map(lambda x: x, params["blocks"])
    part, name = blocks[module], leaf
    part[name] = part[name] | {"weight": part[name]["weight"].at[index].set(to)}
    return params | {"blocks": blocks}


def test_a_layer_that_does_nothing_goes_first() -> None:
    """And with it nothing of what the model computes; windows stay with their layers."""
    params = sharp_params(MODEL)
    for module, leaf in (("attention", "out"), ("mlp", "down")):
        params = changed(params, module, leaf, 2)
    scores_L = importance.of_layers(trained(params), ROWS_RT)
    assert scores_L.argmin() == 2
    assert scores_L[2] == pytest.approx(0, abs=1e-6)
    kept = importance.most(scores_L, 3)
    assert kept.tolist() == [0, 1, 3]
    smaller, cut = importance.without_layers(MODEL, params, kept)
    assert smaller.windows == (4, 0, 0)
    np.testing.assert_allclose(logits(smaller, cut), logits(MODEL, params), atol=1e-5)


def test_groups_of_heads_that_do_nothing_go_first() -> None:
    """Another one in each layer, with its key-value head and both query heads."""
    params, silent = sharp_params(MODEL), [0, 3, 1, 2]
    for layer, group in enumerate(silent):
        params = changed(params, "attention", "out", (layer, slice(2 * group, 2 * group + 2)))
    scores_LG = importance.of_heads(trained(params), ROWS_RT)
    assert scores_LG.shape == (4, 4)
    assert scores_LG.argmin(-1).tolist() == silent
    smaller, cut = importance.without_heads(MODEL, params, importance.most(scores_LG, 3))
    assert (smaller.heads, smaller.groups, smaller.head) == (6, 3, MODEL.head)
    np.testing.assert_allclose(logits(smaller, cut), logits(MODEL, params), atol=1e-5)


def test_the_slopes_are_what_the_loss_loses() -> None:
    """Of a mask on one head, against a difference of the loss."""
    params, one = sharp_params(MODEL), trained(sharp_params(MODEL))
    row_RT = ROWS_RT[:1]

    def loss(scale: float) -> float:
        own = changed(params, "attention", "out", (1, slice(4, 6)), 0.0)
        weight = params["blocks"]["attention"]["out"]["weight"]
        own["blocks"]["attention"]["out"]["weight"] = weight.at[1, 4:6].multiply(scale)
        module = model_of(MODEL)(own)
        batch = importance._batch(jnp.asarray(row_RT))
        sums = module.losses(module.hidden(batch).x_BTD, batch.targets_BT, batch.weights_BT)
        return float(sums.loss) / float(batch.weights_BT.sum())

    slope = (loss(1.05) - loss(0.95)) / 0.1
    found = importance.of_heads(one, row_RT)[1, 2]
    assert found >= abs(slope) * 0.98  # sizes of both heads' slopes, which may have different signs


def test_units_that_do_nothing_go_first() -> None:
    params, silent = (
        sharp_params(MODEL),
        np.array([[0, 5, 9, 23], [1, 2, 3, 4], [8, 9, 10, 11], [20, 21, 22, 23]]),
    )
    for layer, units in enumerate(silent):
        params = changed(params, "mlp", "down", (layer, units))
    scores_LF = importance.of_units(trained(params), ROWS_RT)
    assert np.sort(np.argsort(scores_LF, -1)[:, :4], -1).tolist() == silent.tolist()
    smaller, cut = importance.without_units(MODEL, params, importance.most(scores_LF, 20))
    assert smaller.hidden == 20
    np.testing.assert_allclose(logits(smaller, cut), logits(MODEL, params), atol=1e-5)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    native_run(folder, MODEL)
    (folder.parent / "text.txt").write_text("the cat sat on the mat. " * 40)
    return folder


def test_the_command_writes_an_ordinary_run(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, text = tmp_path / "small", str(run.parent / "text.txt")
    asked = ["--layers", "2", "--heads", "4", "--width", "16", "--text", text, "--rows", "2"]
    assert main(["prune", str(run), str(out), *asked]) == 0
    model = load_run(out).model
    assert isinstance(model, GPT)
    assert (model.layers, model.heads, model.groups, model.hidden, model.head) == (2, 4, 2, 16, 4)
    assert jax.tree.leaves(load_trained(out).params)[0].size
    record = json.loads((out / RECORD).read_text())
    assert record["after"]["parameters"] < record["before"]["parameters"]
    assert record["after"]["loss"] > 0
    assert len(record["kept"]["layers"]) == 2
    assert "tokens/s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({}, "nothing is asked for"),
        ({"layers": 9}, "the model has 4"),
        ({"heads": 3}, "a multiple of 2"),
        ({"width": 16, "text": ()}, "0 tokens"),
    ],
)
def test_what_cannot_be_is_said(asked: dict[str, Any], why: str, run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=why):
        prune(str(run), str(tmp_path / "out"), **({"text": (str(run.parent / "text.txt"),)} | asked))
    assert not (tmp_path / "out").exists()
