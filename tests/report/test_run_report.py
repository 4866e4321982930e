"""The page of a run: what it says of the run, and what damaged files cost it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markup import RECORDS, Parts

from jaxgpt.report import read_metrics, run_report


def test_damaged_records_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    good = [{"step": i, "loss": 1.0} for i in range(3)]
    lines = [json.dumps(r).encode() for r in good]
    path.write_bytes(b"\n".join(lines))
    assert read_metrics(path) == good
    for damage in (
        b'{"step": 9, "lo',
        b"\xff\xfe",
        b"\0\0\0",
        b"[" * 9999,
        b"3",
        b'{"loss": 1}',
        b'{"step": -1}',
    ):
        path.write_bytes(b"\n\n".join([lines[0], damage, *lines[1:]]) + b"\n")
        assert read_metrics(path) == good, damage
    # Halves that make one record together, and two records on one line, are no records.
    path.write_bytes(b"\n".join([*lines, b'{"step": 7', b'"loss": 7}']))
    assert read_metrics(path) == good
    path.write_bytes(b"\n".join([b",".join(lines), *lines]))
    assert read_metrics(path) == good


@settings(deadline=None, max_examples=60)
@given(st.lists(st.binary(max_size=30) | RECORDS.map(lambda r: json.dumps(r[:1])[1:-1].encode()), max_size=6))
def test_a_report_is_written_whatever_metrics_hold(
    tmp_path_factory: pytest.TempPathFactory, lines: list
) -> None:
    folder = tmp_path_factory.mktemp("run")
    (folder / "metrics.jsonl").write_bytes(b"\n".join(lines))
    assert run_report(folder) == folder / "report.html"


def test_the_report_of_a_run_says_its_best_and_how_to_go_on(tmp_path: Path) -> None:
    folder = tmp_path / "a run <b>"
    folder.mkdir()
    records = [
        {"step": 0, "event": "compiled", "lower_seconds": 1.0, "compile_seconds": 2.5},
        {"step": 1, "loss": 3.0, "tokens_per_second": 1000.0},
        {"step": 2, "loss": None, "tokens_per_second": 3000.0},
        {"step": 2, "val_loss": 2.5, "val_bits_per_byte": 1.25},
        {"step": 4, "val_loss": None},
        {"step": 6, "val_loss": 2.75, "val_bits_per_byte": 1.5, "val_accuracy": 0.375},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (folder / "config.json").write_text('{"parameters": 124439808}')
    page = run_report(folder)
    assert page == folder / "report.html"
    words = Parts(page.read_text("utf-8")).words
    for part in (
        "2.5nats per target, at step 2",
        "1.25of",
        "0.375share",
        "step 6",
        "2,000median",
        "124.4M",
        "3.5trace",
    ):
        assert part in words
    assert f"jaxgpt sample '{folder}' --prompt" in words  # quoted as a shell needs it
    assert not Parts(page.read_text("utf-8")).of("i")
    (folder / "config.json").write_text('{"run": {"objective": {"kind": "MaskedLM"}}}')
    run_report(folder)
    assert f"jaxgpt eval '{folder}'" in Parts(page.read_text("utf-8")).words  # it writes no text


@pytest.mark.parametrize("config", ["{", "[1]", '{"parameters": {"a": "<b>"}}', "\udcff"], ids=ascii)
def test_a_damaged_config_costs_its_figure_alone(config: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    (tmp_path / "config.json").write_bytes(config.encode("utf-8", "surrogateescape"))
    assert run_report(tmp_path) == tmp_path / "report.html"


def test_a_report_that_cannot_be_made_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert run_report(tmp_path / "nowhere") is None
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    (tmp_path / "report.html").mkdir()
    assert run_report(tmp_path) is None
    assert [r.levelname for r in caplog.records] == ["WARNING"] * 2
    assert f"no report of {tmp_path}: " in caplog.text
