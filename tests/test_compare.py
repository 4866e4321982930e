"""Runs compared: what differs, means over seeds with their spread, folders of runs, and what is damaged."""

from __future__ import annotations

import json
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from statistics import stdev

import pytest
from tiny import make_run

from jaxgpt.cli import main
from jaxgpt.compare import compare_runs
from jaxgpt.config import Optim, Run, Train, to_json
from jaxgpt.errors import UserError
from jaxgpt.report.measure import by_seed
from jaxgpt.sweep import over_seeds

LOSSES = {"a-s0": 2.0, "a-s1": 2.2, "b-s0": 1.5}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two seeds of one run, and another with other dropout."""
    for name, loss in LOSSES.items():
        base = make_run(train=Train(steps=4, batch_size=2, seed=int(name[-1])), optim=Optim(warmup_steps=1))
        model = replace(base.model, dropout=0.5 if name[0] == "b" else 0.0)
        save(replace(base, name=name, model=model), tmp_path / name, loss)
    return tmp_path


def save(run: Run, folder: Path, loss: float) -> None:
    (folder / "eval").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"run": to_json(run)}))
    lines = [
        {"step": 2, "step_seconds": 0.5, "tokens_per_second": 64.0, "loss": 3.0},
        {"step": 2, "val_loss": loss + 1},
        {"step": 4, "step_seconds": 0.5, "tokens_per_second": 64.0, "loss": 2.0},
        {"step": 4, "val_loss": loss},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    figure = {"name": "Strict F1", "value": loss / 10, "standard_error": None}
    table = {"title": "Labels", "step": 4, "figures": {"f1": figure}}
    (folder / "eval" / "validation.json").write_text(json.dumps(table))


def test_seeds_are_one_line_with_their_spread(runs: Path) -> None:
    rows = compare_runs([runs / name for name in LOSSES])
    assert [row["val_loss"] for row in rows] == list(LOSSES.values())
    assert rows[1]["differs"] == {"train.seed": 1} and rows[2]["differs"] == {"model.dropout": 0.5}
    both, alone = by_seed(rows)
    assert both["name"] == "a (2 seeds)" and alone["name"] == "b-s0"
    assert both["val_loss"] == pytest.approx(2.1) and both["differs"] == {}
    assert both["spread"]["val_loss"] == pytest.approx(stdev([2.0, 2.2]))
    assert both["figures"]["validation: Strict F1"] == pytest.approx(0.21)
    tokens = [2 * 2 * 16, 4 * 2 * 16]
    assert both["curve"] == [(tokens[0], pytest.approx(3.1)), (tokens[1], pytest.approx(2.1))]
    assert both["band"] == [(tokens[0], 3.0, 3.2), (tokens[1], 2.0, 2.2)]


def test_the_command_prints_and_writes_the_comparison(runs: Path) -> None:
    with redirect_stdout(StringIO()) as said:
        assert main(["compare", str(runs)]) == 0  # a folder of runs stands for all in it
    words = " ".join(said.getvalue().split())
    assert "3 runs compared" in words and "Strict F1" in words
    page = (runs / "compare.html").read_text()
    assert "a (2 seeds)" in page and "2.1000 ± 0.14" in page and "model.dropout 0.5" in page
    assert "| a (2 seeds) |" in (runs / "compare.md").read_text()
    assert len(json.loads((runs / "compare.json").read_text())["runs"]) == 3
    with redirect_stdout(StringIO()):
        assert main(["compare", str(runs / "a-s0"), str(runs / "b-s0"), "--out", str(runs / "out")]) == 0
    assert (runs / "out" / "compare.html").is_file()


def test_runs_without_numbers_and_damaged_ones_are_compared_too(runs: Path) -> None:
    (runs / "a-s1" / "metrics.jsonl").unlink()
    (runs / "b-s0" / "metrics.jsonl").write_bytes(b'{"step": 4, "lo')
    (runs / "b-s0" / "eval" / "validation.json").write_text("{")
    rows = compare_runs([runs / name for name in LOSSES])
    assert "val_loss" not in rows[1] and "val_loss" not in rows[2]
    assert rows[1]["state"] == "step 0 of 4" and "val_loss" not in by_seed(rows)[0]


def test_what_is_no_run_is_said(tmp_path: Path) -> None:
    with redirect_stdout(StringIO()):
        assert main(["compare", str(tmp_path / "nothing")]) == 2
        assert main(["compare", str(tmp_path)]) == 2
    with pytest.raises(UserError, match="is no run folder, and none is in it"):
        from jaxgpt.compare import compare

        compare((str(tmp_path),))


def test_a_sweep_is_repeated_over_seeds() -> None:
    run = make_run(train=Train(seed=5))
    made = over_seeds({"x": replace(run, name="x")}, 3)
    assert {name: one.train.seed for name, one in made.items()} == {"x-s5": 5, "x-s6": 6, "x-s7": 7}
    assert [one.name for one in made.values()] == list(made)
    assert over_seeds({"x": run}, 1) == {"x": run}
