"""The command line: help, the nearest name, exit codes, and one line for what a user can mend."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from jaxgpt import __version__
from jaxgpt.cli import COMMANDS, Command, main, usage

CONFIGS = Path(__file__).parents[1] / "configs"
GPT2 = str(CONFIGS / "gpt2_124m.py")
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Run a command line in this process: its exit code, standard output and standard error."""

    def run(*args: str) -> tuple[int, str, str]:
        try:
            code = main(list(args))
        except SystemExit as stop:  # by --help
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    return run


# ----------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("args", [(), ("-h",), ("--help",), ("help",)], ids=str)
def test_help_lists_every_command(args: tuple[str, ...], call: Call) -> None:
    code, out, err = call(*args)
    assert (code, err) == (0, "")
    for name, command in COMMANDS.items():
        assert f"  {name} " in out
        assert command.about in out


@pytest.mark.parametrize("flag", ["-V", "--version"])
def test_version_is_printed(flag: str, call: Call) -> None:
    assert call(flag) == (0, f"jaxgpt {__version__}\n", "")


def test_a_group_lists_its_commands(call: Call) -> None:
    own = usage(["data prepare", "data show", "data ratings"])
    assert call("data", "--help") == (0, own + "\n", "")
    assert call("data") == (2, "", own + "\n")  # a command was needed
    assert "data show" in own
    assert "  sample" not in own


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str, call: Call) -> None:
    code, out, err = call(*name.split(), "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: jaxgpt {name}")
    assert "--" in out


def test_help_of_train_lists_every_field_with_the_configs_own_defaults(call: Call) -> None:
    code, out, err = call("train", GPT2, "--help")
    assert (code, err) == (0, "")
    for flag in ("--optim.peak-lr", "--model.kv-heads", "--data.path", "--mesh.fsdp", "--compute.remat"):
        assert flag in out
    assert "Tokens per row; None means model.context" in " ".join(out.replace("│", " ").split())
    assert "(default: 19073)" in " ".join(out.replace("│", " ").split())
    assert "19073" not in call("train", "--help")[1]
    chat = call("train", str(CONFIGS / "instruct_alpaca.py"), "--help")[1]
    assert "--data.validation-fraction" in chat
    assert "--data.path" not in chat


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            "gpt2_124m",
            "model is GPT (or Bert, TransformerXL, Classifier, RewardModel, your own ",
        ),
        ("gpt2_124m", "model.moe is None (or MoE); data is Text (or Chat, Prompts, Pairs, Rated, "),
        (
            "ner_resume",
            "TransformerXL, RewardModel, your own Architecture); model.backbone is ",
        ),
        (
            "ner_resume",
            "DPO, IPO, SimPO, ORPO, KTO, BradleyTerry). Kinds are chosen in the config file",
        ),
        ("mixtral_8x7b", "model.moe is MoE (or None); "),
    ],
)
def test_help_of_train_names_the_other_kinds(config: str, words: str, call: Call) -> None:
    _, out, _ = call("train", str(CONFIGS / f"{config}.py"), "--help")
    assert words in " ".join(out.split())


REQUIRED = {
    "tokenizer train": ("SOURCES", "--out"),
    "data prepare": ("SOURCES", "--out"),
    **dict.fromkeys(("data show", "info", "train", "sweep"), ("CONFIG",)),
    **dict.fromkeys(("eval", "sample", "chat"), ("RUN",)),
    "predict": ("RUN", "FILE"),
    "import": ("FOLDER", "RUN"),
    "export": ("RUN", "FOLDER"),
}


@pytest.mark.parametrize("name", REQUIRED)
def test_what_is_required_is_shown_as_required(name: str, call: Call) -> None:
    said = " ".join(call(*name.split(), "--help")[1].replace("│", " ").split())
    for word in REQUIRED[name]:
        assert re.search(rf"{word}\b(?:(?! --|\(required).)*\(required\)", said), word
    assert said.count("(required)") == len(REQUIRED[name])
    code, _, err = call(*name.split())
    assert code == 2
    assert re.search(r"Missing|needs|required|no source", err)


def test_help_imports_neither_jax_nor_flax() -> None:
    code = (
        "import sys\n"
        "from jaxgpt.cli import main\n"
        f"for args in (['--help'], ['train', '--help'], ['train', {GPT2!r}, '--help'], ['trian']):\n"
        "    try: main(args)\n"
        "    except SystemExit as stop: assert not stop.code\n"
        "print(sorted({'jax', 'flax', 'optax', 'grain', 'orbax', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n"), done.stdout[-100:]


# ------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["trian"], "unknown command 'trian'; did you mean 'train'?"),
        (["quikstart", "--help"], "unknown command 'quikstart'; did you mean 'quickstart'?"),
        (["data", "shw"], "unknown command 'data shw'; did you mean 'data show'?"),
        (["data", "zzz", "x"], "unknown command 'data zzz'; allowed: data prepare, data ratings, data show"),
        (
            ["zzz"],
            "unknown command 'zzz'; allowed: advise, chat, compare, data prepare, data ratings, data show",
        ),
        (["train"], "`jaxgpt train` needs a CONFIG first: a .py file, a run's config.json or a run folder."),
        (["info", "--model.width", "3"], "`jaxgpt info` needs a CONFIG first: "),
        (
            ["train", "no.py"],
            "config 'no.py' does not exist; give a .py file, a config.json or a run folder.",
        ),
        (["train", GPT2, "--optim.peak-lrr", "3"], "unknown option '--optim.peak-lrr'; did you mean "),
        (["train", GPT2, "--optim.peak-lr", "0"], "optim.peak_lr is 0; it must be between 1e-30 and 1e+06."),
        (["info", GPT2, "--mesh.tensor", "5"], "model.heads 12 is not divisible by mesh.tensor 5; use a "),
        (["sample", "nowhere"], "run folder 'nowhere' does not exist; give the folder of a run."),
        (["sample", "nowhere", "--temprature", "1"], "unknown option '--temprature'; did you mean '--temper"),
        (["sample"], "Missing from jaxgpt sample: RUN folder of the run."),
        (
            ["data", "show", "no.py", "--n", "x"],
            "Error parsing --n: invalid literal for int() with base 10: ",
        ),
        (
            ["data", "show", "no.py", "more"],
            "unexpected argument 'more'; options are written as --name value.",
        ),
        (["data", "prepare", "a.txt"], "Missing from jaxgpt data prepare: --out PATH"),
        (["quickstart", "--wokdir", "x"], "unknown option '--wokdir'; did you mean '--workdir'?"),
    ],
    ids=lambda value: " ".join(value)[-40:] if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_exits_2(args: list[str], message: str, call: Call) -> None:
    code, out, err = call(*args)
    assert (code, out) == (2, "")
    assert err.startswith(f"jaxgpt: {message}")
    assert err.count("\n") == 1
    assert err.endswith("\n")


def test_a_mistake_is_one_line_in_a_process_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("from jaxgpt.config import Run\ndef config():\n    return Run(nam='a')\n")
    command = [sys.executable, "-m", "jaxgpt.cli", "data", "show", str(tmp_path / "a.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    message = f"jaxgpt: {tmp_path}/a.py, line 3: Run has no field 'nam'; did you mean 'name'?\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message)


def test_an_unknown_log_level_is_named_and_case_does_not_matter(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAXGPT_LOG", "inf")
    assert call("sample", "nowhere") == (2, "", "jaxgpt: JAXGPT_LOG is 'INF'; did you mean 'INFO'?\n")
    monkeypatch.setenv("JAXGPT_LOG", "info")
    assert "run folder 'nowhere'" in call("sample", "nowhere")[2]


# ------------------------------------------------------------------------------ what a command does


def talk(word: str = "hello", *, code: int = 0, failure: str = "") -> int:
    """Say a word."""
    print(word)
    print("aside", file=sys.stderr)
    if failure:
        raise {"interrupt": KeyboardInterrupt, "bug": ZeroDivisionError}[failure]
    return code


@pytest.fixture
def talking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COMMANDS, "talk", Command(__name__, "talk", "say a word"))


@pytest.mark.usefixtures("talking")
def test_a_command_gets_its_arguments_and_gives_its_exit_code(call: Call) -> None:
    assert call("talk", "--word", "a b") == (0, "a b\n", "aside\n")
    assert call("talk", "--code", "75") == (75, "hello\n", "aside\n")
    assert call("talk", "--failure", "interrupt") == (130, "hello\n", "aside\njaxgpt: interrupted\n")
    assert call("talk", "--code") == (
        2,
        "",
        "jaxgpt: Missing value for argument '--code'. Expected 1 values.\n",
    )
    with pytest.raises(ZeroDivisionError):  # a bug of ours keeps its traceback
        call("talk", "--failure", "bug")


def test_a_closed_pipe_ends_a_command_quietly() -> None:
    code = (
        "import sys, types\n"
        "from jaxgpt.cli import COMMANDS, Command, main\n"
        "noisy = types.ModuleType('noisy')\n"
        "exec('def talk():\\n  while True: print(1)', noisy.__dict__)\n"
        "sys.modules['noisy'] = noisy\n"
        "COMMANDS['talk'] = Command('noisy', 'talk', '')\n"
        "sys.exit(main(['talk']))"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=-1, stderr=-1) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path, call: Call) -> None:
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "tokenizer"
    (tmp_path / "a.txt").write_text("some text")
    code, _, err = call(
        "tokenizer", "train", str(tmp_path / "a.txt"), "--out", str(out), "--model-type", "byte"
    )
    assert code == 2
    assert err.strip().splitlines()[-1].startswith("jaxgpt: ")
    assert "writing" in err and "failed (File exists)" in err and "Traceback" not in err


# ----------------------------------------------------------------------------------------- info


def test_info_prints_known_numbers(call: Call) -> None:
    code, out, _ = call("info", GPT2, "--model.vocab-size", "50257", "--compute.remat", "full")
    assert code == 0
    rows = {}
    for line in out.splitlines():
        name, *values = (part.strip() for part in line.strip("│ ").split("│"))
        rows.setdefault(name, []).extend(values)
    assert rows["parameters"] == ["124,439,808"]
    assert rows["memory of parameters"] == ["474.7 MiB"]  # 4 bytes each
    assert rows["without embeddings"] == ["85,056,000"]
    assert rows["tokens per step"] == ["491,520"]
    assert rows["tokens in all"] == [f"{19_073 * 491_520:,}"]
    assert rows["training FLOPs per token"] == [
        f"{6 * (124_439_808 - 1024 * 768) + 12 * 12 * 768 * 1024:.3e}"
    ]
    assert rows["devices"] == ["1 (data 1, fsdp 1, tensor 1, expert 1)"]
    assert rows["of the optimizer (adamw)"] == ["949.4 MiB"]  # two moments
    assert "(remat full)" in rows["of activations per device"][0]


def test_info_reads_a_runs_record(tmp_path: Path, call: Call) -> None:
    record = {"run": {"name": "r", "model": {"kind": "GPT", "layers": 1}}, "versions": {}}
    (tmp_path / "config.json").write_text(json.dumps(record))
    code, out, _ = call("info", str(tmp_path))
    assert code == 0
    # Tables with the final norm, and one layer: 12 D^2 + 13 D.
    assert f"{(50_304 + 1024) * 768 + 2 * 768 + 12 * 768**2 + 13 * 768:,}" in out
