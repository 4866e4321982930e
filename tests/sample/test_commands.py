"""`jaxgpt sample` and `jaxgpt chat` through pipes, with a model that recites a known text."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_models import RECITED

from jaxgpt.config import Chat, Run, Text
from jaxgpt.errors import UserError
from jaxgpt.sample import commands
from jaxgpt.sample.generate import Generator, Token
from jaxgpt.sample.settings import Asked

GREEDY = Asked(temperature=0)
CHAT_RUN = Run(name="r", data=Chat(train=("x.jsonl",)))
TEXT_RUN = Run(name="r", data=Text(path="x"))


@pytest.fixture
def chat_run(monkeypatch: pytest.MonkeyPatch, reciter: Generator) -> Generator:
    """A run tuned on dialogues stands where a folder would be read."""
    monkeypatch.setattr(commands, "load_run", lambda run: CHAT_RUN)
    monkeypatch.setattr(commands, "_load", lambda *args: reciter)
    return reciter


@pytest.fixture
def text_run(monkeypatch: pytest.MonkeyPatch, chat_run: Generator) -> Generator:
    """The same with a run that continues text."""
    monkeypatch.setattr(commands, "load_run", lambda run: TEXT_RUN)
    return chat_run


def typed(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))


def asked(monkeypatch: pytest.MonkeyPatch, generator: Generator) -> list[str]:
    """The prompts that the generator is given from now on, with control tokens as dots."""
    seen: list[str] = []
    stream = generator.stream

    def spy(prompts: list[list[int]], *args: Any, **kwargs: Any) -> Iterator[Token]:
        dots = dict.fromkeys(generator.tokenizer.control.values(), ".")
        seen.extend("".join(dots.get(i) or chr(i) for i in p) for p in prompts)
        return stream(prompts, *args, **kwargs)

    monkeypatch.setattr(generator, "stream", spy)
    return seen


def test_a_chat_run_answers_and_stdout_holds_the_text_alone(
    chat_run: Generator, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = asked(monkeypatch, chat_run)
    commands.sample("r", prompt=("hi",), sampling=GREEDY, max_new_tokens=20, system="be")
    assert capsys.readouterr().out == RECITED + "\n"
    assert prompts == ["..be..hi.."]  # bos system be end user hi end assistant


def test_raw_and_a_text_run_continue_the_prompt(
    text_run: Generator, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = asked(monkeypatch, text_run)
    commands.sample("r", prompt=("ax",), sampling=GREEDY, max_new_tokens=20)
    monkeypatch.setattr(commands, "load_run", lambda run: CHAT_RUN)
    commands.sample("r", prompt=("ax",), sampling=GREEDY, max_new_tokens=20, raw=True)
    assert capsys.readouterr().out == (RECITED + "\n") * 2
    assert prompts == [".ax", ".ax"]


def test_several_completions_come_in_order_with_separators(
    chat_run: Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    for batch_size in (1, 2, 64):
        commands.sample(
            "r", prompt=("a", "b"), n=2, sampling=GREEDY, max_new_tokens=20, batch_size=batch_size
        )
        assert capsys.readouterr().out == "\n---\n".join([RECITED] * 4) + "\n"


def test_the_first_unfinished_row_streams_and_later_ones_wait() -> None:
    def token(row: int, text: str, last: bool = False) -> Token:
        return Token(row, 0, 0.0, "stop" if last else None, text)

    first = [token(0, "a"), token(1, "X"), token(1, "Y", last=True), token(0, "b", last=True)]
    pieces = list(commands._in_order([first, [token(0, "Z", last=True)]], [2, 1]))
    assert pieces == ["a", "b", "\n---\n", "XY", "\n---\n", "Z", "\n"]


def test_json_has_one_object_a_completion(chat_run: Generator, capsys: pytest.CaptureFixture[str]) -> None:
    commands.sample("r", prompt=("a",), n=2, seed=5, sampling=GREEDY, json=True)
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [r["seed"] for r in records] == [5, 6]
    for record in records:
        assert list(record) == ["prompt", "text", "ids", "logprobs", "finish_reason", "seed"]
        assert (record["prompt"], record["text"]) == ("a", RECITED)
        assert bytes(record["ids"][:-1]).decode() == RECITED
        assert len(record["logprobs"]) == len(record["ids"])
        assert record["finish_reason"] == "stop"


def test_prompts_from_standard_input_and_a_file(
    text_run: Generator,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prompts = asked(monkeypatch, text_run)
    typed(monkeypatch, "two\nlines x\n")
    file = tmp_path / "prompts.txt"
    file.write_text("one x\n\nanother x\n", "utf-8")
    commands.sample("r", prompt=("-",), prompt_file=str(file), sampling=GREEDY, max_new_tokens=20)
    assert prompts == [".two\nlines x", ".one x", ".another x"]
    assert capsys.readouterr().out.count(RECITED) == 3


def test_bad_prompts_are_one_sentence(
    chat_run: Generator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="no prompt is given"):
        commands.sample("r")
    with pytest.raises(UserError, match="prompt 0 has 104 tokens but the model's context is 48"):
        commands.sample("r", prompt=("y" * 100,))
    with pytest.raises(UserError, match="cannot be read: No such file"):
        commands.sample("r", prompt_file=str(tmp_path / "none"))
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match="is not UTF-8"):
        commands.sample("r", prompt_file=str(tmp_path / "latin"))
    with pytest.raises(UserError, match="lone surrogate"):
        commands.sample("r", prompt=("\udcff",))
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"run folder .* does not exist"):
        commands.sample(str(tmp_path / "none"), prompt=("a",))


def test_a_dialogue_over_a_pipe_keeps_its_turns_until_reset(
    chat_run: Generator, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = asked(monkeypatch, chat_run)
    typed(monkeypatch, "a\n\nb\n/reset\nc\n/quit\nnever\n")
    commands.chat("r", system="s", sampling=GREEDY, max_new_tokens=20)
    captured = capsys.readouterr()
    assert captured.out == (RECITED + "\n") * 3
    assert "forgotten" in captured.err
    recited = RECITED.encode().decode("latin-1")
    assert prompts == ["..s..a..", f"..s..a..{recited}..b..", "..s..c.."]


def test_the_oldest_turns_go_when_the_context_is_full(
    chat_run: Generator, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = asked(monkeypatch, chat_run)
    typed(monkeypatch, "first\nsecond\nthird\n" + "long" * 20 + "\nlast\n")
    commands.chat("r", sampling=GREEDY, max_new_tokens=20)
    captured = capsys.readouterr()
    assert captured.out == (RECITED + "\n") * 4
    assert "the oldest 2 turns are forgotten" in captured.err
    assert "this turn makes a prompt of 84 tokens" in captured.err
    assert all(len(p) < chat_run.model.context for p in prompts)
    assert "first" not in prompts[2] and "second" in prompts[2]
    assert "long" not in prompts[3], "a turn that does not fit is not kept"


def test_an_interrupt_ends_the_answer_but_not_the_program(
    chat_run: Generator, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stream = chat_run.stream
    calls = []

    def interrupted(*args: Any, **kwargs: Any) -> Iterator[Token]:
        calls.append(args)
        for i, token in enumerate(stream(*args, **kwargs)):
            if len(calls) == 1 and i == 2:
                raise KeyboardInterrupt
            yield token

    monkeypatch.setattr(chat_run, "stream", interrupted)
    typed(monkeypatch, "a\nb\n")
    commands.chat("r", sampling=GREEDY, max_new_tokens=20)
    captured = capsys.readouterr()
    assert captured.out == f"é\n{RECITED}\n"
    assert "stopped" in captured.err


def test_a_run_without_dialogues_is_named_as_such(
    text_run: Generator, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed(monkeypatch, "")
    commands.chat("r")
    captured = capsys.readouterr()
    assert captured.out == "" and "not tuned on dialogues" in captured.err


@pytest.mark.parametrize("name", ["sample", "chat"])
def test_help_comes_without_jax(name: str) -> None:
    code = (
        "import sys, tyro\nfrom jaxgpt.sample import commands\n"
        f"try: tyro.cli(commands.{name}, args=['--help'])\n"
        "finally: assert 'jax' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for flag in ("RUN", "--temperature", "--top-p", "--mesh.tensor", "--checkpoint"):
        assert flag in done.stdout


def test_flags_reach_the_settings(
    chat_run: Generator, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import tyro

    args = ["r", "--prompt", "-", "--prompt", "b", "--temperature", "0", "--json", "--n", "1"]
    typed(monkeypatch, "a\n")
    tyro.cli(commands.sample, args=[*args, "--top-k", "3"])
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(r["prompt"], r["text"]) for r in records] == [("a", RECITED), ("b", RECITED)]
