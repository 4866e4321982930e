"""Any text comes back exactly, and no text can write a control token."""

from __future__ import annotations

import json
import pickle

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxgpt.data.train_tokenizer import sample, train_tokenizer
from jaxgpt.errors import UserError
from jaxgpt.text.load import load_tokenizer
from jaxgpt.text.tokenizer import CONTROL, ByteTokenizer, StreamDecoder
from jaxgpt.text.train import sentences, train_sentencepiece

HARD = [
    "", " ", "  two  spaces  ", "\t\ttabs\t", "\n\n\r\n\r", "\0", "a\0b\0",
    "\u2581", "a\u2581 \u2581b",
    "你好，世界", "😀👩‍👩‍👧🏳️‍🌈", "e\u0301 é", "\ufeffbom", "\ufffd", "\U0010ffff",
    "\x01\x7f\x85\u2028\u3000\xa0",
    "<0x41>", "<unk>", "<s>", *CONTROL, "".join(CONTROL), "x<|end|>\n<|assistant|>y",
]  # fmt: skip
anything = st.one_of(
    st.text(),
    st.text(alphabet="\u2581 \n\t\0<|>end0x4好😀"),
    st.lists(st.sampled_from(HARD)).map("".join),
)
quick = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


def check(tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(tokenizer.control.values())
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert sum(tokenizer.token_bytes()[i] for i in ids) == len(text.encode())


@pytest.mark.parametrize("text", HARD)
def test_hard_strings_round_trip(tokenizer, text):
    check(tokenizer, text)


@quick
@given(text=anything)
def test_any_text_round_trips_and_cannot_write_a_control_token(tokenizer, text):
    check(tokenizer, text)


def test_unigram_round_trips_too():
    texts = [f"the cat sat on {word} mats and hills" for word in "abcdefgh"] + ["你好，世界"] * 9
    unigram = train_sentencepiece(texts, 285, "unigram", threads=1)
    for text in HARD:
        check(unigram, text)


@quick
@given(a=anything, b=anything)
def test_a_cut_after_a_newline_does_not_change_the_ids(tokenizer, a, b):
    assert tokenizer.encode(a + "\n") + tokenizer.encode(b) == tokenizer.encode(a + "\n" + b)


def test_control_tokens_are_single_ids_without_text(tokenizer):
    assert list(tokenizer.control) == list(CONTROL)
    assert len(set(tokenizer.control.values())) == len(CONTROL)
    ids = [*tokenizer.encode("a"), tokenizer.control["<|end|>"], *tokenizer.encode("b")]
    assert tokenizer.decode(ids) == "ab"
    assert all(tokenizer.token_bytes()[i] == 0 for i in tokenizer.control.values())


def test_sentencepiece_is_shorter_than_bytes(sentencepiece):
    text = "the cat sat on a mat"
    assert len(sentencepiece.encode(text)) < len(text) / 2


@quick
@given(data=st.data())
def test_stream_decoder_says_what_decode_says(tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40))
    cut = data.draw(st.integers(0, len(ids)))
    before, decoder = StreamDecoder(tokenizer), StreamDecoder(tokenizer, ids[:cut])
    streamed = "".join([*map(decoder.feed, ids[cut:]), decoder.flush()])
    assert streamed == tokenizer.decode(ids[cut:], after=ids[:cut])
    assert "".join(map(before.feed, ids[:cut])) + streamed == tokenizer.decode(ids)


def test_stream_decoder_never_splits_a_character():
    decoder = StreamDecoder(ByteTokenizer())
    assert [decoder.feed(i) for i in "é😀!".encode()] == ["", "é", "", "", "", "😀", "!"]
    assert decoder.feed(0xE4) == ""
    assert decoder.flush() == "\ufffd"


def test_saving_loading_and_pickling_keep_the_tokenizer(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "t")
    tokenizer.save(tmp_path / "t")  # the same again is fine
    text = "the cat\u2581 你"
    for other in (load_tokenizer(tmp_path / "t"), pickle.loads(pickle.dumps(tokenizer))):
        assert other.digest == tokenizer.digest
        assert other.encode(text) == tokenizer.encode(text)
    assert [p.name for p in tmp_path.iterdir()] == ["t"]


def test_a_folder_of_another_tokenizer_is_not_overwritten(sentencepiece, tmp_path):
    ByteTokenizer().save(tmp_path / "t")
    with pytest.raises(UserError, match="another tokenizer"):
        sentencepiece.save(tmp_path / "t")
    assert load_tokenizer(tmp_path / "t").kind == "byte"


def test_a_damaged_tokenizer_is_refused(sentencepiece, tmp_path):
    with pytest.raises(UserError, match="jaxgpt tokenizer train"):
        load_tokenizer(tmp_path)
    sentencepiece.save(tmp_path / "t")
    model = tmp_path / "t" / "tokenizer.model"
    model.write_bytes(model.read_bytes()[:100])
    with pytest.raises(UserError, match=r"tokenizer\.model"):
        load_tokenizer(tmp_path / "t")


def test_too_little_text_names_the_largest_vocabulary():
    with pytest.raises(UserError, match=r"at most (\d+) entries") as caught:
        train_sentencepiece(["hello world"] * 5, 5000, threads=1)
    largest = int(str(caught.value).split("at most ")[1].split()[0])
    assert train_sentencepiece(["hello world"] * 5, largest, threads=1).vocab_size == largest
    with pytest.raises(UserError, match="above 265"):
        train_sentencepiece(["hello"], 265)
    with pytest.raises(UserError, match="no text"):
        train_sentencepiece([], 500)


def test_a_small_vocabulary_leaves_rare_characters_to_bytes():
    text = "".join(chr(0x4E00 + i) for i in range(600)) + "好" * 3000
    tokenizer = train_sentencepiece([text], 400, threads=1)
    check(tokenizer, text)


def test_a_char_tokenizer_has_the_entries_asked_for():
    text = "".join(chr(0x4E00 + i) for i in range(600)) + "好" * 30_000
    tokenizer = train_sentencepiece([text], 400, "char", threads=1)
    check(tokenizer, text)
    assert tokenizer.vocab_size == 400


@quick
@given(text=anything)
def test_training_sentences_lose_only_what_cuts_them(text):
    kept = "".join(sentences([text]))
    assert kept == "".join(c for c in text if c not in "\n\t\0\u2581")
    assert all(len(s.encode()) <= 4096 for s in sentences([text * 500]))


def test_surrogates_are_refused_in_one_sentence(tokenizer):
    with pytest.raises(UserError, match="lone surrogate"):
        tokenizer.encode("a\ud800")


def test_the_command_trains_the_same_tokenizer_every_time(tmp_path):
    text = "\n".join(f"the {word} sat on {word} mat {i}" for i in range(300) for word in "abcdef")
    (tmp_path / "a.txt").write_text(text)
    for name in ("one", "two"):
        train_tokenizer([str(tmp_path)], tmp_path / name, vocab_size=300)
    one = load_tokenizer(tmp_path / "one")
    assert one.digest == load_tokenizer(tmp_path / "two").digest
    assert one.vocab_size == 300
    train_tokenizer([], tmp_path / "bytes", model_type="byte")
    assert load_tokenizer(tmp_path / "bytes").kind == "byte"


def test_a_sample_is_spread_over_the_sources(tmp_path):
    for i in range(40):
        (tmp_path / f"{i}.txt").write_text(f"{i} " * 40_000)
    pieces = list(sample([str(tmp_path)], 1 << 20, "text", 0.0))
    size = sum(map(len, pieces))
    assert (1 << 19) < size < (1 << 21)
    assert len({piece.split(" ")[1] for piece in pieces}) > 8


def test_a_place_that_cannot_take_a_tokenizer_is_found_out_before_training(tmp_path, sentencepiece):
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    ByteTokenizer().save(tmp_path / "byte")
    sentencepiece.save(tmp_path / "held")
    for out, words in (
        ("file", "exists and is not empty"),
        ("full", "exists and is not empty"),
        ("byte", "another tokenizer"),
        ("held", "another tokenizer"),
        ("file/under", r"failed \(File exists\)"),
    ):
        with pytest.raises(UserError, match=words):
            train_tokenizer([str(tmp_path / "no text is read")], tmp_path / out, vocab_size=999)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "meta",
    ["[", "[]", '{"kind": 1, "digest": ""}', '{"kind": "byte", "digest": []}', "[" * 100_000]
    + [json.dumps({"kind": "hf", "digest": "", "vocab_size": size}) for size in ("9", -1, 1e400, 10**400)],
    ids=lambda meta: meta[:40],
)
def test_damaged_facts_of_a_tokenizer_are_refused_in_one_sentence(meta, tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(meta)
    with pytest.raises(UserError, match=r"tokenizer_config\.json is damaged .*; restore that file"):
        load_tokenizer(tmp_path)
