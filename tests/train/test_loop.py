"""The loop: what it dispatches before it fetches, what it skips, and when it ends."""

from __future__ import annotations

import json
import re
import shutil
import signal
from dataclasses import replace
from typing import Any

import jax
import pytest
from tiny import assert_same, mesh
from tiny_runs import (
    MODEL,
    STEPS,
    TRAIN,
    command,
    copy,
    curve,
    interrupt_at,
    records,
    restore,
    saved,
    text_run,
    tree,
    write_config,
)

from jaxgpt.checkpoint import load_params
from jaxgpt.cli import main
from jaxgpt.config import MaskedLM, Optim, Run, Train, load
from jaxgpt.data.loader import TrainIterator
from jaxgpt.errors import UserError
from jaxgpt.text.tokenizer import ByteTokenizer
from jaxgpt.text.train import train_sentencepiece
from jaxgpt.train import loop
from jaxgpt.train.metrics import Meter, Metrics

# ------------------------------------------------------------------------ dispatch and fetch


class Number:
    """A step's number on the device that notes when it is fetched."""

    def __init__(self, step: int, value: Any, events: list[str]) -> None:
        self.step, self.value, self.events = step, value, events

    def __float__(self) -> float:
        if f"fetch {self.step}" not in self.events:
            self.events.append(f"fetch {self.step}")
        return float(self.value)

    def is_ready(self) -> bool:
        return False


def test_numbers_are_fetched_after_the_next_step_was_dispatched(corpus, tmp_path, monkeypatch) -> None:
    """So that the devices never wait for the host; only evaluating and saving wait."""
    events, compile_step = list[str](), loop.Loop.compile

    def watched(self: loop.Loop, state: Any, token_bytes_V: Any) -> None:
        compile_step(self, state, token_bytes_V)
        step_fn = self.step_fn

        def dispatch(state: Any, *given: Any) -> Any:
            step = sum(event.startswith("dispatch") for event in events) + 1
            events.append(f"dispatch {step}")
            state, metrics = step_fn(state, *given)
            return state, {name: Number(step, value, events) for name, value in metrics.items()}

        self.step_fn = dispatch

    monkeypatch.setattr(loop.Loop, "compile", watched)
    loop.train(text_run(corpus, tmp_path, train=replace(TRAIN, steps=7, eval_every=5, save_every=100)))
    assert events == [
        *("dispatch 1", "dispatch 2", "fetch 1", "dispatch 3", "fetch 2", "dispatch 4", "fetch 3"),
        *("dispatch 5", "fetch 4", "fetch 5"),  # evaluated here
        *("dispatch 6", "dispatch 7", "fetch 6", "fetch 7"),
    ]


# ------------------------------------------------------------------------------- not finite


def poison(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """Give the batches of these steps a weight that is infinite."""
    plain = TrainIterator.__next__

    def poisoned(self: TrainIterator) -> Any:
        batch = plain(self)
        if self._at // self._batch in steps:
            batch.weights_BT[3, 5] = float("inf")
        return batch

    monkeypatch.setattr(TrainIterator, "__next__", poisoned)


def test_updates_that_are_not_finite_are_skipped_and_counted(corpus, tmp_path, monkeypatch) -> None:
    """The parameters stay: the validation loss shows it. The learning rate waits too."""
    poison(monkeypatch, 3, 4, 6)
    run = text_run(corpus, tmp_path, train=replace(TRAIN, steps=7, eval_every=1, max_bad_steps=3))
    assert loop.train(run).reason == "finished"
    seen = records(run.folder)
    assert [r["skipped"] for r in seen] == [0, 0, 1, 2, 2, 3, 3]
    assert [r["loss"] is None for r in seen] == [False, False, True, True, False, True, False]
    v = [r["val_loss"] for r in records(run.folder, "val_loss")]
    assert v[1] == v[2] == v[3] and v[4] == v[5]
    assert len(set(v)) == 4
    rates = [r["learning_rate"] for r in seen]
    assert rates[2] == rates[3] == rates[4] and rates[5] == rates[6]
    state = restore(run.folder)[0]
    assert (int(state.step), int(state.bad_steps)) == (7, 0)


def test_skipped_updates_are_counted_across_a_resume(corpus, tmp_path, monkeypatch) -> None:
    poison(monkeypatch, 2, 5, 6)
    config = write_config(text_run(corpus, tmp_path, train=replace(TRAIN, steps=7)), tmp_path)
    interrupt_at(monkeypatch, 5, signal.SIGTERM)  # in the middle of two bad ones
    assert main(["train", str(config)]) == 75
    assert main(["train", str(config)]) == 0
    seen = records(tmp_path / "text")
    assert [(r["step"], r["skipped"]) for r in seen] == list(
        zip(range(1, 8), [0, 1, 1, 1, 2, 3, 3], strict=True)
    )


def test_too_many_bad_updates_end_the_run_with_code_3(corpus, tmp_path, monkeypatch, capfd) -> None:
    poison(monkeypatch, *range(6, 100))
    train = replace(TRAIN, steps=30, save_every=2, eval_every=30, max_bad_steps=4)
    config = write_config(text_run(corpus, tmp_path, train=train), tmp_path)
    assert main(["train", str(config)]) == 3
    said, folder = capfd.readouterr(), tmp_path / "text"
    assert said.out == ""
    line = said.err.strip().splitlines()[-1]
    assert line.startswith("jaxgpt: 4 updates in a row up to step 9 had")
    assert f"the last good checkpoint is step 4 in {folder}" in line
    assert saved(folder) == [2, 4]  # nothing was saved in the middle of bad steps
    assert (folder / "report.html").is_file()
    assert main(["train", str(config)]) == 3  # and the same again from there
    assert "step 9" in capfd.readouterr().err


def test_a_learning_rate_that_blows_up_ends_the_run_with_code_3(corpus, tmp_path, capfd) -> None:
    """The real thing: parameters that overflow."""
    optim = Optim(
        peak_lr=1e6, final_lr=0.0, warmup_steps=0, weight_decay=1e6, clip_norm=0.0, schedule="constant"
    )
    run = text_run(corpus, tmp_path, optim=optim, train=replace(TRAIN, steps=50, max_bad_steps=3))
    assert main(["train", str(write_config(run, tmp_path))]) == 3
    assert "there is no checkpoint yet" in capfd.readouterr().err
    loss = records(tmp_path / "text")[-1]["loss"]
    assert loss is None or loss > 1e6


def test_parameters_that_are_nan_end_the_run_with_code_3_and_are_never_saved(
    corpus, tmp_path, monkeypatch, capfd
) -> None:
    """Also at the last step, whose own loss was fine: nothing is built on them."""
    compile_step = loop.Loop.compile

    def poisoned(self: loop.Loop, state: Any, objective: Any) -> None:
        compile_step(self, state, objective)
        step_fn = self.step_fn

        def step(state: Any, *given: Any) -> Any:
            state, metrics = step_fn(state, *given)
            if int(state.step) == 7:
                leaves, shape = jax.tree.flatten(state.params)
                leaves[0] = leaves[0].at[(0,) * leaves[0].ndim].set(float("nan"))
                state = replace(state, params=jax.tree.unflatten(shape, leaves))
            return state, metrics

        self.step_fn = step

    monkeypatch.setattr(loop.Loop, "compile", poisoned)
    train = replace(TRAIN, steps=7, eval_every=7)
    assert main(["train", str(write_config(text_run(corpus, tmp_path, train=train), tmp_path))]) == 3
    line = capfd.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("jaxgpt: at step 7 parameters are NaN or infinite: ")
    assert f"the last good checkpoint is step 6 in {tmp_path / 'text'}" in line
    assert saved(tmp_path / "text") == [3, 6]


# ---------------------------------------------------------------------------- early stopping

FLAT = Optim(peak_lr=1e-30, final_lr=0.0, warmup_steps=0, schedule="constant", weight_decay=0.0)
WAITING = Train(steps=30, batch_size=8, log_every=1, eval_every=2, save_every=1, patience=2)


@pytest.fixture(scope="module")
def stopped(corpus, tmp_path_factory) -> tuple[Run, loop.Result]:
    """A run whose validation loss does not change."""
    run = text_run(corpus, tmp_path_factory.mktemp("patience"), optim=FLAT, train=WAITING)
    return run, loop.train(run)


def test_early_stopping_stops_after_its_patience(stopped) -> None:
    run, result = stopped
    assert (result.step, result.reason) == (6, "patience")
    validation = records(run.folder, "val_loss")
    assert [r["step"] for r in validation] == [2, 4, 6]
    assert result.best == validation[0]["val_loss"]
    assert saved(run.folder) == [2, 5, 6]  # the best, and the newest two
    assert load_params(run.folder, run, mesh(run.mesh.resolve(8)))[1] == 2


def test_a_best_checkpoint_of_parameters_alone_is_loaded_and_never_resumed_from(corpus, tmp_path) -> None:
    few = replace(WAITING, steps=7, save_every=3, eval_every=4, patience=0, best_holds="params")
    run = text_run(corpus, tmp_path, optim=FLAT, train=few)
    loop.train(run)
    assert saved(run.folder) == [4, 6, 7]  # the best, and the newest two
    checkpoints = run.folder / "checkpoints"
    assert [step for step in (4, 6, 7) if (checkpoints / str(step) / "rest").exists()] == [6, 7]
    assert load_params(run.folder, run, mesh(run.mesh.resolve(8)))[1] == 4
    for step in (6, 7):
        shutil.rmtree(checkpoints / str(step))
    with pytest.raises(UserError, match=r"holds parameters alone .step 4. and no state to resume from"):
        loop.train(run)
    assert saved(run.folder) == [4]


def test_the_first_checkpoint_can_be_resumed_from(corpus, tmp_path) -> None:
    """Also the best one of a run whose best ones hold parameters alone: it never has to start over."""
    few = replace(WAITING, steps=6, save_every=6, eval_every=2, patience=0, best_holds="params", keep=3)
    run = text_run(corpus, tmp_path, optim=FLAT, train=few)
    loop.train(run)
    assert [step for step in (2, 6) if (run.folder / f"checkpoints/{step}/rest").exists()] == [2, 6]


def test_the_best_may_be_that_of_the_fewest_errors(corpus, tmp_path) -> None:
    """Slow steps lower the loss each time, and the likeliest token stays what it is."""
    slow = Optim(peak_lr=1e-6, final_lr=1e-6, warmup_steps=0)
    run = text_run(corpus, tmp_path, optim=slow, train=replace(TRAIN, steps=4, eval_every=1, best_by="error"))
    result = loop.train(run)
    found = records(run.folder, "val_loss")
    fewest = max(found, key=lambda r: r["val_accuracy"])
    assert fewest["step"] != min(found, key=lambda r: r["val_loss"])["step"]
    assert load_params(run.folder, run, mesh(run.mesh.resolve(8)))[1] == fewest["step"]
    assert result.best == pytest.approx(1 - fewest["val_accuracy"])


def test_eval_hides_the_tokens_that_training_hid(corpus, tmp_path, capsys) -> None:
    """What masked LM hides depends on the rows of a batch: `jaxgpt eval` takes training's."""
    model = replace(MODEL, causal=False)
    train = replace(TRAIN, steps=4)
    run = text_run(corpus, tmp_path, model=model, objective=MaskedLM(), train=train)
    result = loop.train(run)
    assert main(["eval", str(run.folder), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)["figures"]
    assert figures["loss"]["value"] == pytest.approx(result.best, rel=1e-5)


def test_a_run_that_has_ended_is_not_trained_further(stopped, trained, text_config, tmp_path, capsys) -> None:
    run, result = stopped
    before = tree(run.folder)
    assert loop.train(run) == result
    assert tree(run.folder) == before
    folder = copy(trained, tmp_path)
    before = tree(folder)
    assert main(["train", str(text_config), "--runs", str(tmp_path)]) == 0
    assert tree(folder) == before
    assert capsys.readouterr().out == (trained.parent / "stdout.txt").read_text().replace(
        str(trained), str(folder)
    )


def test_patience_is_remembered_across_a_resume(stopped, tmp_path, monkeypatch) -> None:
    run, result = replace(stopped[0], runs=str(tmp_path)), stopped[1]
    interrupt_at(monkeypatch, 5, signal.SIGINT)
    first = loop.train(run)
    assert (first.step, first.reason) == (5, "SIGINT") or (first.step, first.reason) == (6, "patience")
    assert loop.train(run) == result
    assert curve(run.folder) == curve(stopped[0].folder)


# ---------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_saves_and_the_run_goes_on_as_if_uninterrupted(
    name, trained, text_config, tmp_path, monkeypatch, capfd
) -> None:
    args = ["train", str(text_config), "--runs", str(tmp_path)]
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    interrupt_at(monkeypatch, 6, signal.Signals[name])
    assert main(args) == 75
    folder = tmp_path / trained.name
    said = capfd.readouterr().out
    assert said.startswith(f"{folder}: {name} at step 7, ")
    assert said.endswith("run the same command to go on\n")
    assert saved(folder)[-1] == 7
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert main(args) == 0
    assert curve(folder) == curve(trained)
    state, host = restore(folder)
    assert_same(state, restore(trained)[0])
    assert host == restore(trained)[1]


@pytest.mark.slow
def test_a_second_signal_ends_the_process_at_once(text_config, tmp_path) -> None:
    """The first one's saving may hang on a file system that is gone."""
    fault = "record|step 6 |SIGTERM"  # the event of step 6 comes twice more: its loss, then others
    done = command(text_config, "--runs", str(tmp_path), "--train.eval-every", "6", fault=fault)
    assert done.returncode == -signal.SIGTERM, done.stderr


# --------------------------------------------------------------------------------- init_from


def test_a_run_starts_from_the_best_parameters_of_another(corpus, trained, stopped, tmp_path) -> None:
    """`stopped` has step 2 as its best and 6 as its newest; `trained` has moved far."""
    base = trained
    run = text_run(corpus, tmp_path, "tuned", optim=FLAT, init_from=str(base), train=replace(TRAIN, steps=1))
    loop.train(run)
    on = mesh(run.mesh.resolve(8))
    best, step = load_params(base, load(base), on)
    assert step == STEPS
    tuned, _ = load_params(run.folder, run, on)
    assert_same(tuned, best)
    assert records(run.folder, "val_loss")[0]["val_loss"] == pytest.approx(
        records(base, "val_loss")[-1]["val_loss"], rel=1e-6
    )
    assert int(restore(run.folder)[0].step) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [({"layers": 3}, "layers 2, not 3"), ({"norm": "rmsnorm"}, "norm 'layernorm', not 'rmsnorm'")],
)
def test_another_model_is_refused_by_its_field(corpus, trained, tmp_path, change, words) -> None:
    model = replace(MODEL, **change)
    run = text_run(corpus, tmp_path / "runs", "tuned", model=model, init_from=str(trained))
    with pytest.raises(UserError, match=f"holds a model with {words}"):
        loop.train(run)
    assert not (tmp_path / "runs").exists()


def test_dropout_may_differ_from_the_run_it_starts_from(trained, tmp_path) -> None:
    from jaxgpt.train.changes import check_base

    run = replace(load(trained), model=replace(MODEL, dropout=0.3), init_from=str(trained))
    check_base(run, ByteTokenizer())
    with pytest.raises(UserError, match="is no run folder"):
        check_base(replace(run, init_from=str(tmp_path)), ByteTokenizer())


def test_the_run_it_starts_from_must_read_the_same_ids(trained, tmp_path) -> None:
    """Parameters whose ids mean other text would be noise, and nothing else would tell."""
    from jaxgpt.train.changes import check_base

    texts = ["the cat sat on a mat while seven dogs ran over green hills and far away"] * 9
    run = replace(load(trained), init_from=str(trained))
    with pytest.raises(UserError, match="was trained with another tokenizer than that of this run's data"):
        check_base(run, train_sentencepiece(texts, 280))


def test_a_speed_counts_the_time_of_its_own_steps() -> None:
    """A record may be made well after its step was done, and the next one right after."""
    meter = Meter(tokens=10, flops=1.0, peak=1.0)
    meter.start(0, 100.0)
    values = dict.fromkeys(("loss", "nll", "weight", "bytes", "accuracy", "grad_norm"), 1.0)
    assert meter.record(1, values, 102.0)["step_seconds"] == 2
    assert meter.record(3, values, 106.0)["tokens_per_second"] == 5


def test_a_log_file_gets_a_line_a_record(corpus, tmp_path, capfd) -> None:
    run = text_run(corpus, tmp_path, "logged", train=replace(TRAIN, steps=3))
    loop.train(run)
    lines = [
        line for line in capfd.readouterr().err.splitlines() if line.startswith("step") and "tok/s" in line
    ]
    form = (
        r"step (\d) of 3: loss (\S+) lr (\S+) grad_norm (\S+) [\d,]+ tok/s mfu \d+% epoch \d\.\d\d, "
        r"(\d+:\d\d:\d\d) left"
    )
    found = [re.fullmatch(form, line) for line in lines]
    assert all(found), lines
    names = ("step", "loss", "learning_rate", "grad_norm")
    logged = [[r[name] for name in names] for r in records(run.folder)]
    assert [[float(x) for x in m.groups()[:4]] for m in found if m] == [
        pytest.approx(values, rel=1e-2) for values in logged
    ]
    assert found[-1] is not None
    assert found[-1][5] == "0:00:00"


def test_the_time_left_is_that_of_the_steps_so_far(corpus, tmp_path, capfd, monkeypatch) -> None:
    """Ten of forty steps in two minutes, all that came between them included: thirty take six."""
    now = iter([100.0, 1000.0, 1120.0, 1120.0])
    metrics = Metrics(text_run(corpus, tmp_path), 40, 0)
    monkeypatch.setattr("time.perf_counter", lambda: next(now, 1120.0))
    next(now)
    metrics.begin(0)
    metrics.note("so far", done=10)
    monkeypatch.undo()
    metrics.close()
    assert "step 10 of 40: so far, 0:06:00 left" in capfd.readouterr().err


def test_a_speed_is_never_negative_or_infinite() -> None:
    meter = Meter(tokens=10, flops=1.0, peak=1.0)
    meter.start(0, 100.0)
    values = dict.fromkeys(("loss", "nll", "weight", "bytes", "accuracy", "grad_norm"), 1.0)
    for step, now in ((1, 100.0), (2, 99.0)):
        record = meter.record(step, values, now)
        assert 0 < record["tokens_per_second"] < float("inf") and record["step_seconds"] > 0
