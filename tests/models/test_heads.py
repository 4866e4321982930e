"""Heads over labels: pooling, packing, a frozen backbone, and initialisation from a pretrained one.

Shapes: B rows, T tokens per row, C labels.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import (
    FLOAT32,
    GPT2,
    ONE,
    V,
    assert_same,
    compile_step,
    make_run,
    mesh,
    model_of,
    packed,
    sharp_params,
)

from jaxgpt.batch import Batch
from jaxgpt.config import Bert, Classification, Classifier, Labelled, Optim, Run, Tagged, Train
from jaxgpt.models.heads import document_means
from jaxgpt.train.state import init_state, make_program

BERT = Bert(vocab_size=V, context=16, layers=2, width=32, heads=4, dropout=0.0)
LABELS = ("O", "B-X", "I-X")
FILES = {"train": ("none",), "validation": ("none",), "tokenizer": "byte"}


def classifier(backbone: Any = BERT, **fields: Any) -> Classifier:
    return Classifier(backbone=backbone, labels=LABELS, **({"head_dropout": 0.0} | fields))


def labelled_batch() -> Batch:
    """Two documents per row, whose labels follow from the tokens."""
    batch = packed([(9, 7)] * 4)
    return replace(batch, targets_BT=batch.tokens_BT % 3, weights_BT=(batch.segments_BT > 0) * 1.0)


def run_of(model: Classifier, optim: Optim | None = None) -> Run:
    data = Tagged(**FILES) if model.pool == "token" else Labelled(**FILES)
    optim = optim or Optim(peak_lr=1e-2, warmup_steps=1)
    parts = {"objective": Classification(), "data": data, "optim": optim}
    return make_run(model, train=Train(steps=20, batch_size=4), compute=replace(FLOAT32, unroll=1), **parts)


def train(run: Run, params: dict | None = None, count: int = 20) -> tuple[dict, dict, list[float]]:
    """(parameters before, after, losses) of some steps on one batch."""
    program = make_program(run, mesh(ONE))
    state, step, losses = init_state(run, program, params), compile_step(run, program), []
    before = state.params
    with jax.set_mesh(program.mesh):
        for _ in range(count):
            state, metrics = step(state, labelled_batch())
            losses.append(float(metrics["loss"]))
    return before, state.params, losses


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_frozen_backbone_stays_bitwise_and_its_head_learns(optimizer: str) -> None:
    optim = Optim(name=optimizer, peak_lr=1e-2, warmup_steps=1)
    before, after, losses = train(run_of(classifier(frozen=True), optim))
    assert_same(after["backbone"], before["backbone"])
    assert (np.asarray(after["head"]["weight"]) != np.asarray(before["head"]["weight"])).any()
    assert losses[-1] < losses[0]


def test_a_whole_model_learns_its_labels_from_the_backbone_it_is_given() -> None:
    given = sharp_params(BERT)
    before, after, losses = train(run_of(classifier()), {"backbone": given})
    assert_same(before["backbone"], given)
    assert losses[-1] < 0.5 * losses[0]
    moved = np.asarray(after["backbone"]["blocks"]["mlp"]["up"]["weight"])
    assert (moved != np.asarray(given["blocks"]["mlp"]["up"]["weight"])).any()


@pytest.mark.parametrize("backbone", [BERT, GPT2], ids=["bert", "gpt"])
@pytest.mark.parametrize("pool", ["token", "mean"])
def test_packed_documents_are_labelled_like_unpacked_ones(backbone: Any, pool: str) -> None:
    model = classifier(backbone, pool=pool)
    build, params = model_of(model), sharp_params(model)

    @jax.jit
    def logits(batch: Batch) -> jax.Array:
        module = build(params)
        return module.logits(module.hidden(batch).x_BTD)

    both = labelled_batch()
    second = jnp.roll(both.tokens_BT, -9, axis=1)
    segments_BT = jnp.zeros_like(second).at[:, :7].set(1)
    places_BT = jnp.broadcast_to(jnp.arange(16), second.shape)
    alone = replace(both, tokens_BT=second, segments_BT=segments_BT, positions_BT=places_BT)
    np.testing.assert_allclose(logits(both)[:, 9:], logits(alone)[:, :7], rtol=1e-4, atol=1e-4)


def test_a_document_mean_is_the_mean_of_its_own_tokens() -> None:
    x_BTD = jnp.float32(np.random.default_rng(0).standard_normal((1, 6, 3)))
    means = np.asarray(document_means(x_BTD, jnp.asarray([[1, 1, 2, 2, 2, 0]])))[0]
    x = np.asarray(x_BTD)[0]
    for here in ([0, 1], [2, 3, 4]):
        np.testing.assert_allclose(means[here], np.tile(x[here].mean(0), (len(here), 1)), rtol=1e-5)
