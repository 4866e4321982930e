"""Runs with --profile: their numbers stay the same, and their tables are sane."""

from __future__ import annotations

import json
import logging
import signal
from pathlib import Path

import pytest
from tiny_runs import STEPS, copy, curve, interrupt_at

from jaxgpt.config import load
from jaxgpt.errors import UserError
from jaxgpt.models import flops_per_token
from jaxgpt.report.profiled import SHOWN, Profiled
from jaxgpt.train_command import train


def table(folder: Path, first: int, last: int) -> Profiled:
    return json.loads((folder / f"profile/steps_{first}-{last}/operations.json").read_text("utf-8"))


def test_a_profile_says_where_the_time_goes_and_changes_no_number(
    trained: Path,
    text_config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A first trace is cut off by a signal and has no table; the resumed run has one of other steps, between
    which lie an evaluation and a checkpoint.
    """
    words = [str(text_config), "--runs", str(tmp_path)]
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, logger="jaxgpt"):
        interrupt_at(patch, 4, signal.SIGTERM)
        assert train([*words, "--profile", "2:7"]) == 75
    assert "training ended before step 7" in caplog.text
    assert train([*words, "--profile", "7:9"]) == 0
    assert not (tmp_path / "text/profile/steps_2-7/operations.json").exists()
    folder = tmp_path / "text"
    assert curve(folder) == curve(trained)
    found = table(folder, 7, 9)
    rows, run = found["operations"], load(folder)
    assert (found["first"], found["last"], found["devices"]) == (7, 9, 8)
    assert found["seconds"] > 0
    assert found["idle"] + sum(row["seconds"] for row in rows) == pytest.approx(found["seconds"])
    assert sum(row["share"] for row in rows) == pytest.approx(1 - found["idle"] / found["seconds"])
    assert sorted(rows, key=lambda row: -row["seconds"]) == rows
    scopes = {row["scope"] for row in rows}
    assert scopes >= {"layers/attention", "layers/attention/softmax", "layers/mlp", "layers/norm", "norm"}
    assert scopes >= {"embedding", "loss", "optimizer"}
    tokens = run.train.batch_size * run.length / found["devices"]
    products = sum(row["flops"] or 0 for row in rows if row["product"])
    assert products == pytest.approx(tokens * flops_per_token(run.model, run.length), rel=0.05)
    said = (folder / "profile/steps_7-9/operations.txt").read_text("utf-8")
    assert len(said.splitlines()) == SHOWN + 3  # two lines of heads, and one of the rest
    assert said in capfd.readouterr().err
    assert list(folder.glob("profile/steps_7-9/plugins/profile/*/*.xplane.pb"))
    assert "Where the time goes" in (folder / "report.html").read_text("utf-8")


def test_steps_that_are_not_to_come_leave_the_run_as_it_is(
    trained: Path, text_config: Path, tmp_path: Path
) -> None:
    folder = copy(trained, tmp_path)
    with pytest.raises(UserError, match=f"--profile 3:4 begins before .* {STEPS + 1}; it has done all"):
        train([str(text_config), "--runs", str(tmp_path), "--profile", "3:4"])
    assert curve(folder) == curve(trained)
    assert not (folder / "profile").exists()
    fresh = tmp_path / "fresh"
    with pytest.raises(UserError, match=f"--profile 3:99 ends after the run's last step, {STEPS};"):
        train([str(text_config), "--runs", str(fresh), "--profile", "3:99"])
    assert not fresh.exists()
