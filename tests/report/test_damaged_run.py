"""What a run and a sweep leave beside their checkpoints, damaged at random: shown without what is damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from damage import damaged, damaged_copy
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt import quickstart
from jaxgpt.config import GPT, Run, Text, to_json
from jaxgpt.errors import UserError
from jaxgpt.report import run_report
from jaxgpt.report.sweep import markdown, write_sweep
from jaxgpt.sweep import _held_rows, measure

RUN = Run(name="run", model=GPT(context=16), data=Text(path="none"))
RECORDS: list[dict[str, Any]] = [
    {"step": 1, "loss": 3.0, "tokens_per_second": 900.0, "step_seconds": 0.5, "skipped": 0, "grad_norm": 1.0},
    {"step": 1, "event": "compiled", "compile_seconds": 2.0},
    {"step": 2, "val_loss": 2.5, "val_bits_per_byte": 1.0, "val_accuracy": 0.5},
]
FIGURE = {"name": "loss", "value": 2.5, "standard_error": None}
EVALUATION = {
    "title": "tags",
    "step": 2,
    "figures": {"loss": FIGURE},
    "report": "F1 0.5",
    "confusion": [["O", "B-X"], [[1, 0], [2, 3]]],
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    (folder / "eval").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    (folder / "config.json").write_text(json.dumps({"run": to_json(RUN), "parameters": 5}))
    (folder / "eval" / "tags.json").write_text(json.dumps(EVALUATION))
    row = {"name": "run", "run": to_json(RUN), "differs": {}, "state": "finished", "reason": ""}
    (folder / "sweep.json").write_text(json.dumps({"runs": [row | {"steps": 2, "curve": [[32, 2.5]]}]}))
    return folder


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_a_damaged_run_is_reported_without_what_is_damaged(run: Path, data: st.DataObject) -> None:
    with damaged_copy(run, data.draw(damaged(run))) as folder:
        page = run_report(folder)
        assert (page is not None) == (folder / "metrics.jsonl").is_file()
        held = Run(name="run", model=RUN.model, data=RUN.data, runs=str(folder.parent))
        rows = list(_held_rows({"run": RUN}, folder).values())
        measure(held)
        assert [row["name"] for row in rows] == ["run"]
        assert "| run |" in markdown(rows)
        write_sweep(folder / "sweep.html", "Sweep", rows, "")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("eval/tags.json", "[]", "eval/tags.json is damaged (Expected `object`, got `array`)"),
        ("eval/tags.json", json.dumps(EVALUATION | {"step": "2"}), "`$.step`, which is '2'"),
        ("eval/tags.json", json.dumps(EVALUATION | {"confusion": [["O"], [[1, 2]]]}), "row and column"),
        ("metrics.jsonl", json.dumps(RECORDS[0]) + '\n{"step": "2"}\n', "1 damaged lines of 2 are left out"),
        ("config.json", "[" * 5000, "config.json is damaged"),
    ],
)
def test_what_is_left_out_is_said(
    name: str, text: str, words: str, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with damaged_copy(run, []) as folder:
        (folder / name).write_text(text)
        assert run_report(folder) is not None
    assert words in caplog.text


def test_a_damaged_table_of_a_sweep_is_said_and_made_again(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with damaged_copy(run, []) as folder:
        assert _held_rows({"run": RUN}, folder)["run"]["steps"] == 2
        (folder / "sweep.json").write_text('{"runs": [{"name": "run", "steps": -1}]}')
        assert _held_rows({"run": RUN}, folder)["run"]["state"] == "waiting"
    assert "sweep.json is damaged" in caplog.text


def test_a_damaged_state_of_the_quickstart_is_said(tmp_path: Path) -> None:
    for text in ("", "[]", '{"seconds": -1}', '{"seconds": "1"}'):
        (tmp_path / quickstart.STATE).write_text(text)
        with pytest.raises(UserError, match=r"quickstart\.json is damaged .*; remove the work folder"):
            quickstart.quickstart(workdir=tmp_path)
