"""Extending a run: on several processes, with a record of what was changed, and safe at any moment."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import OPTIM, TRAIN, ends, records, saved, start_cluster, strict, text_run, tree, write_config

from jaxgpt.config import Classification, Classifier, Labelled, Mesh, Run, Train, load, override, to_json
from jaxgpt.errors import UserError
from jaxgpt.files import write_json
from jaxgpt.text.tokenizer import ByteTokenizer
from jaxgpt.train import loop
from jaxgpt.train.changes import check_base
from jaxgpt.train.hooks import check_folder
from jaxgpt.train.metrics import Metrics

WSD = replace(OPTIM, schedule="wsd", decay_fraction=0.25)
SHORT = replace(TRAIN, steps=8, save_every=100, eval_every=4, eval_batches=1)


@pytest.fixture(scope="module")
def short(corpus, tmp_path_factory) -> Run:
    """A wsd run of 8 steps whose last 2 decay, with checkpoints of the steps 4 (the first), 6 and 8."""
    run = text_run(corpus, tmp_path_factory.mktemp("short"), "wsd", optim=WSD, train=replace(SHORT, keep=3))
    loop.train(run, progress=False)
    return run


def longer(short: Run, runs: Path) -> Run:
    """A copy of its folder and what extends it to 12 steps."""
    shutil.copytree(short.folder, runs / short.name)
    return replace(short, runs=str(runs), train=replace(short.train, steps=12, save_every=50))


def test_what_was_changed_is_on_record(short, tmp_path) -> None:
    run = longer(short, tmp_path)
    loop.train(run, progress=False)
    said = "train.save_every 100 -> 50, train.steps 8 -> 12"
    (event,) = records(run.folder, "changes")
    assert event == {"step": 6, "event": "changed", "changes": said}
    assert load(run.folder) == run
    starts = [json.loads(path.read_text()) for path in sorted((run.folder / "provenance").glob("*.json"))]
    assert [start["step"] for start in starts] == [0, 6]
    assert starts[1]["changes"] == {"train.save_every": [100, 50], "train.steps": [8, 12]}
    assert starts[0]["changes"] == {}


def test_a_change_stays_on_record_where_it_has_to_begin_again(short, tmp_path, monkeypatch) -> None:
    run, plain = longer(short, tmp_path), Metrics.write

    def write(self: Metrics, step: int, record: dict[str, Any]) -> None:
        if step == 7:
            raise RuntimeError("the power is gone")
        plain(self, step, record)

    monkeypatch.setattr(Metrics, "write", write)
    with pytest.raises(RuntimeError, match="the power is gone"):
        loop.train(run, progress=False)
    monkeypatch.undo()
    loop.train(run, progress=False)
    lines = [strict(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in lines if r.get("event") == "changed"] == [6]
    assert [r["step"] for r in lines if "loss" in r] == list(range(1, 13))
    assert len(list((run.folder / "branches").iterdir())) == 1


def test_a_folder_stays_as_it_is_where_nothing_can_be_restored(short, tmp_path) -> None:
    """Damaged checkpoints of the stable phase: the end that is whole is not moved, nor the config changed."""
    run = longer(short, tmp_path)
    for step in set(saved(run.folder)) - {8}:
        for path in (run.folder / "checkpoints" / str(step) / "params").rglob("*"):
            if path.is_file():
                path.write_bytes(b"")
    before = tree(run.folder)
    with pytest.raises(UserError, match=r"every checkpoint of .* is damaged"):
        loop.train(run, progress=False)
    assert tree(run.folder) | {".lock": b""} == before | {".lock": b""}


def test_epochs_are_compared_by_the_steps_they_come_to(short, tmp_path) -> None:
    """Before the data are read (as a sweep does), and after: other data of as many epochs are other steps."""
    run = replace(short, runs=str(tmp_path), optim=OPTIM, train=replace(SHORT, epochs=2.0, steps=20))
    write_json(run.folder / "config.json", {"run": to_json(run)})
    (run.folder / "checkpoints/20/rest").mkdir(parents=True)
    assert check_folder(run).fields == {}
    assert check_folder(replace(run, train=replace(run.train, steps=Train().steps))).fields == {}
    with pytest.raises(UserError, match=r"has train\.steps 20, not 30, and with optim\.schedule 'cosine'"):
        check_folder(replace(run, train=replace(run.train, steps=30)))


@pytest.mark.parametrize("flag", ["--init-from {}", "--init-from={}", "--init_from {}"])
def test_a_base_named_by_a_flag_gives_the_backbone(tmp_path, short, flag) -> None:
    """Also in place of the one that the file names."""
    other = replace(short, model=replace(short.model, layers=3))
    for name, run in (("one", short), ("other", other)):
        write_json(tmp_path / name / "config.json", {"run": to_json(run)})
    path = tmp_path / "tagger.py"
    path.write_text(
        "from jaxgpt.config import *\n\ndef config():\n"
        "    return Run(name='t', model=Classifier(labels=('a', 'b'), pool='last'),\n"
        "        objective=Classification(), data=Labelled(train=('x',), validation=('y',)),\n"
        f"        init_from={str(tmp_path / 'one')!r})\n"
    )
    assert load(path).model.backbone == short.model
    flags = [*flag.format(tmp_path / "other").split(), "--model.pool", "mean"]
    assert override(load(path), flags).model == Classifier(
        backbone=other.model, labels=("a", "b"), pool="mean"
    )


def test_labels_of_a_base_keep_their_meaning(tmp_path, short) -> None:
    """Of as many labels the shapes are the same, and what the head says would be another label."""
    model = Classifier(backbone=short.model, labels=("a", "b"), pool="last")
    data = Labelled(train=("x.tsv",), validation=("y.tsv",))
    base = replace(short, model=model, data=data, objective=Classification())
    write_json(tmp_path / "base" / "config.json", {"run": to_json(base)})
    run = replace(base, model=replace(model, labels=("b", "a")), init_from=str(tmp_path / "base"))
    with pytest.raises(UserError, match=r"labels \['a', 'b'\], not \['b', 'a'\]"):
        check_base(run, ByteTokenizer())


@pytest.mark.slow
def test_several_processes_extend_a_run_together(corpus, tmp_path) -> None:
    run = text_run(corpus, tmp_path, "wsd", optim=WSD, train=SHORT, mesh=Mesh(data=1, fsdp=-1))
    words = ("train", str(write_config(run, tmp_path)))
    for more in ((), ("--train.steps", "12")):
        for code, _, err in ends(start_cluster(*words, *more)):
            assert code == 0, err
    assert load(run.folder).train.steps == 12
    assert saved(run.folder)[-1] == 12
    assert saved(run.folder / "branches" / "8") == [8]
