"""Labelled texts: whatever the file's kind, the same examples; whatever the length, one target."""

from __future__ import annotations

import csv
import gzip
import io
import json
import logging

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from jaxgpt.data.readers.labelled import LabelledText, encode_labelled, label_set, read_labelled
from jaxgpt.errors import UserError
from jaxgpt.text.tokenizer import ByteTokenizer

quick = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))

# --------------------------------------------------------------------------------------- the files

plain = st.text(
    st.characters(exclude_categories=("Cs",), exclude_characters="\t\r\n"), min_size=1, max_size=8
)
text = plain.filter(str.strip)
label = st.sampled_from(["good", "坏", '"', "0", "-1"])
examples = st.lists(st.builds(LabelledText, text, text, label), min_size=1, max_size=5)
free = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=8).filter(str.strip)


@quick
@given(examples, st.booleans())
@example([LabelledText('"a', 'b"', "good"), LabelledText("a\x85", "\u2028b", '"')], True)
def test_tsv_has_no_quotes(tmp_path, written, windows):
    rows = [("idx", "label", "q", "a"), *((str(i), e.label, e.text, e.pair) for i, e in enumerate(written))]
    end = "\r\n" if windows else "\n"
    (tmp_path / "a.tsv").write_bytes("".join("\t".join(row) + end for row in rows).encode())
    assert read_labelled([tmp_path / "a.tsv"], "q", "a") == written


@quick
@given(st.lists(st.builds(LabelledText, free, free, label), min_size=1, max_size=5))
def test_csv_is_quoted_as_csv_has_it(tmp_path, written):
    out = io.StringIO(newline="")
    rows = csv.writer(out)
    rows.writerows([("text", "pair", "label"), *((e.text, e.pair, e.label) for e in written)])
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbf" + out.getvalue().encode())
    assert read_labelled([tmp_path / "a.csv"], pair_field="pair") == written


@quick
@given(st.lists(st.builds(LabelledText, free, st.none(), label), min_size=1, max_size=5), st.booleans())
def test_json_lines_zipped_or_not(tmp_path, written, zipped):
    lines = "".join(json.dumps({"sentence": e.text, "y": e.label}) + "\n" for e in written).encode()
    file = tmp_path / ("a.jsonl.gz" if zipped else "a.jsonl")
    file.write_bytes(gzip.compress(lines) if zipped else lines)
    assert read_labelled([file], text_field="sentence", label_field="y") == written


def test_integers_are_labels_in_the_order_of_their_values(tmp_path):
    lines = [json.dumps({"text": "a", "label": value}) for value in (10, 2, -1, "2")]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    read = read_labelled([tmp_path])
    assert [e.label for e in read] == ["10", "2", "-1", "2"]
    assert label_set(read) == ("-1", "2", "10")
    assert label_set([LabelledText("a", None, name) for name in ("b", "10", "9")]) == ("10", "9", "b")


def test_two_columns_without_a_header_as_in_sst2(tmp_path):
    (tmp_path / "dev.tsv").write_text('one long string of cliches\t0\nso "good" that it hurts\t1\n')
    expected = [
        LabelledText("one long string of cliches", None, "0"),
        LabelledText('so "good" that it hurts', None, "1"),
    ]
    assert read_labelled([tmp_path / "dev.tsv"]) == expected


def test_a_header_read_as_an_example_is_told(tmp_path, caplog):
    (tmp_path / "a.tsv").write_text("review\tsentiment\na\t0\nb\t0\n")
    with caplog.at_level(logging.WARNING):
        assert len(read_labelled([tmp_path / "a.tsv"])) == 3
    assert "no other has its label 'sentiment'" in caplog.text
    caplog.clear()
    (tmp_path / "a.tsv").write_text("review\t0\na\t0\nb\t1\n")
    with caplog.at_level(logging.WARNING):
        read_labelled([tmp_path / "a.tsv"])
    assert not caplog.text


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.tsv", b"a\t0\nb\n", r"a\.tsv:2: 1 columns, not the 2 of the first"),
        ("a.tsv", b"a\t0\n \t0\n", r"a\.tsv:2: field 'text' is empty"),
        ("a.tsv", b"a\t0\nb\t\n", r"a\.tsv:2: field 'label' is empty"),
        ("a.tsv", b"a\t0\n\nb\xff\t0\n", r"a\.tsv:3: not UTF-8 \(byte 0xff at column 2\)"),
        ("a.csv", b'a,0\n"b,0\nc,0\n', r"3 lines are bad.*a\.csv:2: not CSV \(unexpected end of data\)"),
        ("a.csv", b'a,0\n"b\nc",0,1\n', r"a\.csv:2: 3 columns, not the 2"),
        ("a.jsonl", b'{"text": "a"}\n', r"a\.jsonl:1: no field 'label'; allowed: text"),
        ("a.jsonl", b'{"text": 1, "label": 1}\n', r"a\.jsonl:1: field 'text' is int, not a string"),
        ("a.jsonl", b'{"text": "a", "label": 1.5}\n', r"field 'label' is float, not a string or an integer"),
        ("a.jsonl", b'{"text": "a", "label": true}\n', r"field 'label' is bool, not a string or an integer"),
        ("a.jsonl", b'{"text": "a", "label": "\\ud800"}\n', r"field 'label' holds a lone surrogate"),
        ("a.jsonl", b"[]\n", r"a\.jsonl:1: a JSON object was expected, not list"),
        ("a.jsonl", b"{\n", r"a\.jsonl:1: not JSON"),
    ],
)
def test_bad_lines_are_named_and_counted(tmp_path, name, data, words):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=words):
        read_labelled([tmp_path / name])


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        (
            "a.tsv",
            b"sentence\tlabel\na\t0\n",
            r"has no column 'text' \(its first line has: sentence, label\)",
        ),
        ("a.tsv", b"a\tb\t0\n", r"a\.tsv has no column 'text'"),
        ("a.csv", b"a,\xff\n", r"a\.csv:1 is not UTF-8"),
        ("a.xml", b"<a/>", r"a\.xml is of a kind this command does not read; use \.tsv, \.csv"),
        ("a.tsv", b"text\tlabel\n", "holds no example"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path, name, data, words):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=words):
        read_labelled([tmp_path / name], max_bad=1.0)


def test_a_chosen_name_is_never_taken_for_no_header(tmp_path):
    (tmp_path / "a.tsv").write_text("sentence\tlabel\na\t0\n")
    with pytest.raises(UserError, match="has no column 'sentnce'"):
        read_labelled([tmp_path / "a.tsv"], "sentnce", label_field="lable")
    with pytest.raises(UserError, match="has no column 'pair'"):
        read_labelled([tmp_path / "a.tsv"], "sentence", "pair")
    with pytest.raises(UserError, match=r"data\.text and data\.label cannot be empty"):
        read_labelled([tmp_path / "a.tsv"], "")


def test_some_bad_lines_are_left_out(tmp_path, caplog):
    (tmp_path / "a.tsv").write_text("a\t0\nb\nc\t1\n")
    assert [e.text for e in read_labelled([tmp_path], max_bad=0.4)] == ["a", "c"]
    assert "1 of 3 lines are bad" in caplog.text


def test_what_a_broken_quote_swallows_is_bad_lines(tmp_path):
    (tmp_path / "a.csv").write_text("a,0\n" * 10 + '"b,0\n' + "c,0\n" * 9)
    with pytest.raises(UserError, match="10 of 20 lines are bad"):
        read_labelled([tmp_path / "a.csv"], max_bad=0.4)


def test_a_cell_may_be_longer_than_csv_has_it(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\n" + "a" * 200_000 + ",0\n")
    assert len(read_labelled([tmp_path / "a.csv"])[0].text) == 200_000


# --------------------------------------------------------------------------------------- the tokens


def longest_first(text, pair, room):
    """`truncate_sequences` of transformers, a token at a time."""
    text, pair = list(text), list(pair)
    while len(text) + len(pair) > room:
        (text if len(text) > len(pair) else pair).pop()
    return text, pair


@quick
@given(
    st.text(st.characters(exclude_categories=("Cs",)), max_size=12),
    st.none() | st.text(st.characters(exclude_categories=("Cs",)), max_size=12),
    st.integers(4, 30),
    st.sampled_from(["first", "last", "mean"]),
)
def test_one_target_and_the_longer_text_is_cut(tokenizer, text, pair, length, pool):
    made = encode_labelled(LabelledText(text, pair, "b"), tokenizer, ("a", "b"), length, pool)
    assert len({len(part) for part in made if part is not None}) == 1 and len(made.tokens) <= length
    bos, eos = tokenizer.control["<|bos|>"], tokenizer.control["<|eos|>"]
    both = tokenizer.encode(text), tokenizer.encode(pair or "")
    first, second = longest_first(*both, length - (2 if pair is None else 3))
    first, second = [bos, *first, eos], ([*second, eos] if pair is not None else [])
    assert made.tokens == first + second
    assert made.types == (None if pair is None else [0] * len(first) + [1] * len(second))
    place = 0 if pool == "first" else len(made.tokens) - 1
    assert made.weights == [float(i == place) for i in range(len(made.tokens))]
    assert made.targets == [int(i == place) for i in range(len(made.tokens))]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"labels": ("good", "bad")}, "label 'goood' is not one of the model's; did you mean 'good'"),
        ({"length": 3}, "length is 3; a text with its control tokens needs at least 4"),
        ({"pool": "max"}, "pool is 'max'; allowed: first, last, mean"),
    ],
)
def test_mistakes_in_encoding_are_named(given, words):
    settings = {"labels": ("goood",), "length": 8, "pool": "first"} | given
    with pytest.raises(UserError, match=words):
        encode_labelled(LabelledText("a", None, "goood"), ByteTokenizer(), **settings)
