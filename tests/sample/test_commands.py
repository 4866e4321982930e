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

from jaxgpt.cli import main
from jaxgpt.config import MBR, Beam, BestOf, Chat, Contrastive, Knowledge, Run, Text, parse_args
from jaxgpt.errors import UserError
from jaxgpt.sample import commands, output
from jaxgpt.sample.generate import Generator, Token
from jaxgpt.sample.options import Ruled
from jaxgpt.sample.settings import SAMPLE_DEFAULT, Asked, Sampling, Way
from jaxgpt.text.chat import render_plain

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


def test_a_run_without_a_template_goes_on_from_the_prompt_that_training_saw(
    chat_run: Generator, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(name="r", data=Chat(train=("x.jsonl",), template="none"))
    monkeypatch.setattr(commands, "load_run", lambda folder: run)
    prompts = asked(monkeypatch, chat_run)
    commands.sample("r", prompt=("ax",), sampling=GREEDY, max_new_tokens=20)
    assert capsys.readouterr().out == RECITED + "\n"
    pair = [{"role": "user", "content": "ax"}, {"role": "assistant", "content": RECITED}]
    trained = render_plain(pair, chat_run.tokenizer)
    assert prompts == [".ax"] and trained.tokens[:3] == [chat_run.tokenizer.control["<|bos|>"], *b"ax"]


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
    pieces = list(output.in_order([first, [token(0, "Z", last=True)]], [2, 1]))
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


def test_stop_strings_are_never_shown(chat_run: Generator, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"sampling": GREEDY, "max_new_tokens": 20}
    commands.sample("r", prompt=("a", "b"), stop=("🎉", "?"), **settings)
    assert capsys.readouterr().out == "é日\n---\né日\n"
    commands.sample("r", prompt=("a",), stop=("日",), json=True, **settings)
    record = json.loads(capsys.readouterr().out)
    assert (record["text"], record["finish_reason"]) == ("é", "stop")
    with pytest.raises(UserError, match="a --stop string is empty"):
        commands.sample("r", prompt=("a",), stop=("",))


def test_a_text_begins_as_in_training_unless_told(
    text_run: Generator, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = asked(monkeypatch, text_run)
    given: dict[str, Any] = {"prompt": ("x",), "sampling": GREEDY, "max_new_tokens": 20}
    commands.sample("r", **given)
    commands.sample("r", no_bos=True, **given)
    monkeypatch.setattr(text_run, "bos", False)
    commands.sample("r", **given)
    commands.sample("r", bos=True, **given)
    assert prompts == [".x", "x", "x", ".x"]
    end = text_run.tokenizer.control["<|eos|>"]
    assert text_run.texts([""])["prompts"] == [[end]], "something must be there: a text before has ended"
    for flags, words in (
        ({"bos": True, "no_bos": True}, "exclude"),
        ({"no_bos": True, "prompt": ("",)}, "empty"),
    ):
        with pytest.raises(UserError, match=words):
            commands.sample("r", **given | flags)
    monkeypatch.setattr(commands, "load_run", lambda run: CHAT_RUN)
    with pytest.raises(UserError, match="add --raw, or drop the flag"):
        commands.sample("r", no_bos=True, **given)


def test_a_completion_that_failed_is_told_with_exit_code_3(
    text_run: Generator, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    params = dict(text_run.params)
    params["embed"] = {"weight": params["embed"]["weight"] * float("nan")}
    monkeypatch.setattr(text_run, "params", params)
    for json_too in (False, True):
        assert main(["sample", "r", "--prompt", "a", "--prompt", "b", *["--json"] * json_too]) == 3
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1 or "is cut" in captured.err
        assert "2 of 2 completions ended early, where logits were not finite" in captured.err
        assert "NaN" not in captured.out and captured.out.count("\n") == (2 if json_too else 3)
    typed(monkeypatch, "a\n")
    assert main(["chat", "r"]) == 3
    assert "the answer ended early, where logits were not finite" in capsys.readouterr().err


def test_a_bias_is_given_as_ids_each_followed_by_what_is_added() -> None:
    words = [
        "--logit-bias",
        "5",
        "-100",
        "7",
        "2.5",
        "--presence-penalty",
        "-1",
        "--frequency-penalty",
        "0.5",
    ]
    asked = parse_args(Asked, words, "jaxgpt sample")
    how = asked.settle({}, Sampling())
    assert how == Sampling(presence_penalty=-1, frequency_penalty=0.5, logit_bias={5: -100, 7: 2.5})
    with pytest.raises(UserError, match="--logit-bias means nothing under --beams"):
        Way(beams=2).settle(Asked(logit_bias=((5, 1.0),)), {}, SAMPLE_DEFAULT)


def test_settings_come_from_flags_then_from_the_model_then_from_the_command(
    caplog: pytest.LogCaptureFixture,
) -> None:
    default, model = Sampling(temperature=0.8), {"temperature": 0.6, "top_p": 0.9, "top_k": 20}
    caplog.set_level("INFO", "jaxgpt")
    assert Asked().settle({}, default) == default
    assert caplog.text == ""
    assert Asked().settle(model, default) == Sampling(temperature=0.6, top_p=0.9, top_k=20)
    assert "temperature 0.6, top_k 20, top_p 0.9" in caplog.text
    caplog.clear()
    assert Asked(top_k=3, temperature=0).settle(model, default) == Sampling(temperature=0, top_p=0.9, top_k=3)
    assert "top_p 0.9" in caplog.text and "top_k" not in caplog.text
    caplog.clear()
    hostile = {
        "temperature": float("nan"),
        "top_p": 7.0,
        "min_p": -1,
        "top_k": 10**400,
        "repetition_penalty": 1.2,
    }
    assert Asked().settle(hostile, default) == Sampling(temperature=0.8, repetition_penalty=1.2)
    assert caplog.text.count("is not followed") == 4
    with pytest.raises(UserError, match="top_p is 7"):
        Asked(top_p=7.0)


def test_what_is_known_stands_before_the_question_and_its_sources_after_the_answer(
    chat_run: Generator,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "a.txt").write_text("A heron.\n\nAn owl.")
    (tmp_path / "f.tsv").write_text("owl\tis\tshy\n")
    known = Knowledge(documents=(f"{tmp_path}/a.txt",), facts=f"{tmp_path}/f.tsv")
    prompts = asked(monkeypatch, chat_run)
    commands.sample("r", prompt=("owl?",), sampling=GREEDY, max_new_tokens=9, knowledge=known)
    assert prompts.pop() == "..owl, is: shy.\n\nAn owl.\n\nowl?.."
    shown = capsys.readouterr()
    assert shown.err.splitlines()[-2:] == ["fact: owl, is: shy.", f"source: {tmp_path}/a.txt:3"]
    commands.sample("r", prompt=("owl?", "it?"), sampling=GREEDY, json=True, knowledge=known)
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first["prompt"], first["sources"]) == ("owl?", [f"{tmp_path}/a.txt:3"])
    assert (second["prompt"], second["sources"], second["facts"]) == ("it?", [], [])
    typed(monkeypatch, "owl?\nit?\n")
    commands.chat("r", sampling=GREEDY, max_new_tokens=9, knowledge=known)
    assert "An owl.\n\nowl?" in prompts[0] and "An owl" not in prompts[1] and "owl?" in prompts[1]
    assert "nothing is known about this" in capsys.readouterr().err


def test_a_completion_keeps_the_rule_of_its_flags(
    chat_run: Generator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "s.json").write_text('{"type": "integer", "minimum": 7, "maximum": 7}')
    for rules, text in (
        (Ruled(choices="no, maybe"), ("no", "maybe")),
        (Ruled(regex="[ab]{3}"), ("aaa", "aab", "aba", "abb", "baa", "bab", "bba", "bbb")),
        (Ruled(json_schema=str(tmp_path / "s.json")), ("7",)),
    ):
        commands.sample("r", prompt=("hi",), sampling=GREEDY, max_new_tokens=9, rules=rules)
        assert capsys.readouterr().out.removesuffix("\n") in text
    with pytest.raises(UserError, match="--choices, --regex are given"):
        commands.sample("r", prompt=("hi",), rules=Ruled(choices="a", regex="b"))


def test_other_ways_of_decoding_write_the_best_when_all_are_known(
    chat_run: Generator, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import tyro

    for flags in ("--beams 2", "--contrastive 0.1", "--best-of 2 --temperature 0", "--mbr 2 --temperature 0"):
        tyro.cli(commands.sample, args=["r", "--prompt", "a", "--prompt", "b", *flags.split()])
        assert capsys.readouterr().out == f"{RECITED}\n---\n{RECITED}\n", flags
    flags = ["--prompt", "a", "--beams", "2", "--n", "2", "--json", "--seed", "4"]
    tyro.cli(commands.sample, args=["r", *flags])
    best, second = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert (best["text"], best["prompt"], best["seed"]) == (RECITED, "a", 4)
    assert best["score"] == pytest.approx(sum(best["logprobs"]) / len(best["logprobs"]))
    assert best["score"] > second["score"]
    own = tmp_path / "mine.py"
    own.write_text("def shortness(prompt, text, record):\n    return len(prompt) - len(text)\n")
    tyro.cli(commands.sample, args=f"r --prompt a --best-of 2 --reward {own}:shortness --json".split())
    line = json.loads(capsys.readouterr().out)
    assert line["score"] == 1 - len(line["text"])


def test_flags_of_a_way_say_what_they_need() -> None:
    model = {"top_p": 0.9, "top_k": 7}
    assert Way().settle(Asked(), model, SAMPLE_DEFAULT) == Sampling(temperature=0.8, top_p=0.9, top_k=7)
    how = Way(beams=6, groups=3, length_penalty=0).settle(Asked(no_repeat_ngram=3), model, SAMPLE_DEFAULT)
    assert how == Beam(beams=6, groups=3, length_penalty=0, no_repeat_ngram=3)
    assert Way(contrastive=0.5).settle(Asked(), model, SAMPLE_DEFAULT) == Contrastive(k=4, alpha=0.5)
    drawn = Sampling(temperature=0.3, top_p=0.9, top_k=7)
    assert Way(mbr=4).settle(Asked(temperature=0.3), model, SAMPLE_DEFAULT) == MBR(n=4, sampling=drawn)
    assert Way(best_of=4).settle(Asked(temperature=0.3), model, SAMPLE_DEFAULT) == BestOf(n=4, sampling=drawn)
    bad: list[tuple[dict[str, Any], str]] = [
        ({"beams": 4, "mbr": 4}, "--beams and --mbr exclude each other; drop one"),
        ({"contrastive": 0.0, "best_of": 4}, "--best-of and --contrastive exclude each other"),
        ({"length_penalty": 1.0}, "--length-penalty is given without --beams; add that"),
        ({"best_of": 4, "diversity": 1.0}, "--diversity is given without --beams"),
        ({"beams": -1}, "beams is -1; it must be between 1 and 256"),
        ({"beams": 4, "groups": 3}, "beams is 4 and groups 3"),
        ({"mbr": 1}, "n is 1; it must be between 2 and 4,096"),
        ({"contrastive": 1.5}, "alpha is 1.5; it must be between 0 and 1"),
    ]
    for flags, words in bad:
        with pytest.raises(UserError, match=words):
            Way(**flags)
    with pytest.raises(UserError, match="--temperature means nothing under --beams; drop it"):
        Way(beams=4).settle(Asked(temperature=0.5), {}, SAMPLE_DEFAULT)
    with pytest.raises(UserError, match="--n is 5 but only 4 completions of a prompt are made; lower it"):
        commands.sample("r", way=Way(beams=4), n=5)
