"""`jaxgpt eval` from the command line: what it prints, what it saves, and what it refuses."""

from __future__ import annotations

import errno
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import sharp_params
from tiny_evals import MODEL, ROWS, TEXT, save_run

from jaxgpt.cli import main
from jaxgpt.config import Chat, load
from jaxgpt.evals.perplexity import read_texts, sliding
from jaxgpt.evals.result import NAMES
from jaxgpt.evals.scoring import Scorer
from jaxgpt.evals.tasks import read_task, run_task

Call = Callable[..., tuple[str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Run `jaxgpt eval ...`: standard output and standard error."""

    def run(*args: object, code: int = 0) -> tuple[str, str]:
        assert main(["eval", *map(str, args), "--batch-size", str(ROWS)]) == code
        return capsys.readouterr()

    return run


def values(record: dict) -> dict[str, float]:
    return {key: figure["value"] for key, figure in record["figures"].items()}


def test_without_options_it_measures_the_runs_own_validation_data(
    text_run: Path, own_loss: dict[str, float], call: Call
) -> None:
    (text_run / "eval").mkdir()
    (text_run / "eval" / "damaged.json").write_text('{"figures": 3')  # which the report leaves out
    out, err = call(text_run)
    record = json.loads((text_run / "eval" / "validation.json").read_text())
    expected = own_loss | {"token_perplexity": math.exp(own_loss["loss"])}
    assert values(record) == pytest.approx(expected, rel=1e-5)
    assert (record["step"], record["settings"]["batch_size"]) == (5, ROWS)
    assert "The run's own validation data" in out
    for name in ("loss", "token_perplexity", "bits_per_byte", "accuracy"):
        assert NAMES[name] in out
    assert f"{own_loss['bits_per_byte']:.4f}" in out
    assert f"saved as {text_run / 'eval' / 'validation.json'}" in err
    page = (text_run / "report.html").read_text("utf-8")
    assert "Evaluations" in page
    assert "The run&#x27;s own validation data, step 5" in page
    assert NAMES["token_perplexity"] in page


def test_texts_and_tasks_in_one_go_as_json(text_run: Path, call: Call, tmp_path: Path) -> None:
    (tmp_path / "wiki.raw").write_text(TEXT[:90], "utf-8")
    lines = [
        json.dumps({"text": f"{'very ' * n}old {word}"}) for n, word in enumerate(("sat", "ran", "lay"), 5)
    ]
    (tmp_path / "words.jsonl").write_text("\n".join(lines))
    text, words = tmp_path / "wiki.raw", tmp_path / "words.jsonl"
    out, err = call(text_run, "--text", text, "--stride", 8, "--tasks", words, "--limit", 2, "--json")
    first, second = (json.loads(part) for part in out.replace("}\n{", "}\n\0{").split("\0"))
    scorer = Scorer.load(text_run)
    figures = sliding(scorer, read_texts([str(text)], scorer.tokenizer), 8, ROWS).figures()
    assert values(first) == pytest.approx(figures)
    assert first["title"] == "wiki.raw (stride 8, context 32), limit 2"
    expected = run_task(scorer, read_task(words)[:2], ROWS)
    assert second["figures"]["last_word_accuracy"]["value"] == expected["accuracy"].value
    assert second["figures"]["last_word_perplexity"]["standard_error"] == expected["perplexity"].stderr
    assert (first["truncated_contexts"], second["truncated_contexts"]) == (0, 1)  # 32 bytes fit, 37 do not
    names = {path.name for path in (text_run / "eval").glob("*-limit-2.json")}
    assert names == {"text-wiki.raw-stride-8-limit-2.json", "task-words-limit-2.json"}
    assert err.count("saved as") == 2


def test_a_stride_reads_the_runs_own_documents(
    text_run: Path, own_loss: dict[str, float], call: Call
) -> None:
    out, _ = call(text_run, "--stride", 32, "--json", "--checkpoint", "newest")
    assert values(json.loads(out))["bits_per_byte"] == pytest.approx(own_loss["bits_per_byte"], rel=1e-5)
    assert (text_run / "eval" / "validation-stride-32-newest.json").is_file()


def test_dialogues_are_measured_on_their_answers(tmp_path: Path, call: Call) -> None:
    for name in ("train", "held"):
        lines = [json.dumps({"prompt": f"{name} {i}", "completion": "ab" * i}) for i in range(1, 4)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    files = {"train": (str(tmp_path / "train.jsonl"),), "validation": (str(tmp_path / "held.jsonl"),)}
    folder = save_run(tmp_path / "chat", Chat(**files))
    out, _ = call(folder, "--json")
    record = json.loads(out)
    assert record["title"] == "The run's own validation dialogues, answers alone"
    assert values(record)["targets"] == 2 + 4 + 6 + 3  # each with its end
    assert "has only a validation split" not in call(folder, "--stride", 2, code=2)[1]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--stride", "0"], "--stride is 0; it must be between 1 and 16,777,216."),
        (["--stride", "33"], "stride is 33; it must be between 1 and the model's context of 32 tokens."),
        (
            ["--stride", "3", "--memory", "3"],
            "--stride and --memory are two ways to give a token what is before",
        ),
        (["--memory", "3"], "--memory is 3 but a GPT carries none; drop it, or use --stride."),
        (["--limit", "-1"], "--limit is -1; it must be between 0 and 9,007,199,254,740,992."),
        (
            ["--tasks", "a.jsonl", "--stride", "3"],
            "--stride and --memory are for text; drop them, or name texts",
        ),
        (["--tasks", "a.jsonl"], "a.jsonl does not exist; check the path."),
        (
            ["--split", "test"],
            "--split is 'test' but this run's data have only a validation split; name other",
        ),
        (
            ["--split", "test", "--text", "x"],
            "--split is of the run's own data; drop it, or --text and --tasks.",
        ),
        (["--text", "no.txt"], "no.txt cannot be read (No such file or directory); check the path and its"),
        (["--checkpoint", "9"], "checkpoint '9' is not in "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_sentence(args: list[str], message: str, text_run: Path, call: Call) -> None:
    out, err = call(text_run, *args, code=2)
    assert out == ""
    assert f"jaxgpt: {message}" in err


def test_a_model_that_gives_nan_has_no_score(text_run: Path, tmp_path: Path, call: Call) -> None:
    data = load(text_run).data
    params = sharp_params(MODEL)
    params["embed"]["weight"] = params["embed"]["weight"].at[ord("t")].set(float("nan"))
    folder = save_run(tmp_path / "diverged", data, params=params)
    (tmp_path / "a.txt").write_text(TEXT[:40])
    (tmp_path / "w.jsonl").write_text(json.dumps({"text": "the cat sat"}))
    for args in ([], ["--stride", 8], ["--text", tmp_path / "a.txt"], ["--tasks", tmp_path / "w.jsonl"]):
        out, err = call(folder, *args, "--json", code=3)
        assert out == ""
        assert err.count("not finite (NaN or infinity)") == 1 and "Traceback" not in err
    assert not list(folder.glob("eval/*.json"))


def test_what_was_measured_is_shown_where_it_cannot_be_saved(
    text_run: Path, own_loss: dict[str, float], call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "eval")

    monkeypatch.setattr("jaxgpt.evals.command.write_json", full)
    out, err = call(text_run, code=2)
    assert f"{own_loss['bits_per_byte']:.4f}" in out
    assert "No space left on device" in err


def test_a_folder_that_cannot_be_written_is_found_first(tmp_path: Path, text_run: Path, call: Call) -> None:
    folder = tmp_path / "run"
    shutil.copytree(text_run, folder, ignore=shutil.ignore_patterns("eval"))
    (folder / "eval").write_text("a file")
    out, err = call(folder, code=2)
    assert out == "" and "cannot be written (Not a directory)" in err
