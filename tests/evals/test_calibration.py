"""Calibration errors by hand and by an independent formula; a temperature that is known is found."""

from __future__ import annotations

import itertools

import jax
import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

from jaxgpt.errors import UserError
from jaxgpt.evals.calibration import (
    calibration,
    choice_probabilities,
    fit_temperature,
    token_calibration,
)
from jaxgpt.evals.checks import calibration_result, choice_calibration
from jaxgpt.evals.loss import loss_of
from jaxgpt.evals.result import Settings
from jaxgpt.evals.scoring import Scorer
from jaxgpt.evals.tasks import choice_scores, read_task, run_task
from jaxgpt.evals.temperature import save_temperature, sharpened, temperature_of
from jaxgpt.files import write_jsonl
from jaxgpt.sample.load import load_trained


def drawn(count: int, classes: int, temperature: float, seed: int = 0):
    """Logits, and labels drawn from their softmax at a temperature."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(count, classes)) * 2
    gumbel = -np.log(-np.log(rng.random(logits.shape)))
    return logits, (logits / temperature + gumbel).argmax(1)


def test_errors_by_hand():
    """Two bins: 0.9 and 0.9 of which one is right, 0.6 that is right: (2 |0.9 - 0.5| + 1 |0.6 - 1|) / 3."""
    p = np.array([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6]])
    found = calibration(p, np.array([0, 1, 1]))
    assert found.ece == pytest.approx((2 * 0.4 + 0.4) / 3)
    assert found.brier == pytest.approx(np.mean([2 * 0.01, 2 * 0.81, 2 * 0.16]))
    assert found.nll == pytest.approx(-np.mean(np.log([0.9, 0.1, 0.6])))
    assert [b.count for b in found.bins] == [1, 2]


def test_the_error_is_that_of_an_independent_formula():
    logits, gold = drawn(500, 4, 2.0)
    p = softmax(logits, -1)
    confidence, right = p.max(1), p.argmax(1) == gold
    edges, expected = np.linspace(0, 1, 16), 0.0
    for low, high in itertools.pairwise(edges):
        inside = (confidence >= low) & (confidence < high)
        if inside.any():
            expected += inside.mean() * abs(confidence[inside].mean() - right[inside].mean())
    assert calibration(p, gold).ece == pytest.approx(expected)
    order = np.argsort(confidence, kind="stable")
    parts = np.split(order, [i * 500 // 15 + (i * 500 % 15 > 0) for i in range(1, 15)])
    mass = sum(len(i) / 500 * abs(confidence[i].mean() - right[i].mean()) for i in parts)
    assert calibration(p, gold).ece_mass == pytest.approx(mass)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_a_known_temperature_is_found(temperature):
    logits, gold = drawn(20_000, 5, temperature)
    p = softmax(logits, -1)
    found = fit_temperature(p, gold)
    assert found == pytest.approx(temperature, rel=0.05)
    nll = lambda t: -log_softmax(logits / t, -1)[np.arange(len(gold)), gold].mean()  # noqa: E731
    assert found == pytest.approx(minimize_scalar(nll, bounds=(0.1, 10), method="bounded").x, rel=1e-3)
    after = calibration(sharpened(p, found), gold)
    assert after.ece < 0.02 and (sharpened(p, found).argmax(1) == p.argmax(1)).all()


def test_choices_are_a_softmax_of_their_likelihoods():
    p, gold = choice_probabilities([(-1.0, -2.0), (-5.0, -3.0, -4.0)], [0, 1])
    np.testing.assert_allclose(p[0, :2], softmax([-1.0, -2.0]))
    np.testing.assert_allclose(p[1], softmax([-5.0, -3.0, -4.0]))
    assert p[0, 2] == 0 and calibration(p, gold).accuracy == 1


def test_tokens_of_a_run(text_run):
    """The likelihood at temperature 1 is the validation loss; the best temperature does not make it worse."""
    trained = load_trained(text_run)
    before, after, temperature = token_calibration(trained, batch_size=4)
    assert before.nll == pytest.approx(loss_of(trained, batch_size=4)["loss"], rel=1e-4)
    assert before.accuracy == pytest.approx(after.accuracy)
    assert after.nll <= before.nll and 0.25 <= temperature <= 4
    assert sum(b.count for b in before.bins) == sum(b.count for b in after.bins) > 0


def test_a_temperature_is_of_one_checkpoint(text_run, tmp_path, caplog):
    trained = load_trained(text_run)._replace(folder=tmp_path)
    assert temperature_of(trained) == 1.0
    save_temperature(trained, 1.7, "labels")
    assert temperature_of(trained) == 1.7
    assert temperature_of(trained, "tokens") == 1.0
    assert temperature_of(trained._replace(step=6)) == 1.0 and "not calibrated" in caplog.text
    again = {**trained.params, "embed": jax.tree.map(lambda x: x + 1, trained.params["embed"])}
    assert temperature_of(trained._replace(params=again)) == 1.0 and "other parameters" in caplog.text


def test_what_float32_cannot_hold_is_no_infinite_loss():
    """A tag that is certainly wrong has a probability of 0, since a logit 104 below the largest is none."""
    p, gold = np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([0, 1])
    assert calibration(p, gold).nll == pytest.approx(-np.log(np.finfo(np.float32).tiny) / 2)


def test_no_temperature_is_stored_where_every_prediction_is_right(tmp_path, labels_run):
    """The likelihood grows for ever as the temperature falls, and every confidence would become 1."""
    trained = load_trained(labels_run)._replace(folder=tmp_path)
    with pytest.raises(UserError, match=r"not stored"):
        calibration_result(trained, Settings(batch_size=4), fit=True)
    assert not list(tmp_path.iterdir())


def test_multiple_choice_of_a_file(text_run, tmp_path):
    """The confidence is that of the choice with the largest sum of log-probabilities, which `acc` counts."""
    path, records = tmp_path / "choices.jsonl", [("the cat", ["sat", "ran off"], 0), ("a", ["mat", "dog"], 1)]
    write_jsonl(path, [{"context": c, "choices": x, "label": y} for c, x, y in records])
    trained = load_trained(text_run)
    (found,) = choice_calibration(trained, Settings(batch_size=4), [str(path)])
    scorer, questions = Scorer.of(trained), read_task(path)
    sums = [[s.logprob for s in row] for row in choice_scores(scorer, questions, 4)]
    expected = np.mean([softmax(row).max() for row in sums])
    assert found.figures["confidence"].value == pytest.approx(expected)
    assert found.figures["accuracy"].value == run_task(scorer, questions, 4)["acc"].value
