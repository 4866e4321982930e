"""The gradient noise scale against gradients whose noise is known."""

import jax
import numpy as np
import pytest
from tiny_runs import TRAIN, records, restore, text_run

from jaxgpt.config import Mesh, Train
from jaxgpt.errors import UserError
from jaxgpt.train.loop import train
from jaxgpt.train.noise import NoiseScale


def test_a_known_signal_and_noise_are_found():
    """Rows' gradients are G plus noise of total variance S: |G|^2 = 4, S = 400, so 100 rows of noise."""
    rng, width, rows, parts = np.random.default_rng(0), 50, 64, 4
    found = NoiseScale(rows, parts)
    for _ in range(400):
        row = np.full(width, 2 / width**0.5) + rng.normal(0, (400 / width) ** 0.5, (rows, width))
        micro = row.reshape(parts, -1, width).mean(1)
        found.update(float((micro**2).sum(1).mean()), float((micro.mean(0) ** 2).sum()))
    _, noise = found.averages
    assert noise == pytest.approx(400, rel=0.15)
    assert found.rows_of_noise == pytest.approx(100, rel=0.5)
    assert np.isnan(NoiseScale(rows, parts).rows_of_noise)


def test_one_step_by_hand():
    """Two microbatches of one row, gradients 3 and 1: mean of squares 5, square of the mean 4."""
    found = NoiseScale(2, 2)
    found.update(5.0, 4.0)
    signal, noise = (average / 0.05 for average in found.averages)
    assert (signal, noise) == pytest.approx((2 * 4 - 5, (5 - 4) / (1 - 1 / 2)))


def test_a_run_logs_it_and_goes_on_from_its_averages(corpus, tmp_path):
    fields = vars(TRAIN) | {
        "accumulate": 2,
        "batch_size": 16,
        "noise_scale": True,
        "steps": 6,
        "save_every": 3,
    }
    run = text_run(corpus, tmp_path, train=Train(**fields), mesh=Mesh(data=jax.device_count()))
    train(run, progress=False)
    whole = [r.get("noise_scale") for r in records(run.folder)]
    assert len(whole) == 6 and "microbatch_square" not in records(run.folder)[-1]
    signal, noise = restore(run.folder, {"data": 8})[1]["loop"]["noise"]
    assert noise / signal == pytest.approx(whole[-1]) or whole[-1] is None


def test_it_needs_microbatches():
    with pytest.raises(UserError, match=r"train\.accumulate is 1"):
        Train(noise_scale=True)
