"""The learning-rate range test: its schedule, how a curve is read, and a run of the command."""

import json
from dataclasses import replace

import numpy as np
import pytest
from tiny_runs import text_run

from jaxgpt.config import Mesh, Optim, to_json
from jaxgpt.data.prepare import prepare
from jaxgpt.errors import UserError
from jaxgpt.files import write_json
from jaxgpt.lr_find import lr_find, smooth, suggest
from jaxgpt.optim import schedule


def test_the_rate_rises_by_one_factor_per_step():
    optim = Optim(peak_lr=1.0, final_lr=1e-4, warmup_steps=0, schedule="range")
    rates = np.array([schedule(optim, 41)(i) for i in range(41)])
    np.testing.assert_allclose(rates, np.logspace(-4, 0, 41), rtol=1e-4)
    with pytest.raises(UserError, match="final_lr is 0"):
        replace(optim, final_lr=0.0)


def test_a_curve_is_read_as_it_was_made():
    """A loss that falls fastest at 1e-3, in the middle of a smooth step, and explodes beyond 1e-1."""
    rates = np.logspace(-6, 1, 141)
    losses = 5 - 3 / (1 + np.exp(-4 * (np.log10(rates) + 3))) + np.where(rates > 0.1, 200 * (rates - 0.1), 0)
    found = suggest(rates.tolist(), losses.tolist())
    assert found.steepest == pytest.approx(1e-3, rel=0.2)
    assert 0.03 < found.lowest <= 0.11
    assert found.suggestion == pytest.approx(min(found.steepest, found.lowest / 10))
    assert found.broke_at is not None and 0.1 < found.broke_at < 0.2
    assert suggest([1e-3, 1e-2, 1e-1], [3.0, 2.0, 1.0]).broke_at is None


def test_smoothing_neither_lags_nor_drags_a_spike_along():
    line = [10.0 - i for i in range(20)]
    assert smooth(line)[6:-6] == pytest.approx(line[6:-6])
    spiked = [1e3 if i == 9 else y for i, y in enumerate(line)]
    assert max(abs(a - b) for a, b in zip(smooth(spiked)[6:-6], line[6:-6], strict=True)) < 1.0


def test_the_command_leaves_a_curve_and_no_run(tmp_path, capsys):
    text = ("the dog sat. the cat ran. ") * 40
    (tmp_path / "text.txt").write_text(text)
    prepare([str(tmp_path / "text.txt")], tmp_path / "corpus", tokenizer="byte", split="tail", validation=0.1)
    run = text_run(tmp_path / "corpus", tmp_path / "runs", mesh=Mesh())
    write_json(tmp_path / "c.json", to_json(run))
    lr_find([str(tmp_path / "c.json"), "--steps", "20", "--lowest", "1e-5", "--highest", "1e-1"])
    assert not run.folder.exists()
    record = json.loads((run.folder.parent / f"{run.name}-lr-find.json").read_text())
    assert len(record["loss"]) == 20
    np.testing.assert_allclose(record["learning_rate"], np.logspace(-5, -1, 20), rtol=1e-4)
    assert "--optim.peak-lr" in capsys.readouterr().out
    assert "<svg" in (run.folder.parent / f"{run.name}-lr-find.html").read_text()


@pytest.mark.parametrize(
    "words", [["--steps", "5"], ["--steps", "x"], ["--lowest", "1", "--highest", "0.1"], ["--highest"]]
)
def test_a_range_that_is_none_is_refused(words):
    with pytest.raises(UserError, match=words[0] if words[0] != "--lowest" else "lowest < highest"):
        lr_find(["configs/shakespeare_char.py", *words])
