"""Trackers get the numbers of metrics.jsonl; real TensorBoard events, and wandb in its offline mode."""

from __future__ import annotations

import json
import signal
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import TRAIN, interrupt_at, records, text_run, write_config

from jaxgpt.cli import main
from jaxgpt.config import Train, load, override
from jaxgpt.errors import UserError
from jaxgpt.train import loop
from jaxgpt.train.trackers import TRACKERS, Kind, Wandb, chosen

pytest.importorskip("tensorboardX")
wandb = pytest.importorskip("wandb")
FEW = replace(TRAIN, steps=4, eval_every=4, save_every=2)
BLOCK = 2**15


def chunks(data: bytes) -> Iterator[bytes]:
    """The records of a LevelDB log, which wandb's file is after seven bytes that name it."""
    assert data[:4] == b":W&B"
    at, parts = 7, b""
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:  # no room for a header: the block is filled up
            at += BLOCK - at % BLOCK
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def wandb_runs(folder: Path) -> list[tuple[str, list[dict[str, Any]]]]:
    """The id and the rows of each process of a run, as `wandb sync` would send them."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        parsed = [Record.FromString(chunk) for chunk in chunks(path.read_bytes())]
        names = [r.run.run_id for r in parsed if r.WhichOneof("record_type") == "run"]
        rows = [r.history for r in parsed if r.WhichOneof("record_type") == "history"]
        items = [
            {item.key or item.nested_key[0]: json.loads(item.value_json) for item in row.item} for row in rows
        ]
        found.append((names[0], items))
    return found


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Path:
    """An empty working folder, and a home without a login."""
    for name in ("home", "work"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("WANDB_API_KEY", "WANDB_PROJECT", "WANDB_DIR", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    # It would advertise its tracer where another test of this process has imported a package it traces.
    monkeypatch.setenv("WANDB_DISABLE_WEAVE", "true")
    monkeypatch.chdir(tmp_path / "work")
    wandb.teardown()  # what it has read of the environment before
    return tmp_path / "work"


def test_wandb_gets_the_numbers_and_a_resumed_run_goes_on_in_the_same_one(
    corpus, tmp_path, elsewhere, monkeypatch, capfd
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = text_run(corpus, tmp_path, "tracked", train=replace(FEW, track=("wandb", "tensorboard")))
    interrupt_at(monkeypatch, 2, signal.SIGINT)
    first = loop.train(run)
    assert first.reason == "SIGINT"
    assert loop.train(run).reason == "finished"
    (name, before), (again, after) = wandb_runs(run.folder)
    assert name == again == (run.folder / "wandb/id").read_text()
    names = ("loss", "learning_rate", "grad_norm")
    rows = [[row["step"], *(row[n] for n in names)] for row in before + after if "loss" in row]
    assert rows == [[r["step"], *(r[n] for n in names)] for r in records(run.folder)]
    assert [row["val_loss"] for row in after if "val_loss" in row] == [
        r["val_loss"] for r in records(run.folder, "val_loss")
    ]
    assert list((run.folder / "tensorboard").iterdir())
    assert list(elsewhere.iterdir()) == []
    assert "wandb" not in "".join(capfd.readouterr()).lower()


def test_wandb_without_a_login_is_refused_and_leaves_nothing(corpus, tmp_path, elsewhere, capsys) -> None:
    path = write_config(text_run(corpus, tmp_path / "runs", "tracked", train=FEW), tmp_path)
    assert main(["train", str(path), "--train.track", "wandb"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("jaxgpt: wandb cannot start (No API key configured")
    assert said.endswith("set WANDB_MODE=offline (then `wandb sync`), or leave 'wandb' out of train.track.")
    assert not (tmp_path / "runs").exists()


def test_tensorboard_events_are_the_numbers(corpus, tmp_path) -> None:
    from tensorboardX.proto.event_pb2 import Event

    run = text_run(corpus, tmp_path, "events", train=FEW)  # where it is installed, unless others are named
    loop.train(run)
    (path,) = (run.folder / "tensorboard").iterdir()
    data, at, seen = path.read_bytes(), 0, []
    while at < len(data):  # TFRecord: length, its checksum, the event, its checksum
        (length,) = struct.unpack_from("<Q", data, at)
        event = Event.FromString(data[at + 12 : at + 12 + length])
        seen += [(event.step, v.simple_value) for v in event.summary.value if v.tag == "loss"]
        at += length + 16
    assert seen == [(r["step"], pytest.approx(r["loss"])) for r in records(run.folder)]


def test_no_tracker_is_a_choice(corpus, tmp_path) -> None:
    run = text_run(corpus, tmp_path, "alone", train=replace(FEW, steps=3, track=()))
    loop.train(run)
    assert not {"tensorboard", "wandb"} & {path.name for path in run.folder.iterdir()}
    assert load(run.folder) == run
    loop.train(replace(run, train=replace(run.train, track=None)))  # may change when a run is resumed


def test_a_tracker_that_is_not_installed_is_refused_at_once(corpus, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(TRACKERS, "wandb", Kind("a_package_that_is_not_here", Wandb))
    run = text_run(corpus, tmp_path / "runs", "tracked", train=replace(FEW, track=("wandb",)))
    with pytest.raises(UserError, match=r"^train\.track names 'wandb', but a_package_that_is_not_here is"):
        loop.train(run)
    assert not (tmp_path / "runs").exists()
    assert chosen(replace(run, train=FEW)) == ("tensorboard",)


def test_names_of_trackers_are_checked() -> None:
    with pytest.raises(UserError, match=r"train\.track\[0\] is 'wandbb'; did you mean 'wandb'\?"):
        Train(track=("wandbb",))  # pyrefly: ignore
    with pytest.raises(UserError, match="name every tracker once"):
        Train(track=("wandb", "wandb"))
    run = override(text_run(Path("x"), Path("y")), ["--train.track", "wandb", "tensorboard"])
    assert run.train.track == ("wandb", "tensorboard")
