"""Sweeps: their runs in order, resumed, failed and compared."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from jaxgpt.cli import main
from jaxgpt.config import GPT, MoE, Optim, Run, Train, load, load_sweep, to_json
from jaxgpt.data.prepare import prepare
from jaxgpt.errors import UserError
from jaxgpt.files import write_json
from jaxgpt.report.sweep import markdown
from jaxgpt.sweep import _best_words, differences, measure, split_only, sweep_runs
from jaxgpt.train import loop
from jaxgpt.train.metrics import Metrics

TEXT = """
from dataclasses import replace
from jaxgpt.config import GPT, Compute, Optim, Run, Text, Train

def sweep():
    base = Run(
        name="base",
        model=GPT(vocab_size=264, context=16, layers=1, width=16, heads=2),
        data=Text(path={data!r}),
        optim=Optim(warmup_steps=1),
        train=Train(steps=6, batch_size=8, log_every=2, eval_every=3, eval_batches=1, save_every=100),
        compute=Compute(dtype="float32", unroll=1),
    )
    yield "plain", base
    yield "relu", replace(base, model=replace(base.model, mlp="relu"))
    yield "lopsided", replace(base, train=replace(base.train, batch_size=9))  # not over eight devices
"""
LOPSIDED = "train.batch_size 9 over accumulate 1 gives microbatches of 9 rows, not divisible by data x "


@pytest.fixture(scope="module", autouse=True)
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What one run compiles, the same run need not when it is resumed or trained again."""
    compilation_cache.reset_cache()
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("programs")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    yield
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file `tiny.py` of three runs, of which the last cannot run here, and its data."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "a.txt").write_text("seven dogs ran over green hills and far away\n" * 60)
    prepare([str(folder / "a.txt")], folder / "text", validation=0.2, split="tail", workers=1)
    (folder / "tiny.py").write_text(TEXT.format(data=str(folder / "text")))
    return folder / "tiny.py"


class Swept(NamedTuple):
    """A sweep that was stopped inside its second run, and the same command again."""

    folder: Path
    codes: list[int]
    said: list[str]
    states: list[str]
    trained: list[str]


@pytest.fixture(scope="module")
def swept(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Swept:
    runs, codes, said = tmp_path_factory.mktemp("runs"), list[int](), list[str]()
    call = ["sweep", str(config), "--runs", str(runs), "--train.seed", "5"]
    states, trained, train = list[str](), list[str](), loop.train
    with pytest.MonkeyPatch.context() as patch:
        for again in (False, True):
            if again:
                states += [row["state"] for row in rows(runs / "tiny").values()]
                patch.setattr(loop, "train", lambda run, **how: trained.append(run.name) or train(run))
            else:
                interrupt(patch, "relu", signal.SIGTERM)
            with redirect_stdout(StringIO()) as out:
                codes.append(main(call))
            said.append(out.getvalue())
            patch.undo()
    return Swept(runs / "tiny", codes, said, states, trained)


def interrupt(monkeypatch: pytest.MonkeyPatch, name: str, number: int) -> None:
    """Send this process a signal when the second step of a run is on record."""
    plain = Metrics.write

    def write(self: Metrics, step: int, record: Any) -> None:
        plain(self, step, record)
        if self.folder.name == name and step == 2:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Metrics, "write", write)


def table(folder: Path) -> dict[str, dict[str, str]]:
    """The rows of `sweep.md` by their names."""
    lines = (folder / "sweep.md").read_text("utf-8").splitlines()
    head, _, *rows = [[c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return {row[0]: dict(zip(head, row, strict=True)) for row in rows}


def rows(folder: Path) -> dict[str, dict[str, Any]]:
    """The rows of `sweep.json` by their names."""
    return {row["name"]: row for row in json.loads((folder / "sweep.json").read_bytes())["runs"]}


# ----------------------------------------------------------------------------------- real runs


def test_every_run_is_trained_and_one_that_cannot_is_noted(swept: Swept) -> None:
    folder, found = swept.folder, rows(swept.folder)
    assert [(row["name"], row["state"]) for row in found.values()] == [
        ("plain", "finished"),
        ("relu", "finished"),
        ("lopsided", "failed"),
    ]
    assert found["lopsided"]["reason"].startswith(LOPSIDED)
    assert not (folder / "lopsided").exists()
    for name in ("plain", "relu"):
        run = load(folder / name)
        assert (run.train.seed, run.name, run.folder) == (5, name, folder / name)
        records = list(map(json.loads, (folder / name / "metrics.jsonl").read_text().splitlines()))
        losses = {r["step"]: r["val_loss"] for r in records if "val_loss" in r}
        row = found[name]
        assert row["run"] == to_json(run)
        assert (row["steps"], row["tokens"]) == (6, 6 * 8 * 16)
        assert row["val_loss"] == min(losses.values())
        assert row["curve"] == [[step * 8 * 16, loss] for step, loss in losses.items()]
    assert found["plain"]["val_loss"] != found["relu"]["val_loss"]


def test_the_table_says_what_differs_and_what_came_of_it(swept: Swept) -> None:
    shown, found = table(swept.folder), rows(swept.folder)
    assert list(shown) == ["plain", "relu", "lopsided"]
    differs = ["model.mlp gelu, train.batch_size 8", "model.mlp relu", "train.batch_size 9"]
    assert [row["Differs in"] for row in shown.values()] == differs
    # Tables; two norms with biases; attention's and the MLP's matrices with biases; the last norm.
    count = (264 + 16) * 16 + 4 * 16 + 12 * 16**2 + 9 * 16 + 2 * 16
    assert shown["plain"]["Parameters"] == f"{count:,}"
    assert shown["relu"]["Best validation loss"] == f"{found['relu']['val_loss']:.4f}"
    assert shown["relu"]["Bits per byte"] == f"{found['relu']['val_bits_per_byte']:.4f}"
    assert shown["relu"]["Tokens"] == "768"
    assert shown["lopsided"]["Best validation loss"] == "–"
    assert shown["lopsided"]["State"].startswith(f"failed: {LOPSIDED}")
    page = (swept.folder / "sweep.html").read_text("utf-8")
    assert page.count("<svg") == 1
    assert all(words in page for words in ("model.mlp relu", "--train.seed 5", LOPSIDED))
    assert not re.search(r"<script|https?://|url\((?!#)", page)


def test_a_sweep_stopped_inside_a_run_goes_on_there(swept: Swept) -> None:
    assert swept.codes == [75, 3]
    assert swept.states == ["finished", "stopped", "waiting"]
    assert swept.trained == ["relu", "lopsided"]  # what is finished is not begun again
    assert f"{swept.folder}: 1 of 3 runs done, lowest validation loss" in swept.said[0]
    assert re.search(r" \(plain\); SIGTERM at step \d; run the same command to go on\n$", swept.said[0])
    assert f"{swept.folder}: 2 of 3 runs done, 1 failed, lowest validation loss" in swept.said[1]
    assert swept.said[1].endswith(f"; see {swept.folder}/sweep.html\n")


# ---------------------------------------------------------------------------- runs that are acted

Act = Callable[[Run], None]


@pytest.fixture
def acted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[str]]]:
    """Replace training by an act of each run's name; returns the names in the order they were trained."""

    def install(**acts: Act) -> list[str]:
        trained = list[str]()

        def train(run: Run, **how: Any) -> loop.Result:
            trained.append(run.name)
            write_json(run.folder / "config.json", {"run": to_json(run)})
            acts.get(run.name, lambda run, **how: None)(run)
            return loop.Result(run.train.steps, 1.0, "finished")

        monkeypatch.setattr(loop, "train", train)
        monkeypatch.setattr("jaxgpt.models.parameter_counts", lambda model: {"total": 1})
        return trained

    before = signal.getsignal(signal.SIGTERM)
    yield install
    assert signal.getsignal(signal.SIGTERM) is before


def raises(error: BaseException) -> Act:
    def act(run: Run) -> None:
        raise error

    return act


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (UserError("model.x is 3 | 4."), "model.x is 3 | 4."),
        (loop.Diverged("10 updates in a row"), "10 updates in a row"),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: of memory\nmore\n"),
            "RESOURCE_EXHAUSTED: of memory",
        ),
    ],
    ids=["mistake", "diverged", "memory"],
)
def test_a_failed_run_is_noted_and_the_others_go_on(
    error: Exception, reason: str, config: Path, tmp_path: Path, acted
) -> None:
    trained = acted(plain=raises(error))
    assert main(["sweep", str(config), "--runs", str(tmp_path)]) == 3
    assert trained == ["plain", "relu", "lopsided"]
    assert rows(tmp_path / "tiny")["plain"]["reason"] == reason
    shown = table(tmp_path / "tiny")
    assert shown["plain"]["State"] == f"failed: {reason}".replace("|", "\\|")
    assert shown["relu"]["State"] == "finished"
    trained = acted()  # the next call tries it again, and it alone
    assert main(["sweep", str(config), "--runs", str(tmp_path)]) == 0
    assert trained == ["plain"]


@pytest.fixture
def monkeypatch_signal():
    """Sets a signal's handler until the test is over."""
    before = {}

    def handle(number: int, handler) -> None:
        before[number] = signal.signal(number, handler)

    yield handle
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_sweep_stopped_between_runs_keeps_what_is_done(
    number: int, config: Path, tmp_path: Path, acted, monkeypatch_signal
):
    # A shell's background job, in which the tests may run, begins with SIGINT ignored.
    monkeypatch_signal(signal.SIGINT, signal.default_int_handler)
    trained = acted(relu=lambda run, **how: os.kill(os.getpid(), number))
    assert main(["sweep", str(config), "--runs", str(tmp_path)]) == 75
    assert trained == ["plain", "relu"]
    assert [row["State"] for row in table(tmp_path / "tiny").values()] == ["finished", "waiting", "waiting"]
    trained = acted()
    assert main(["sweep", str(config), "--runs", str(tmp_path)]) == 0
    assert trained == ["relu", "lopsided"]


def test_only_some_runs_are_trained_and_the_others_rows_are_kept(config, tmp_path, acted) -> None:
    trained = acted()
    call = ["sweep", str(config), "--runs", str(tmp_path)]
    assert main([*call, "--only", "lopsided", "plain"]) == 0
    assert trained == ["plain", "lopsided"]  # in the sweep's order
    assert main([*call, "--only", "relu"]) == 0
    assert [row["State"] for row in table(tmp_path / "tiny").values()] == ["finished"] * 3
    # The folders hold runs of other settings: nothing is written.
    assert main([*call, "--train.seed", "9", "--only", "plain"]) == 2
    assert [row["State"] for row in table(tmp_path / "tiny").values()] == ["finished"] * 3


def test_a_run_whose_folder_is_gone_is_trained_again(config, tmp_path, acted) -> None:
    call = ["sweep", str(config), "--runs", str(tmp_path), "--only", "plain"]
    trained = acted()
    assert main(call) == main(call) == 0
    (tmp_path / "tiny/plain/config.json").unlink()
    assert main(call) == 0
    assert trained == ["plain", "plain"]


def test_only_the_first_process_writes(config, tmp_path, acted, monkeypatch) -> None:
    acted()
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert main(["sweep", str(config), "--runs", str(tmp_path)]) == 0
    assert sorted(p.name for p in (tmp_path / "tiny").iterdir()) == ["lopsided", "plain", "relu"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "`jaxgpt sweep` needs a CONFIG first: a .py file with `def sweep()`."),
        (["--only", "plain"], "`jaxgpt sweep` needs a "),
        (["CONFIG", "--only"], "--only needs the name of at least one run of the sweep."),
        (["CONFIG", "--only", "plan"], "--only 'plan' is no run of CONFIG; did you mean 'plain'?"),
        (["CONFIG", "--name", "x"], "--name cannot be set here: a sweep's runs have their own names."),
        (["CONFIG", "--model.mlp", "relu"], "--model.mlp cannot be set here: it is what 'relu' of"),
        (["CONFIG", "--optim.peak-lrr", "1"], "unknown option '--optim.peak-lrr'; did you mean "),
        (["CONFIG", "--model.width", "15"], "model.width 15 is not divisible by model.heads 2; "),
        (["no.py"], "'no.py' is no config file; give a .py file with `def sweep()`."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_stops_before_anything_is_trained(
    args: list[str], message: str, config: Path, acted, capsys
) -> None:
    trained = acted()
    assert main(["sweep", *(str(config) if a == "CONFIG" else a for a in args)]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n"), trained) == ("", 1, [])
    assert err.startswith(f"jaxgpt: {message.replace('CONFIG', str(config)) if args else message}")


# -------------------------------------------------------------------------------------- the parts


def write_sweep(folder: Path, body: str) -> Path:
    path = folder / "s.py"
    path.write_text(f"from jaxgpt.config import Run\n{body}\n")
    return path


def test_a_sweeps_runs_have_its_names_and_one_folder(tmp_path: Path) -> None:
    path = write_sweep(tmp_path, 'def sweep():\n for n in "ba": yield n, Run(name="x" + n, runs="r" + n)')
    assert load_sweep(path) == {n: Run(name=f"x{n}", runs=f"r{n}") for n in "ba"}
    assert list(load_sweep(path)) == ["b", "a"]  # its order
    assert [str(run.folder) for run in sweep_runs(path).values()] == ["rb/s/b", "rb/s/a"]
    there = sweep_runs(path, ["--runs", "there", "--optim.b2", "0.5"])
    assert [str(run.folder) for run in there.values()] == ["there/s/b", "there/s/a"]
    assert {run.optim.b2 for run in there.values()} == {0.5}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def config(): return Run(name='a')", "has no function sweep(); define `def sweep() -> Iterator"),
        ("def sweep(): yield 'a'", "sweep() yields 'a'; it must yield (name, Run) pairs."),
        ("def sweep(): yield 1, Run(name='a')", "it must yield (name, Run) pairs."),
        ("def sweep(): yield 'a', 3", "sweep() yields for 'a' int; it must return a Run."),
        (
            "def sweep():\n for _ in 'ab': yield 'a', Run(name='a')",
            "yields the name 'a' twice; names differ.",
        ),
        ("def sweep():\n if False: yield", "yields nothing; yield at least one (name, Run) pair."),
        ("def sweep():\n yield 'a', Run(nam='a')", "line 3: Run has no field 'nam'; did you mean 'name'?"),
        ("def sweep(): return 3", "s.py: TypeError: 'int' object is not iterable"),
    ],
)
def test_what_is_no_sweep_is_named(body: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_sweep(write_sweep(tmp_path, body))
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "s.py"))


def test_only_takes_the_names_up_to_the_next_flag() -> None:
    args = ["c.py", "--optim.b1", "0.5", "--only", "a", "b", "--mesh.data", "-1", "--only", "c"]
    assert split_only(args) == (["c.py", "--optim.b1", "0.5", "--mesh.data", "-1"], ["a", "b", "c"])


def test_differences_are_the_fields_that_were_changed() -> None:
    first = Run(name="a")
    other = replace(first, model=GPT(windows=(4, 0), moe=MoE(experts=2)), optim=Optim(peak_lr=1e-3))
    found = differences(to_json(first), to_json(other))
    assert found == {
        "model.windows": [4, 0],
        "model.moe": to_json(MoE(experts=2)),
        "optim.peak_lr": 1e-3,
    }
    assert differences(to_json(first), to_json(first)) == {}
    row = {"name": "b", "differs": found, "state": "waiting", "reason": ""}
    text = markdown([row | {"name": "a"}, row])
    assert "model.windows (4, 0), model.moe MoE(" in text
    assert "shared_width=0, balance=0.01), optim.peak_lr 0.001 |" in text


def test_seconds_count_steps_and_survive_a_resume(tmp_path: Path) -> None:
    run = Run(name="a", runs=str(tmp_path), model=GPT(context=100))
    assert measure(run) == {}
    times = [(1, 0.5), (10, 0.1), (20, 0.2), (25, 0.2)]  # resumed at step 23: the log lost 21 to 23
    lines = [{"step": s, "step_seconds": t, "tokens_per_second": 3200 / t} for s, t in times]
    lines.insert(3, {"step": 20, "val_loss": None})  # not finite
    run.folder.mkdir()
    (run.folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = measure(run)
    assert found["seconds"] == pytest.approx(0.5 + 9 * 0.1 + 10 * 0.2 + 5 * 0.2, abs=0.05)
    assert (found["steps"], found["tokens"], found["curve"]) == (25, 25 * 3200, [])
    assert "val_loss" not in found


def test_runs_that_are_best_by_error_are_compared_by_accuracy(tmp_path: Path) -> None:
    run = Run(name="a", runs=str(tmp_path), train=Train(best_by="error"))
    lines = [{"step": 1, "step_seconds": 1.0, "tokens_per_second": 1.0}]
    lines += [{"step": s, "val_loss": v, "val_accuracy": a} for s, v, a in ((1, 0.2, 0.5), (2, 0.4, 0.75))]
    run.folder.mkdir()
    (run.folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = measure(run)
    assert (found["val_loss"], found["val_accuracy"]) == (0.2, 0.75)
    row = {"name": "a", "differs": {}, "state": "finished", "reason": ""} | found
    other = row | {"name": "b", "val_loss": 0.1, "val_accuracy": 0.25}
    assert "| Best validation accuracy |" in markdown([row, other])
    assert _best_words([row, other]) == ", highest validation accuracy 0.7500 (a)"
