"""Hugging Face tokenizers: the ids of transformers, except that no text writes a control token."""

from __future__ import annotations

import json
import pickle
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tiny_hf
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxgpt.errors import UserError
from jaxgpt.text.hf_tokenizer import HFTokenizer
from jaxgpt.text.load import load_tokenizer
from jaxgpt.text.tokenizer import NEEDED, ByteTokenizer, StreamDecoder
from jaxgpt.text.train import train_sentencepiece

GOLDENS = json.loads((Path(__file__).parents[1] / "goldens" / "chat_template.json").read_text())
NAMES = [*tiny_hf.TOKENIZERS, "wordpiece", "unigram"]
EXACT = [name for name in NAMES if name not in ("wordpiece", "unigram")]  # every text comes back
quick = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
SPECIAL = [*tiny_hf.CHATML_SPECIAL, *tiny_hf.LLAMA3_SPECIAL, *tiny_hf.GEMMA_SPECIAL, "<s>", "</s>"]
SPECIAL += ["[CLS]", "[SEP]", "[MASK]", "[PAD]"]
anything = st.one_of(
    st.text(),
    st.lists(st.sampled_from([*SPECIAL, *tiny_hf.WORDS, " ", "\n", "<|", "好", "😀", "é", "<0x41>"])).map(
        "".join
    ),
)


def unigram() -> dict[str, bytes]:
    """As T5: a model that would find the piece `</s>` in a text by itself."""
    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *"</s>abcdehlort", "\u2581the"]
    pieces = list(dict.fromkeys(pieces))
    model = {"type": "Unigram", "unk_id": 2, "vocab": [[p, -1.0 - i / 8] for i, p in enumerate(pieces)]}
    model["vocab"][1][1] = 0.0
    bar = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}
    spec = {
        "added_tokens": tiny_hf._added(pieces[:3], 0),
        "pre_tokenizer": bar,
        "decoder": bar,
        "model": model,
    }
    return tiny_hf._files(spec, {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"})


@cache
def make(name: str) -> HFTokenizer:
    files = {"wordpiece": tiny_hf.wordpiece, "unigram": unigram}
    return HFTokenizer(files[name]() if name in files else tiny_hf.TOKENIZERS[name], name)


@pytest.mark.parametrize("name", GOLDENS)
def test_ids_and_text_are_those_of_transformers(name):
    tokenizer = make(name)
    for row in GOLDENS[name]["texts"]:
        assert tokenizer.encode(row["text"]) == row["ids"]
        assert tokenizer.encode_with_control(row["text"]) == row["obeyed"]
        assert tokenizer.decode(row["ids"]) == row["decoded"]


@pytest.mark.parametrize("name", NAMES)
@quick
@given(text=anything)
def test_no_text_writes_a_control_token(name, text):
    tokenizer = make(name)
    ids = tokenizer.encode(text)
    unknown = tokenizer.special.get(tokenizer.roles.get("unk_token", ""))
    assert not set(ids) & (set(tokenizer.special.values()) - {unknown})
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    if name in EXACT and "\u2581" not in text:
        metaspace = name in ("mistral", "gemma")  # the library puts no space before a space
        assert tokenizer.decode(ids) == (text.removeprefix(" ") if metaspace else text)


@pytest.mark.parametrize("name", NAMES)
@quick
@given(data=st.data())
def test_stream_decoder_says_what_decode_says(name, data):
    tokenizer = make(name)
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    cut = data.draw(st.integers(0, len(ids)))
    given, made = ids[:cut], ids[cut:]
    decoder = StreamDecoder(tokenizer, given)
    streamed = "".join([*map(decoder.feed, made), decoder.flush()])
    assert streamed == tokenizer.decode(made, after=given)
    # What comes first ends where its last whole character does: the rest may complete the next one.
    before = StreamDecoder(tokenizer)
    assert "".join(map(before.feed, given)) + streamed == tokenizer.decode(ids)


@pytest.mark.parametrize("name", EXACT)
@quick
@given(text=anything, data=st.data())
def test_a_fragment_is_what_the_library_adds_to_the_text_before(name, text, data):
    """The library decodes the whole; a prompt is shown up to its last whole character."""
    library = tokenizers.Tokenizer.from_str(make(name).files["tokenizer.json"].decode())
    ids = make(name).encode(text)
    cut = data.draw(st.integers(0, len(ids)))
    prompt = StreamDecoder(make(name))
    assert "".join(map(prompt.feed, ids[:cut])) + make(name).decode(ids[cut:], ids[:cut]) == library.decode(
        ids
    )


def test_a_fragment_keeps_its_space_and_completes_a_character():
    llama = make("mistral")
    prompt, more = llama.encode("the cat"), llama.encode("the cat sat")[2:]
    assert llama.decode(more, after=prompt) == " sat"
    assert llama.decode(more) == "sat"  # a text of its own
    bos = llama.control["<|bos|>"]
    assert llama.decode(more, after=[bos]) == "sat"  # a control token is no text
    assert llama.decode(more, after=[*prompt, llama.control["<|eos|>"]]) == " sat"
    head, tail = llama.encode("好")[:-1], llama.encode("好")[-1:]
    assert llama.decode(tail, after=head) == "好"
    assert (llama.decode(tail), llama.decode(head)) == ("\ufffd", "\ufffd")
    words = make("wordpiece")
    ids = words.encode("the cats")
    assert words.decode(ids[1:], after=ids[:1]) == " cats"


@pytest.mark.parametrize("files", [tiny_hf.byte_level, tiny_hf.metaspace])
@pytest.mark.parametrize("name", ["naïve", "é!", "<|ünï|>", "<｜end▁of▁turn｜>", "Ġthe cat", "日本"])
def test_an_added_token_decodes_to_its_own_text(files, name):
    made = dict(files())
    spec = json.loads(made["tokenizer.json"])
    new = 1 + max(*spec["model"]["vocab"].values(), *(t["id"] for t in spec["added_tokens"]))
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    spec["added_tokens"].append({"id": new, "content": name} | flags)
    tokenizer = HFTokenizer(made | {"tokenizer.json": json.dumps(spec).encode()})
    ids = tokenizer.encode(f"the {name} end")
    assert ids.count(new) == 1
    assert tokenizer.piece_bytes(new) == name.encode()
    assert tokenizer.decode(ids).split("the", 1)[1].removesuffix("end").strip() == name
    assert tokenizer.token_bytes()[new] == len(name.encode())


def test_an_added_token_that_stands_in_the_vocabulary_too_keeps_its_text():
    """As trainers of the tokenizers library leave it; `the` is made by a merge, so it is a word of bytes."""
    made = dict(tiny_hf.byte_level())
    spec = json.loads(made["tokenizer.json"])
    first = spec["added_tokens"][0]["id"]
    for token in spec["added_tokens"]:
        token["id"] += 1
    spec["model"]["vocab"] |= {"<|é|>": first}
    ids = {"<|é|>": first, "Ġthe": spec["model"]["vocab"]["Ġthe"]}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    spec["added_tokens"] += [{"id": i, "content": name} | flags for name, i in ids.items()]
    tokenizer = HFTokenizer(made | {"tokenizer.json": json.dumps(spec).encode()})
    assert tokenizer.piece_bytes(first) == "<|é|>".encode()
    assert tokenizer.decode(tokenizer.encode("a <|é|> b the")) == "a <|é|> b the"
    assert tokenizer.piece_bytes(ids["Ġthe"]) == b" the"


@pytest.mark.parametrize("name", NAMES)
def test_a_control_token_is_one_id_where_it_may_be_written(name):
    tokenizer = make(name)
    for special, i in tokenizer.special.items():
        assert tokenizer.encode_with_control(f"the{special}cat").count(i) == 1
        assert tokenizer.piece_bytes(i) == b""
        assert tokenizer.names[i] == special


def test_control_names_what_the_tokenizer_has():
    assert make("llama3").control == {"<|bos|>": 297, "<|eos|>": 298, "<|pad|>": 297}
    chatml = make("chatml")  # without a beginning: the end stands in for it
    assert chatml.control == {"<|bos|>": 299, "<|eos|>": 299, "<|pad|>": 297}
    assert chatml.vocab_size == 302
    bert = make("wordpiece").control
    assert bert == {"<|bos|>": 2, "<|eos|>": 3, "<|pad|>": 0, "<|mask|>": 4}


def test_a_model_that_pads_with_a_letter_keeps_it_as_text():
    tokenizer = HFTokenizer(tiny_hf.byte_level(pad_token="!"))
    ids = tokenizer.encode("hello!")
    assert tokenizer.control["<|pad|>"] == ids[-1]
    assert tokenizer.decode(ids) == "hello!"


def test_what_ends_generation():
    assert make("gemma").stop_ids == (2, 4)  # generation_config.json
    assert make("llama3").stop_ids == (298, 301)  # the template's <|eot|> too
    assert make("mistral").stop_ids == (2,)
    assert ByteTokenizer().stop_ids == tuple(range(256, 264))


def test_special_tokens_split_like_other_text_keep_their_bytes():
    tokenizer = make("chatml")
    assert tokenizer.encode("<|im_end|>") == tokenizer.encode("<|im") + tokenizer.encode("_end|>")
    assert tokenizer.encode("<think>") == [300]  # added, but no control token
    assert tokenizer.token_bytes()[tokenizer.encode("<|im_end|>")].sum() == len("<|im_end|>")


@pytest.mark.parametrize("name", NAMES)
def test_saving_loading_and_pickling_keep_everything(name, tmp_path):
    tokenizer, text = make(name), "the cat </s> 你<|im_end|>"
    tokenizer.save(tmp_path / "t")
    tokenizer.save(tmp_path / "t")
    plain = tmp_path / "plain"
    plain.mkdir()
    for file, data in tokenizer.files.items():
        (plain / file).write_bytes(data)
    others = load_tokenizer(tmp_path / "t"), load_tokenizer(plain), pickle.loads(pickle.dumps(tokenizer))
    for other in others:
        assert isinstance(other, HFTokenizer)
        assert (other.kind, other.digest, other.files) == ("hf", tokenizer.digest, tokenizer.files)
        assert other.encode(text) == tokenizer.encode(text)
        assert other == tokenizer
    assert (tmp_path / "t" / "hf" / next(iter(tokenizer.files))).is_file()


def test_added_tokens_without_a_row_do_not_exist(tmp_path):
    whole = HFTokenizer(tiny_hf.byte_level())
    cut = whole.within(whole.vocab_size - 1)
    assert whole.encode("</think>") == [whole.vocab_size - 1]
    ids = cut.encode("the</think>")
    assert max(ids) < cut.vocab_size == whole.vocab_size - 1
    assert cut.decode(ids) == "the</think>"
    cut.save(tmp_path / "t")
    for again in (load_tokenizer(tmp_path / "t"), pickle.loads(pickle.dumps(cut))):
        assert again == cut != whole
        assert again.files == whole.files  # which export writes
        assert again.encode("the</think>") == ids
    assert whole.within(10) == whole  # the vocabulary itself is never cut


def test_the_digest_follows_what_decides_ids():
    digests = {make(name).digest for name in NAMES}
    same = [make("chatml"), make("default system"), make("marked"), make("thinking")]  # but their templates
    assert len({t.digest for t in same}) == 1
    assert make("chatml") != make("marked")  # though: they write dialogues otherwise
    assert len(digests) == len(NAMES) - len(same) + 1


def test_old_layouts_give_the_same_ids():
    spec = json.loads(make("chatml").files["tokenizer.json"])
    pairs = spec["model"]["merges"]
    vocab = spec["model"]["vocab"] | {"<|endoftext|>": 297}
    merges = "#version: 0.2\n" + "\n".join(map(" ".join, pairs)) + "\n"
    for name in ("merges.txt", "vocab.bpe"):
        old = HFTokenizer({"vocab.json": json.dumps(vocab).encode(), name: merges.encode()})
        text = "hello world\n\nthe 好 <|endoftext|>"
        assert old.encode(text) == make("chatml").encode(text)
        assert old.encode_with_control(text)[-1] == old.control["<|eos|>"] == 297
    with pytest.raises(UserError, match=r"merges\.txt"):
        HFTokenizer({"vocab.json": json.dumps(vocab).encode()})


def sentencepiece_model() -> bytes:
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat", "hello world the end"] * 50),
        model_writer=model, vocab_size=300, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


@pytest.fixture(scope="module")
def llama2() -> HFTokenizer:
    return HFTokenizer({"tokenizer.model": sentencepiece_model()})


@quick
@given(text=anything)
def test_a_sentencepiece_model_alone_encodes_as_its_library(llama2, text):
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=llama2.files["tokenizer.model"])
    ids = llama2.encode(text)
    assert ids == processor.encode(text)
    if "\u2581" not in text:
        assert llama2.decode(ids) == text
    assert not set(ids) & {1, 2}
    obeyed = llama2.encode_with_control(text)
    assert obeyed.count(1) == text.count("<s>")
    assert obeyed.count(2) == text.count("</s>")
    ids, weights = llama2.rendered(text, [(0, len(text))])
    assert weights == [1.0] * len(ids)


@quick
@given(text=anything, data=st.data())
def test_a_fragment_of_a_sentencepiece_model_alone(llama2, text, data):
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=llama2.files["tokenizer.model"])
    ids = processor.encode(text)
    cut = data.draw(st.integers(0, len(ids)))
    prompt = StreamDecoder(llama2)
    shown = "".join(map(prompt.feed, ids[:cut]))
    assert shown + llama2.decode(ids[cut:], after=ids[:cut]) == processor.decode(ids)


def test_a_sentencepiece_model_alone(llama2, tmp_path):
    assert llama2.control == {"<|bos|>": 1, "<|eos|>": 2, "<|pad|>": 2}
    first, later = llama2.encode("the"), llama2.encode_with_control("<s>the</s>")
    assert llama2.piece_bytes(first[0]).startswith(b" ")
    assert (later[0], later[-1]) == (1, 2)
    assert llama2.piece_bytes(later[1]).startswith(b"t")  # no space after a control token
    llama2.save(tmp_path / "t")
    assert load_tokenizer(tmp_path / "t").digest == llama2.digest
    assert llama2.encode("the<0x41>") != llama2.encode("theA")
    # 好 is three bytes that the library places at one character: none may count into the span before.
    ids, weights = llama2.rendered("the好", [(0, 3)])
    assert llama2.decode([i for i, w in zip(ids, weights, strict=True) if w]) == "the"


def test_word_starts():
    def starts(tokenizer, text):
        ids = tokenizer.encode(text)
        flags = tokenizer.word_starts()
        assert flags.shape == (tokenizer.vocab_size,)
        assert flags.dtype == np.bool_
        assert flags[list(tokenizer.names)].all()
        return [bool(flags[i]) for i in ids]

    assert starts(make("chatml"), "hello world\nthe") == [False, True, True, False]  # the line begins it
    assert starts(make("mistral"), "hello world") == [True, True]
    assert starts(make("wordpiece"), "cats sat.") == [True, False, True, True]
    assert starts(ByteTokenizer(), "a b\nc") == [False, True, False, True, False]


def test_word_starts_of_our_own_sentencepiece(sentencepiece):
    flags = sentencepiece.word_starts()
    ids = sentencepiece.encode("the cat sat")
    assert [bool(flags[i]) for i in ids] == [sentencepiece.piece_bytes(i)[:1] == b" " for i in ids]
    assert sum(flags[i] for i in ids) == 2


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer.json": b"{"}, r"tokenizer\.json is damaged"),
        ({"tokenizer.json": b"[]"}, "Expected `object`, got `array`"),
        ({"tokenizer.json": b'{"model": {}}'}, "required field `vocab` - at `[$].model`"),
        ({"tokenizer.json": b'{"model": {"type": "BPE", "vocab": {"</s>": 0}}}'}, "refuses it"),
        ({"tokenizer.model": b"IQ== 0\nIg== 1\n"}, "not a SentencePiece model"),
        ({"vocab.txt": b"a\nb\n"}, r"lacks \[UNK\]"),
        ({"vocab.txt": b"[UNK]\nb\n"}, "ends a text"),
        (tiny_hf.byte_level(tokenizer_class=None) | {"generation_config.json": b"["}, "generation_config"),
        (tiny_hf.byte_level() | {"generation_config.json": b'{"eos_token_id": 999}'}, "beyond"),
    ],
)
def test_damaged_files_are_refused_in_one_sentence(files, message):
    with pytest.raises(UserError, match=message):
        HFTokenizer(files)


def test_gaps_and_unknown_decoders_are_refused():
    files = dict(tiny_hf.byte_level())
    spec = json.loads(files["tokenizer.json"])
    spec["added_tokens"][-1]["id"] += 5
    with pytest.raises(UserError, match="does not follow the others"):
        HFTokenizer({"tokenizer.json": json.dumps(spec).encode()})
    spec = json.loads(files["tokenizer.json"]) | {"decoder": {"type": "CTC", "pad_token": "a"}}
    spec["decoder"] |= {"word_delimiter_token": "|", "cleanup": True}
    with pytest.raises(UserError, match=r"decoder \['CTC'\] is not supported"):
        HFTokenizer({"tokenizer.json": json.dumps(spec).encode()})


def test_a_folder_changed_after_saving_is_refused(tmp_path):
    make("mistral").save(tmp_path / "t")
    path = tmp_path / "t" / "hf" / "tokenizer.json"
    path.write_bytes(path.read_bytes().replace(b'"hello"', b'"hellp"'))
    with pytest.raises(UserError):
        load_tokenizer(tmp_path / "t")
    with pytest.raises(UserError, match="or a Hugging Face one"):
        load_tokenizer(tmp_path)


def test_tokenizers_from_before_the_mask_still_load(tmp_path, sentencepiece):
    old = tmp_path / "old"
    old.mkdir()
    meta = {
        "kind": "byte",
        "digest": "003440f5ed5b096231958488e4031f09b7771a6167f65e2b23e818152da7e89d",
        "vocab_size": 263,
    }
    (old / "tokenizer_config.json").write_text(json.dumps(meta))
    tokenizer = load_tokenizer(old)
    assert (tokenizer.vocab_size, list(tokenizer.control)) == (263, list(NEEDED))
    assert tokenizer.digest == ByteTokenizer().digest
    assert ByteTokenizer().control["<|mask|>"] == 263
    assert "<|mask|>" in sentencepiece.control


def test_a_sentencepiece_model_without_the_mask_loads(monkeypatch):
    monkeypatch.setattr("jaxgpt.text.train.CONTROL", NEEDED)
    texts = [f"the cat sat on {word} mats and hills" for word in "abcdefgh"]
    old = train_sentencepiece(texts, 285, threads=1)
    assert list(old.control) == list(NEEDED)
    assert old.decode(old.encode("<|mask|> the")) == "<|mask|> the"
