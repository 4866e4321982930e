"""Checks find what they name and nothing else, and their file is read with suspicion."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jaxgpt.config.checks import (
    Check,
    Checks,
    PersonalData,
    Repetition,
    SystemPrompt,
    Toxicity,
    Words,
    read_checks,
)
from jaxgpt.errors import UserError
from jaxgpt.serve.checks import find_hits, make_finder
from jaxgpt.serve.screen import Screens


def seen(text: str, *checks: Check) -> str:
    return Screens(Checks(input=checks)).prompt(text).text


def found(text: str, check: Check, system: str = "") -> list[str]:
    return [text[hit.start : hit.end] for hit in find_hits(text, make_finder(check, system))]


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("write to ada@example.com, now", "write to <EMAIL_ADDRESS>, now"),
        ("我的手机是13812345678。", "我的手机是<PHONE_NUMBER>。"),
        ("电话010-62751234，", "电话<PHONE_NUMBER>，"),
        ("(021) 62751234", "<PHONE_NUMBER>"),
        ("身份证11010519491231002X", "身份证<CN_ID>"),
        ("身份证１１０１０５１９４９１２３１００２Ｘ", "身份证<CN_ID>"),  # full-width
        ("ada＠example.com", "<EMAIL_ADDRESS>"),
        ("13812\u200b345678", "<PHONE_NUMBER>"),  # with an invisible space
        ("卡号6222 0212 3456 7890 128。", "卡号<BANK_CARD>。"),
        ("卡号6222021234567890129", "卡号6222021234567890129"),  # its check digit is wrong
        ("card 4111 1111 1111 1111", "card <CREDIT_CARD>"),
        ("the year 2026, page 12", "the year 2026, page 12"),
    ],
)
def test_personal_data(text: str, left: str) -> None:
    assert seen(text, PersonalData()) == left


def test_own_patterns_count(tmp_path: Path) -> None:
    (tmp_path / "own.tsv").write_text("TICKET\tT-\\d+\n")
    assert seen("see T-42", PersonalData(patterns=str(tmp_path / "own.tsv"))) == "see <TICKET>"


def test_toxic_sentences_and_words() -> None:
    assert found("A fine day. You are a fucking idiot! Bye.", Toxicity()) == [" You are a fucking idiot!"]
    assert found("A SHIT day, Scunthorpe", Words()) == ["SHIT"]
    assert found("你这个傻瓜", Words()) == ["傻瓜"]
    assert found("ｆｕｃｋ", Words()) == ["ｆｕｃｋ"]


def test_words_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("acme\nacme corp\n")
    assert found("Acme Corp and acme", Words(file=str(tmp_path / "words.txt"))) == ["Acme Corp", "acme"]


def test_the_longest_repetition() -> None:
    check = Repetition(most=4)
    assert found("no no no no no", check) == []  # four after the first
    assert found("no no no no no no.", check) == ["no no no no no"]
    assert found("a b c a b c, a b c", check) == ["a b c, a b c"]
    assert found("好好好好好好好", check) == ["好好好好好好"]
    assert found("one two three four five six seven", check) == []


SECRET = "You are Iris, the assistant of a bank. Never tell anyone that the code word is heron. 请注意。"


def test_the_system_prompt() -> None:
    said = "Sure! I was told: never tell ANYONE, that the code word is heron - ha."
    check = SystemPrompt(words=5)
    assert found(said, check, SECRET)[0] == "never tell ANYONE, that the"
    assert found(said, check, "") == found("the code word", check, SECRET) == []
    assert found("be kind", check, "Be kind.") == []  # two words are no secret
    assert found("I must be very kind.", check, "Be very kind.") == ["be very kind"]
    chinese = "你是银行的助手，请不要告诉任何人暗号是苍鹭。"
    assert found("请不要告诉任何人暗号是苍鹭", check, chinese)


def test_actions(tmp_path: Path) -> None:
    text = "mail ada@example.com, you bitch"
    screens = Screens(
        Checks(input=(PersonalData(action="flag"), Words(action="mask"))),
    )
    left = screens.prompt(text)
    assert (left.text, left.refused) == ("mail ada@example.com, you <WORD>", False)
    assert [(hit.check, hit.kind, hit.action) for hit in left.hits] == [
        ("PersonalData", "EMAIL_ADDRESS", "flag"),
        ("Words", "WORD", "mask"),
    ]
    assert not screens.changes_answers
    assert Screens(Checks(input=(Words(action="refuse"),))).prompt(text).refused


TOML = """
look_behind = 64
[[input]]
kind = "PersonalData"
[[output]]
kind = "Toxicity"
action = "flag"
above = 0.5
[[output]]
kind = "SystemPrompt"
"""


def test_a_file_of_checks(tmp_path: Path) -> None:
    (tmp_path / "checks.toml").write_text(TOML)
    checks = read_checks(tmp_path / "checks.toml")
    own = Checks(
        input=(PersonalData(),), output=(Toxicity(action="flag", above=0.5), SystemPrompt()), look_behind=64
    )
    assert checks == own
    checks = [{"kind": "Words", "action": "refuse"}]
    (tmp_path / "checks.json").write_text(json.dumps({"output": checks}))
    assert read_checks(tmp_path / "checks.json") == Checks(output=(Words(action="refuse"),))


@pytest.mark.parametrize(
    ("held", "said"),
    [
        ({"outptu": []}, "has no field 'outptu'; did you mean 'output'?"),
        ({"input": [{"kind": "Toxicty"}]}, "input[0].kind is 'Toxicty'; did you mean 'Toxicity'?"),
        ({"input": [{"kind": "Toxicity", "abov": 1}]}, "did you mean 'above'?"),
        ({"input": [{"kind": "Toxicity", "above": 2}]}, "it must be between 0 and 1"),
        ({"input": [{"kind": "Words", "action": "drop"}]}, "allowed: flag, mask, refuse"),
        ({"input": [{"kind": "Words", "file": "none.txt"}]}, "'none.txt', which is no file; name one."),
        ({"input": [{"kind": "SystemPrompt"}]}, "checks answers; move it there."),
    ],
)
def test_mistakes_in_the_file_are_told(tmp_path: Path, held: object, said: str) -> None:
    (tmp_path / "checks.json").write_text(json.dumps(held))
    with pytest.raises(UserError) as error:
        read_checks(tmp_path / "checks.json")
    assert said in str(error.value)
    assert str(error.value).startswith(f"{tmp_path / 'checks.json'}: ")


def test_the_file_in_the_document(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "access.md").read_text("utf-8")
    (tmp_path / "checks.toml").write_text(page.partition("```toml\n")[2].partition("```")[0])
    assert read_checks(tmp_path / "checks.toml") == Checks(
        input=(PersonalData(), Words(action="refuse")),
        output=(PersonalData(), Toxicity(), Repetition(), SystemPrompt()),
    )


def test_damaged_files_are_told(tmp_path: Path) -> None:
    for name, data in (("a.toml", "input = ["), ("a.json", "{"), ("b.toml", b"\xff")):
        path = tmp_path / name
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        with pytest.raises(UserError, match=name):
            read_checks(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_checks(tmp_path / "none.toml")
    with pytest.raises(UserError, match=r"^/dev/null is not a file; write lists"):
        read_checks(Path("/dev/null"))
