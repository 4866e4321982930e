"""A mixture is trained in its shares, resumed exactly, and measured by source; epochs come to steps."""

from __future__ import annotations

import json
import signal
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from tiny import assert_same
from tiny_runs import COMPUTE, FSDP, MODEL, OPTIM, TRAIN, curve, interrupt_at, records, restore, write_config

from jaxgpt.cli import main
from jaxgpt.config import Chat, Mix, Run, Tagged, Text, from_json, load, override, to_json
from jaxgpt.data.prepare import prepare
from jaxgpt.data.readers import rows_of, run_tokenizer
from jaxgpt.errors import UserError
from jaxgpt.evals.loss import validation_loss
from jaxgpt.sample.load import load_trained
from jaxgpt.text.tokenizer import ByteTokenizer
from jaxgpt.train import loop


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second corpus, of other letters."""
    folder = tmp_path_factory.mktemp("other")
    lines = [{"text": f"XYZ {i} QQ " * (3 + i % 4)} for i in range(40)]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    prepare([str(folder / "a.jsonl")], folder / "code", validation=0.2, workers=1)
    return folder / "code"


def mixed(sources: tuple[Any, ...], runs: Path, **parts: Any) -> Run:
    given = {"model": MODEL, "optim": OPTIM, "train": TRAIN, "compute": COMPUTE, "mesh": FSDP}
    weights = parts.pop("weights", ())
    return Run(name="mix", data=Mix(sources=sources, weights=weights), runs=str(runs), **given | parts)


@pytest.fixture(scope="module")
def run(corpus: Path, other: Path, dialogues: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of two texts and dialogues, 2 : 1 : 1, trained."""
    chat = Chat(train=(str(dialogues),), tokenizer=str(dialogues.parent / "tokenizer"))
    sources = (Text(path=str(corpus)), Text(path=str(other)), chat)
    made = mixed(sources, tmp_path_factory.mktemp("mix"), weights=(2.0, 1.0, 1.0))
    loop.train(made, progress=False)
    return made


def test_rows_are_given_in_shares_and_logged_as_tokens(run: Run) -> None:
    """Counted row by row, from the letters of the rows themselves."""
    assert isinstance(run.data, Mix) and run.data.source_names == ("text", "code", "a")
    rows = rows_of(run.data, ByteTokenizer(), 32, run.train.seed, 8)
    for record in records(run.folder):
        count = {"text": 0, "code": 0, "a": 0}
        for i in range(record["step"] * 8):
            row = rows[i]
            text = ByteTokenizer().decode(row["tokens"].tolist())
            dialogue = ByteTokenizer().control["<|user|>"] in row["tokens"]
            count["a" if dialogue else "code" if "Q" in text or "X" in text else "text"] += 1
        tokens = {name: record[f"tokens/{name}"] for name in count}
        assert tokens == {name: 32 * n for name, n in count.items()}
    assert abs(count["text"] - 48) <= 2 and abs(count["code"] - 24) <= 2  # of 96 rows in all
    epoch = rows_of(run.sources[1], ByteTokenizer(), 32, run.train.seed, 8).epoch_rows
    assert record["epoch/code"] == pytest.approx(count["code"] / epoch)


def test_losses_of_the_sources_are_those_of_each_alone(run: Run, tmp_path: Path) -> None:
    last = records(run.folder, "val_loss")[-1]
    found = {}
    for name, source in zip(run.data.source_names, run.sources, strict=True):
        found[name] = validation_loss(run.folder, replace(source, length=32), which="newest", batch_size=8)
        assert last[f"val_loss/{name}"] == pytest.approx(found[name]["loss"], rel=1e-5)
        assert last[f"val_accuracy/{name}"] == pytest.approx(found[name]["accuracy"], abs=1e-6)
    total = sum(one["loss"] * one["targets"] for one in found.values())
    assert last["val_loss"] == pytest.approx(total / sum(one["targets"] for one in found.values()), rel=1e-5)
    with redirect_stdout(StringIO()) as said:
        assert main(["eval", str(run.folder), "--json", "--batch-size", "8"]) == 0
    assert said.getvalue().count("token_perplexity") == 4


def test_a_mixture_is_resumed_exactly(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    again = replace(run, runs=str(tmp_path))
    interrupt_at(monkeypatch, 5, signal.SIGTERM)
    assert loop.train(again, progress=False).reason == "SIGTERM"
    assert loop.train(again, progress=False).reason == "finished"
    assert_same(restore(again.folder)[0].params, restore(run.folder)[0].params)
    assert curve(again.folder) == curve(run.folder)


def test_the_config_survives_json_and_tunes_from_the_command_line(run: Run, tmp_path: Path) -> None:
    assert from_json(Run, to_json(run)) == run == load(run.folder)
    assert override(run, ["--data.weights", "1", "2", "3"]).data.weights == (1.0, 2.0, 3.0)
    assert load_trained(run.folder).run.templated
    config = write_config(run, tmp_path)
    with redirect_stdout(StringIO()) as said:
        assert main(["data", "show", str(config), "--n", "2"]) == 0
        assert main(["info", str(config)]) == 0
    assert "row 1" in said.getvalue()


def test_a_temperature_evens_the_shares(corpus: Path, other: Path) -> None:
    sources = (Text(path=str(corpus)), Text(path=str(other)))
    sizes = [rows_of(source, ByteTokenizer(), 32, 0, 8).epoch_rows for source in sources]
    assert sizes[0] != sizes[1]
    for temperature in (1.0, 2.0, 1e4):
        rows: Any = rows_of(Mix(sources=sources, temperature=temperature), ByteTokenizer(), 32, 0, 8)
        wanted = [size ** (1 / temperature) for size in sizes]
        given = rows.given(100_000)
        assert given[0] / 100_000 == pytest.approx(wanted[0] / sum(wanted), abs=1e-3)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"sources": ()}, "data.sources is empty"),
        ({"weights": (1.0,)}, r"data.weights has 1 entries for 2 sources"),
        ({"weights": (1.0, 0.0)}, r"data.weights\[1\] is 0"),
        ({"weights": (1.0, 2.0), "temperature": 2.0}, "data.temperature is 2.0 but data.weights are given"),
        ({"names": ("a", "a")}, "names differ"),
        ({"names": ("a/b", "c")}, "no spaces or slashes"),
        ({"sources": (Text(path="a", length=8), Text(path="b"))}, r"data.sources\[0\].length is 8"),
        ({"sources": (Text(path="a"), Text(path="b", workers=2))}, r"data.sources\[1\].workers is 2"),
        ({"sources": (Text(path="a", contiguous=True), Text(path="b"))}, "cannot be mixed"),
        ({"sources": (Tagged(train=("a",), validation=("b",)), Text(path="b"))}, r"data.sources\[0\].kind"),
    ],
)
def test_what_cannot_be_mixed_is_said(parts: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Mix(**{"sources": (Text(path="a"), Text(path="b"))} | parts)


def test_names_are_those_of_the_files_and_all_differ() -> None:
    mix = Mix(sources=(Text(path="x/wiki zh"), Text(path="y/wiki zh"), Chat(train=("c/*.jsonl",))))
    assert mix.source_names == ("wiki-zh", "wiki-zh-2", "source")
    mix = Mix(sources=tuple(Text(path=path) for path in ("x/a", "y/a-2", "z/a")))
    assert mix.source_names == ("a", "a-2", "a-3")
    assert Mix(sources=(Text(path="d/en.v1"), Text(path="d/en.v2"))).source_names == ("en.v1", "en.v2")


def test_sources_of_different_tokenizers_are_refused(
    corpus: Path, tmp_path: Path, sentencepiece: Any
) -> None:
    sentencepiece.save(tmp_path / "tokenizer")
    (tmp_path / "a.txt").write_text("the cat sat on a mat " * 200)
    words = {"tokenizer": str(tmp_path / "tokenizer"), "workers": 1, "split": "tail", "validation": 0.2}
    prepare([str(tmp_path / "a.txt")], tmp_path / "second", **words)
    run = mixed((Text(path=str(corpus)), Text(path=str(tmp_path / "second"))), tmp_path)
    with pytest.raises(UserError, match="the sources text and second of data have different tokenizers"):
        run_tokenizer(run)


# --------------------------------------------------------------------------------------------- epochs


def test_epochs_come_to_steps_which_are_stored(corpus: Path, tmp_path: Path) -> None:
    rows = rows_of(Text(path=str(corpus)), ByteTokenizer(), 32, 0, 8).epoch_rows
    parts = {"model": MODEL, "optim": OPTIM, "compute": COMPUTE, "mesh": FSDP, "runs": str(tmp_path)}
    train = replace(TRAIN, steps=1000, epochs=1.5, save_every=4)
    run = Run(name="epochs", data=Text(path=str(corpus)), train=train, **parts)
    steps = -(-3 * rows // 16)
    assert loop.train(run, progress=False).step == steps
    assert load(run.folder).train == replace(train, steps=steps)
    last = records(run.folder)[-1]
    assert last["epoch"] == pytest.approx(steps * 8 / rows) and 1.5 <= last["epoch"] < 1.5 + 8 / rows
    assert loop.train(run, progress=False).reason == "finished"  # the same config, not resolved
    assert loop.train(load(run.folder), progress=False).reason == "finished"
    with pytest.raises(UserError, match=rf"train.steps is 7 but train.epochs 1.5 come to {steps}; drop one"):
        loop.train(replace(run, train=replace(train, steps=7)), progress=False)
    with pytest.raises(UserError, match=r"has train.steps"):
        loop.train(replace(run, train=replace(train, epochs=2.0)), progress=False)
    slow = replace(run, optim=replace(OPTIM, warmup_steps=900), name="slow")
    with pytest.raises(UserError, match=rf"warmup_steps 900 is more than the {steps} steps"):
        loop.train(slow, progress=False)
