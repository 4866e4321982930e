"""Names of other projects get the right answer, and other mistakes no far-fetched suggestion."""

from __future__ import annotations

import dataclasses
import re
import typing
from pathlib import Path

import pytest

from jaxgpt.cli import COMMANDS, main
from jaxgpt.config import GPT, Knowledge, Run, load
from jaxgpt.config.load import KINDS
from jaxgpt.errors import UserError, near_names, nearest
from jaxgpt.evals import command
from jaxgpt.glossary import _ANSWERS, ANSWERS, answer, look_up
from jaxgpt.sample import commands
from jaxgpt.sample.options import Ruled
from jaxgpt.sample.settings import Asked, Way

PARTS = {f.name: typing.get_type_hints(Run)[f.name] for f in dataclasses.fields(Run)}
WORDS = re.compile("`([^`]*)`")


def fields_of(part: str) -> set[str]:
    kinds = typing.get_args(PARTS[part]) or (PARTS[part],)
    return {field.name for kind in kinds for field in dataclasses.fields(kind)}


def test_every_name_has_one_answer() -> None:
    assert len(ANSWERS) == sum(len(names.split()) for names in _ANSWERS)
    assert not ANSWERS.keys() & {word for name in COMMANDS for word in (name, name.split()[0])}


@pytest.mark.parametrize("said", sorted(set(_ANSWERS.values())))
def test_what_an_answer_names_exists(said: str) -> None:
    assert not said.endswith(".")
    for quoted in WORDS.findall(said):
        if re.fullmatch(r"[a-z]+\.[a-z0-9_.]+", quoted):
            part, name = quoted.split(".", 1)
            assert name.split(".")[0] in fields_of(part), quoted
        elif quoted.startswith("jaxgpt ") and not quoted.startswith("jaxgpt --"):
            assert {" ".join(quoted.split()[1:n]) for n in (2, 3)} & COMMANDS.keys(), quoted
    for flag in re.findall(r"--([a-z-]+)", said):
        kinds = (Run, Asked, Way, Ruled, Knowledge)
        known = {f.name for kind in kinds for f in dataclasses.fields(kind)} | {"version", "out"}
        known |= {*typing.get_type_hints(commands.sample), *typing.get_type_hints(command.evaluate), "format"}
        assert flag.replace("-", "_") in known, flag
    for file in re.findall(r"configs/\w+\.py|launch/", said):
        assert (Path(__file__).parents[1] / file).exists(), file


@pytest.mark.parametrize("name", sorted(ANSWERS))
def test_it_is_given_for_a_command_and_a_field(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name.replace("_", "-")]) == 2
    said = capsys.readouterr().err
    assert said == f"jaxgpt: unknown command {name.replace('_', '-')!r}; {ANSWERS[name]}.\n"
    for part in (f"--train.{name}=3", name.title(), f"--{name.replace('_', '-')}"):
        assert answer(part.partition("=")[0]) == ANSWERS[name]


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--lr", "unknown option '--lr'; the learning rate is `--optim.peak-lr`."),
        ("--model.n_layer", "unknown option '--model.n_layer'; the number of layers is `--model.layers`."),
        ("--peak-lr", "unknown option '--peak-lr'; did you mean '--optim.peak-lr'?"),
        ("--width", "unknown option '--width'; did you mean '--model.width'?"),
        ("--batch_size", "unknown option '--batch_size'; did you mean '--train.batch-size'?"),
        (
            "--lora-r",
            "unknown option '--lora-r'; parameter-efficient tuning is `tune` of a config with init_from",
        ),
        ("--zzz", "unknown option '--zzz'; `jaxgpt train CONFIG --help` lists what there is."),
    ],
)
def test_flags(flag: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(Path(__file__).parents[1] / "configs" / "gpt2_124m.py")
    assert main(["train", config, flag, "3"]) == 2
    assert capsys.readouterr().err.startswith(f"jaxgpt: {said}")


def test_fields_of_config_files(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    for call, said in {
        "Train(max_steps=3)": "Train has no field 'max_steps'; the number of steps is `train.steps`.",
        "GPT(n_embd=3)": "GPT has no field 'n_embd'; the hidden size is `model.width`.",
        "Train(step=3)": "Train has no field 'step'; did you mean 'steps'?",
        "GPT(Width=3)": "GPT has no field 'Width'; did you mean 'width'?",
    }.items():
        file.write_text(f"from jaxgpt.config import GPT, Train\ndef config():\n    return {call}\n")
        with pytest.raises(UserError, match=re.escape(said)):
            load(file)


FIELDS = [f.name for kind in KINDS for f in dataclasses.fields(kind)]


@pytest.mark.parametrize("name", ["lora", "stop", "test", "tuner", "foo", "x", "attn", "llama"])
def test_nothing_far_fetched_is_suggested(name: str) -> None:
    assert not near_names(name, {*FIELDS, *COMMANDS} - {"text", "test", "tune"})


@pytest.mark.parametrize(
    ("name", "names", "near"),
    [
        ("trian", COMMANDS, ["train"]),
        ("Eval", COMMANDS, ["eval"]),
        ("prepare", COMMANDS, ["data prepare"]),
        ("widht", FIELDS, ["width"]),
        ("peaklr", FIELDS, ["peak_lr"]),
        ("--trian.steps", ["--train.steps", "--train.seed"], ["--train.steps"]),
        ("--stpes", ["--train.steps", "--stop"], ["--train.steps"]),
        ("--width", ["--model.width", "--moe.width", "--model.head-width"], ["--model.width", "--moe.width"]),
        ("--warmup", ["--optim.warmup-steps", "--train.steps"], ["--optim.warmup-steps"]),
        ("", FIELDS, []),
    ],
)  # fmt: skip
def test_what_is_near(name: str, names: list[str], near: list[str]) -> None:
    assert near_names(name, names) == near


def test_hints_of_several_names_and_of_none() -> None:
    assert nearest("width", ["a.width", "b.width", "c.width", "d"]).endswith(
        "'a.width', 'b.width' or 'c.width'?"
    )
    assert nearest("zzz", ["b", "a"]) == "; allowed: a, b"
    assert look_up("n_layer", ["n_layers", "x"]) == "; the number of layers is `model.layers`."
    assert look_up("Seed", ["seed"]) == "; did you mean 'seed'?"
    assert GPT().layers == 12
