"""What a run may be resumed with, and what it may start from: the same parameters, or one sentence."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny import assert_close, assert_same
from tiny_runs import COMPUTE, MODEL, OPTIM, TRAIN, curve, restore, saved, text_run

from jaxgpt.config import (
    GPT,
    Classification,
    Classifier,
    Labelled,
    RopeScaling,
    Run,
    Text,
    load,
    load_run,
    override,
)
from jaxgpt.data.readers import run_tokenizer
from jaxgpt.errors import UserError
from jaxgpt.optim import schedule, stable_until
from jaxgpt.sample.load import load_trained
from jaxgpt.train import loop
from jaxgpt.train.changes import check_base

WSD = replace(OPTIM, schedule="wsd", decay_fraction=0.25)
SHORT = replace(TRAIN, steps=8, save_every=100, eval_every=4, eval_batches=1)
ROPE = replace(MODEL, position="rope")


def train(run: Run) -> Path:
    loop.train(run, progress=False)
    return run.folder


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of 12 steps from the start, one of each schedule that can be made longer."""
    runs = tmp_path_factory.mktemp("whole")
    optims = {"wsd": WSD, "constant": replace(WSD, schedule="constant")}
    return {
        name: train(text_run(corpus, runs, name, optim=optim, train=replace(SHORT, steps=12)))
        for name, optim in optims.items()
    }


def test_a_longer_wsd_run_branches_off_before_the_decay(
    whole: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    """8 steps, of which the last 2 decay, made 12: the step 6 was kept without being asked for."""
    run = text_run(corpus, tmp_path, "wsd", optim=WSD, train=SHORT)
    folder = train(run)
    assert saved(folder) == [4, 6, 8] or saved(folder) == [6, 8]
    ended = load_trained(folder, which="newest").params
    longer = replace(run, train=replace(SHORT, steps=12, eval_every=3, save_every=5))
    train(longer)
    assert_same(restore(folder)[0].params, restore(whole["wsd"])[0].params)
    losses = [one for one in curve(folder) if one[1] == "loss"]
    assert losses == [one for one in curve(whole["wsd"]) if one[1] == "loss"]
    assert load(folder).train == longer.train  # and what later commands read says so
    kept = load_trained(folder / "branches" / "8", which="newest")
    assert kept.step == 8 and kept.run.train.steps == 8
    assert_same(kept.params, ended)


def test_a_constant_run_goes_on_where_it_ended(whole: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    run = text_run(corpus, tmp_path, "constant", optim=replace(WSD, schedule="constant"), train=SHORT)
    folder = train(run)
    train(replace(run, train=replace(SHORT, steps=12)))
    assert_same(restore(folder)[0].params, restore(whole["constant"])[0].params)
    assert not (folder / "branches").exists()


def test_a_constant_run_ends_with_a_decay(whole: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    """Of 12 steps the last 3 decay, and 8 were done at the peak: as the wsd run of 12, but for rounding."""
    constant = replace(WSD, schedule="constant")
    run = text_run(corpus, tmp_path, "run", optim=constant, train=SHORT)
    folder = train(run)
    train(replace(run, optim=WSD, train=replace(SHORT, steps=12)))
    ended, wanted = (restore(one)[0].params for one in (folder, whole["wsd"]))
    assert_close(ended, wanted, 1e-5)
    assert load(folder).optim == WSD and not (folder / "branches").exists()
    with pytest.raises(
        UserError, match="keeps no checkpoint of step 3 or before, from which a run of 12 steps"
    ):
        train(replace(load(folder), optim=replace(WSD, decay_fraction=0.8)))


def test_what_no_step_depends_on_may_change_and_is_stored(whole: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole["constant"], tmp_path / "constant"))
    run = replace(load(folder), runs=str(tmp_path))
    parts = {"eval_every": 2, "patience": 9}
    train(replace(run, train=replace(run.train, **parts)))
    assert load(folder).train.eval_every == 4  # it has ended: nothing was computed with the new fields
    changed = replace(run, train=replace(run.train, steps=13, **parts))
    train(replace(changed, compute=replace(COMPUTE, loss_chunk=64)))
    assert load(folder).compute.loss_chunk == 64 and load(folder).train.eval_every == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"optim": OPTIM, "train": replace(SHORT, steps=9)},
            "with optim.schedule 'cosine' every",
        ),
        ({"optim": replace(WSD, peak_lr=1e-3)}, "holds a run with optim.peak_lr 0.003, not 0.001"),
        ({"train": replace(SHORT, seed=1)}, "holds a run with train.seed 0, not 1"),
        ({"model": ROPE}, "holds a run with model.position 'learned', not 'rope'"),
    ],
)
def test_what_steps_depend_on_may_not_change(
    corpus: Path, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    held = text_run(corpus, tmp_path, "run", optim=change.get("optim", WSD), train=SHORT)
    if "peak_lr" in words:
        held = replace(held, optim=WSD)
    held.folder.mkdir()
    (held.folder / "config.json").write_text(json.dumps({"run": _json(held)}))
    before = (held.folder / "config.json").read_bytes()
    with pytest.raises(UserError, match=words):
        train(replace(held, **change))
    assert (held.folder / "config.json").read_bytes() == before


def _json(run: Run) -> Any:
    from jaxgpt.config import to_json

    return to_json(run)


def test_no_checkpoint_to_branch_off_from_is_said(corpus: Path, tmp_path: Path) -> None:
    run = text_run(corpus, tmp_path, "wsd", optim=WSD, train=SHORT)
    folder = train(run)
    for step in set(saved(folder)) - {8}:
        shutil.rmtree(folder / "checkpoints" / str(step))
    with pytest.raises(UserError, match="keeps no checkpoint of step 6 or before"):
        train(replace(run, train=replace(SHORT, steps=12)))
    assert load(folder).train.steps == 8 and saved(folder) == [8]


@pytest.mark.parametrize("warmup", [0, 1, 3])
@pytest.mark.parametrize("decay", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("steps", [(10, 20), (12, 13), (7, 40)])
def test_the_stable_phase_is_the_longest_beginning_that_longer_runs_share(
    warmup: int, decay: float, steps: tuple[int, int]
) -> None:
    optim = replace(WSD, warmup_steps=warmup, decay_fraction=decay)
    short, long = (schedule(optim, n) for n in steps)
    shared = 0
    while shared < steps[0] and float(short(shared)) == float(long(shared)):
        shared += 1
    assert shared == min(stable_until(optim, n) for n in steps)


# -------------------------------------------------------------------------------------------- init_from


@pytest.fixture(scope="module")
def rope(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = text_run(corpus, tmp_path_factory.mktemp("rope"), "rope", model=ROPE, train=replace(SHORT, steps=3))
    return train(run)


def test_a_model_without_a_table_of_positions_takes_a_longer_context(
    rope: Path, corpus: Path, tmp_path: Path
) -> None:
    scaled = replace(ROPE, context=64, rope_scaling=RopeScaling(form="linear", factor=2.0), windows=(16, 0))
    short = replace(SHORT, steps=3)
    run = text_run(corpus, tmp_path, "longer", model=scaled, init_from=str(rope), train=short)
    train(run)
    assert run.length == 64 and load_trained(run.folder).run.model == scaled


def test_a_table_of_positions_has_no_more_rows(whole: dict[str, Path]) -> None:
    base = whole["wsd"]
    run = replace(load(base), init_from=str(base), model=replace(MODEL, context=64))
    with pytest.raises(UserError, match=r"position.weight with shape \(32, 32\), not \(64, 32\); keep"):
        check_base(run, run_tokenizer(run))


def test_a_run_has_the_model_of_the_one_it_starts_from(rope: Path, corpus: Path, tmp_path: Path) -> None:
    parts: dict[str, Any] = {"name": "tuned", "data": Text(path=str(corpus)), "runs": str(tmp_path)}
    assert Run(**parts, init_from=str(rope)).model == ROPE
    assert Run(**parts).model == GPT()
    later = override(Run(**parts), ["--init-from", str(rope), "--model.dropout", "0.5"])
    assert later.model == replace(ROPE, dropout=0.5)
    given = override(Run(**parts, model=MODEL), [f"--init-from={rope}"])
    assert given.model == MODEL  # what a config gives stays, and is compared when it starts
    labels = Classifier(labels=("a", "b"), pool="last")
    data = Labelled(train=("a.tsv",), validation=("b.tsv",))
    made = Run(**parts | {"data": data}, model=labels, objective=Classification(), init_from=str(rope))
    assert made.model == replace(labels, backbone=ROPE)
    with pytest.raises(UserError, match=r"model.backbone is missing; name one, or in init_from"):
        Run(**parts | {"data": data}, model=labels, objective=Classification())
    with pytest.raises(UserError, match=r"init_from 'nowhere' is no run folder: nowhere/config.json"):
        Run(**parts, init_from="nowhere")


def test_a_config_file_without_a_model_is_stored_with_it(rope: Path, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from jaxgpt.config import *\n"
        "def config():\n"
        f"    return Run(name='mine', data=Text(path={str(corpus)!r}), init_from={str(rope)!r},"
        f" runs={str(tmp_path)!r}, train=Train(steps=1, batch_size=8), optim=Optim(warmup_steps=1))\n"
    )
    folder = train(load(tmp_path / "mine.py"))
    assert json.loads((folder / "config.json").read_text())["run"]["model"]["position"] == "rope"
    assert load_run(folder).model == ROPE
