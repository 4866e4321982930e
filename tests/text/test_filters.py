"""Each filter by its rule; what is planted is found, and other text stays as it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt.config.filters import Filters
from jaxgpt.errors import UserError
from jaxgpt.text.filters import (
    Pipeline,
    exact_key,
    make_filters,
    masked,
    personal_data,
    repetition,
    shingles,
    symbol_share,
)


def clean(text: str, **parts):
    return Pipeline(make_filters(Filters(**parts))).clean(text)


def test_without_options_there_is_no_filter():
    assert make_filters(Filters()) == []


def test_rules_by_hand():
    assert clean("abc", min_chars=4) is None and clean("abcd", min_chars=4, max_chars=4) == "abcd"
    assert clean("abcde", max_chars=4) is None
    assert symbol_share("ab#~") == 0.5 and symbol_share("Good, no? 好。") == 0
    assert clean("## ~~ ##", max_symbols=0.3) is None
    assert repetition("a\nb\na\na") == 0.5  # two of four lines
    assert repetition(" ".join("abcdefg")) == 0
    assert repetition("a b c d e f " * 2) == pytest.approx(2 / 8)  # 5-grams: 8, two of them twice
    assert clean("buy now\n" * 9, max_repetition=0.3) is None


def test_languages():
    english, chinese = "The cat sat quietly on the old wooden bench.", "花园里有一只黑色的猫坐在长椅上。"
    assert clean(english, languages=("en",)) == english and clean(chinese, languages=("en",)) is None
    assert clean(chinese, languages=("zh", "en")) == chinese
    with pytest.raises(UserError, match="xx"):
        make_filters(Filters(languages=("xx",)))


def test_toxic_lines_are_left_out(tmp_path: Path):
    text = "A fine day.\nYou are a fucking idiot.\nGood night.\n"
    assert clean(text, max_toxicity=0.8) == "A fine day.\nGood night.\n"
    (tmp_path / "words.txt").write_text("night\n傻瓜\n")
    words = {"toxic_words": str(tmp_path / "words.txt")}
    assert clean("A Night out\nnightly news\n你是傻瓜\n", **words) == "nightly news\n"
    assert clean("good night", **words) is None


PERSONAL = {
    "mail ada@example.com now": "mail <EMAIL_ADDRESS> now",
    "card 4111 1111 1111 1111.": "card <CREDIT_CARD>.",
    "IBAN DE89370400440532013000": "IBAN <IBAN_CODE>",
    "host 192.168.10.1 is up": "host <IP_ADDRESS> is up",
    "call +1 212 555 0123": "call <PHONE_NUMBER>",
    "手机13812345678。": "手机<PHONE_NUMBER>。",
    "身份证11010519491231002X。": "身份证<CN_ID>。",
    "请发邮件到ada@example.com谢谢": "请发邮件到<EMAIL_ADDRESS>谢谢",
    "卡号4111111111111111是我的": "卡号<CREDIT_CARD>是我的",
    "地址192.168.10.1吗": "地址<IP_ADDRESS>吗",
    "电话010-62751234，卡6222 0212 3456 7890 128。": "电话<PHONE_NUMBER>，卡<BANK_CARD>。",
}


@pytest.mark.parametrize("text", PERSONAL)
def test_personal_data_are_masked(text):
    assert clean(text, mask_personal=True) == PERSONAL[text]


def test_wrong_check_digits_are_no_id_and_own_patterns_count(tmp_path: Path):
    assert clean("110105194912310021 x", mask_personal=True).endswith(" x")
    assert "CN_ID" not in clean("号110105194912310021", mask_personal=True)
    (tmp_path / "own.tsv").write_text("TICKET\tT-\\d+\n")
    assert clean("see T-42!", personal_patterns=str(tmp_path / "own.tsv")) == "see <TICKET>!"
    (tmp_path / "own.tsv").write_text("TICKET\t(\n")
    with pytest.raises(UserError, match=r"own.tsv:1 holds no regular expression"):
        make_filters(Filters(personal_patterns=str(tmp_path / "own.tsv")))


OVERLAPS = "TICKET\t\\d*\nLETTERS\tabcd\nMORE\tcdef\n"


def test_nothing_of_what_overlaps_stays_and_nothing_is_no_match(tmp_path: Path):
    (tmp_path / "own.tsv").write_text(OVERLAPS)
    for known in (True, False):
        parts = {"personal_patterns": str(tmp_path / "own.tsv"), "mask_personal": known}
        assert clean("x abcdef y 42", **parts) == "x <LETTERS> y <TICKET>"


@pytest.mark.parametrize(
    "text", ["std::vector<a::b> x", "see a::b and c[1::2]", "12:30 or 12:30:45", "Gotham 169-8"]
)
def test_programs_times_and_scores_are_no_personal_data(text):
    assert clean(text, mask_personal=True) == text
    assert clean("fe80::1 and 2001:db8::8a2e:7334", mask_personal=True) == "<IP_ADDRESS> and <IP_ADDRESS>"


@settings(deadline=None)  # the first loads the recognisers
@given(st.text(alphabet="abc xyz,.\n猫狗", max_size=60))
def test_text_without_personal_data_stays(text):
    assert masked(text, personal_data(text)) == text


@settings(deadline=None)
@given(st.text(alphabet="abc \n", max_size=20), st.text(alphabet="abc \n", max_size=20))
def test_what_stands_around_a_mask_stays(before, after):
    text = f"{before} ada@example.com {after}"
    assert clean(text, mask_personal=True) == f"{before} <EMAIL_ADDRESS> {after}"


QUESTION = "which river runs through the middle of the old town of Prague before it turns north again"


@pytest.mark.parametrize("name", ["eval.jsonl", "eval.json", "eval.tsv", "eval.txt"])
def test_planted_questions_are_found(tmp_path: Path, name):
    value = {"data": [{"qas": [{"question": QUESTION}], "n": 3}]}
    text = {"json": json.dumps(value), "jsonl": json.dumps(value), "tsv": f"1\t{QUESTION}", "txt": QUESTION}
    (tmp_path / name).write_text(text[name.partition(".")[2]])
    parts = {"decontaminate": (str(tmp_path / name),)}
    assert clean(f"We ask: {QUESTION.upper()}?", **parts) is None
    assert clean(" ".join(QUESTION.split()[:12]), **parts) is not None  # 12 words: fewer than an n-gram
    assert clean(" ".join(reversed(QUESTION.split())), **parts) is not None


CHINESE = "黑豹队的防守只丢了三百零八分在联赛中排名第六也领先全联盟"


def test_short_and_chinese_evaluation_texts(tmp_path: Path):
    (tmp_path / "a.txt").write_text(f"one two three four five six seven eight\nshort\n{CHINESE}\n")
    parts = {"decontaminate": (str(tmp_path / "a.txt"),)}
    assert clean("zero one two three four five six seven eight nine", **parts) is None
    assert clean("short", **parts) == "short"
    assert clean("他说黑豹队的防守只丢了三百零八分，在联赛中排名第六，也领先全联盟。", **parts) is None
    assert clean("黑豹队的防守很好。", **parts) is not None


def test_short_names_of_chinese_files_are_no_contamination(tmp_path: Path):
    """Eight characters are about four words."""
    (tmp_path / "a.txt").write_text(f"中华人民共和国国务院\n{CHINESE[:16]}\n")
    parts = {"decontaminate": (str(tmp_path / "a.txt"),)}
    assert clean("他在中华人民共和国国务院工作。", **parts) is not None
    assert clean(f"他说{CHINESE}", **parts) is None


def test_separators_inside_json_and_commas_inside_cells(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"q": "first\u2028line"}\n' + json.dumps({"q": QUESTION}) + "\n")
    listed = "which of these, the red, the green, the blue, or none, is the colour of a clear sky"
    (tmp_path / "a.csv").write_text(f'1,"{listed}"\n')
    assert clean(QUESTION, decontaminate=(str(tmp_path / "a.jsonl"),)) is None
    assert clean(listed, decontaminate=(str(tmp_path / "a.csv"),)) is None


def test_contamination_is_looked_for_before_masks(tmp_path: Path):
    (tmp_path / "a.txt").write_text("who reads the letters that are sent to ada@example.com in the end")
    parts = {"decontaminate": (str(tmp_path / "a.txt"),), "mask_personal": True}
    assert clean((tmp_path / "a.txt").read_text(), **parts) is None


@pytest.mark.parametrize(
    ("parts", "flag"),
    [({"similarity": 0.9}, "--duplicates near"), ({"language_share": 0.9}, "--languages"),
     ({"contamination_ngram": 8}, "--decontaminate"), ({"decontaminate": ("none.txt",)}, "none.txt")],
)  # fmt: skip
def test_options_that_would_do_nothing(parts, flag):
    with pytest.raises(UserError, match=flag):
        Filters(**parts)


def test_what_filters_did_is_counted():
    pipeline = Pipeline(make_filters(Filters(min_chars=3, mask_personal=True)))
    for text in ("ab", "abc", "a@example.com"):
        pipeline.clean(text)
    assert pipeline.tallies["length"] == {"seen": 3, "dropped": 1, "changed": 0, "examples": ["ab"]}
    assert pipeline.tallies["personal data"]["changed"] == 1


def test_keys_of_duplicates():
    assert exact_key("A  b\nC") == exact_key("a b c") != exact_key("a b d")
    assert list(shingles("a b c")) == ["a b c"] and len(list(shingles("a b c d e f"))) == 2
    assert list(shingles("!! ?")) != list(shingles("..."))  # texts without words are not all alike
