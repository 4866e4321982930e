"""Facts of a model that stand in its files: what ends a text, what begins one, how to sample."""

from __future__ import annotations

import json
import logging

import pytest
import tiny_hf

from jaxgpt.text.hf_tokenizer import HFTokenizer

LLAMA3 = {"bos_token": "<|begin|>", "eos_token": "<|end_of_text|>"}  # ids 297 and 298
SEQUENCE = {"Sequence": {"id": "A", "type_id": 0}}


def files(post_processor=None, more: dict | None = None, **config) -> dict[str, bytes]:
    """Llama 3's form, whose template ends a turn with <|eot|>, id 301."""
    made = dict(tiny_hf.byte_level(tiny_hf.LLAMA3_SPECIAL, tiny_hf.LLAMA3, **LLAMA3 | config))
    if post_processor is not None:
        spec = json.loads(made["tokenizer.json"]) | {"post_processor": post_processor}
        made["tokenizer.json"] = json.dumps(spec).encode()
    return made | {f"{name}.json": json.dumps(value).encode() for name, value in (more or {}).items()}


@pytest.mark.parametrize(
    ("more", "ends"),
    [
        ({}, (298, 301)),
        ({"generation_config": {"eos_token_id": [297, 299]}}, (297, 298, 299, 301)),
        ({"config": {"eos_token_id": 300}}, (298, 300, 301)),
        ({"config": {"text_config": {"eos_token_id": [300, 299]}}}, (298, 299, 300, 301)),
        ({"generation_config": {"eos_token_id": 299}, "config": {"eos_token_id": 300}}, (298, 299, 300, 301)),
        ({"config": {"eos_token_id": [True, "300", -1, 1.5, {}, 10**9, 50256]}}, (298, 301)),
    ],
)  # fmt: skip
def test_a_text_ends_where_any_file_or_the_template_says(more, ends):
    assert HFTokenizer(files(more=more)).stop_ids == ends


def test_an_end_that_is_no_id_is_said(caplog):
    caplog.set_level(logging.INFO, "jaxgpt")
    HFTokenizer(files(more={"config": {"eos_token_id": ["x", 50256]}}))
    assert "config.json: eos_token_id 'x' is no id of a token; left out" in caplog.text
    assert "config.json: eos_token_id 50256 is no id of this tokenizer; left out" in caplog.text


def test_a_word_that_config_json_names_as_an_end_stays_a_word():
    plain = HFTokenizer(files())
    word = plain.encode("the cat")[1]
    wrong = HFTokenizer(files(more={"config": {"eos_token_id": word}}))
    assert wrong.encode("the cat") == plain.encode("the cat")
    assert wrong.digest == plain.digest
    assert word in wrong.stop_ids
    end = HFTokenizer(files(more={"config": {"eos_token_id": 303}}))  # </think>, added but ordinary
    assert end.encode("</think>") != [303], "what ends a text is no text"


def template(*names: str) -> dict:
    return {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": n}} for n in names] + [SEQUENCE]}


@pytest.mark.parametrize(
    ("processor", "config", "adds"),
    [
        (None, {}, False),
        (template("<|begin|>"), {}, True),
        (template(), {}, False),
        ({"type": "Sequence", "processors": [{"type": "ByteLevel"}, template("<|begin|>")]}, {}, True),
        (template("<|begin|>"), {"add_bos_token": False}, False),
        (None, {"add_bos_token": True}, True),
        (None, {"add_bos_token": True, "bos_token": None}, False),
        (None, {"tokenizer_class": "LlamaTokenizerFast"}, True),
        (None, {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False}, False),
        (None, {"tokenizer_class": "GPT2Tokenizer"}, False),
    ],
)
def test_a_text_begins_as_transformers_begins_it(processor, config, adds):
    assert HFTokenizer(files(processor, **config)).adds_bos == adds


def test_older_layouts_begin_a_text_as_their_classes_do():
    assert HFTokenizer(tiny_hf.wordpiece()).adds_bos  # [CLS]
    spec = json.loads(tiny_hf.byte_level()["tokenizer.json"])
    vocab = spec["model"]["vocab"] | {"<|endoftext|>": 297}
    merges = "\n".join(map(" ".join, spec["model"]["merges"])).encode()
    assert not HFTokenizer({"vocab.json": json.dumps(vocab).encode(), "merges.txt": merges}).adds_bos  # GPT-2


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({}, {}),
        ({"eos_token_id": 298, "max_length": 20}, {}),
        ({"temperature": 0.6, "top_p": 0.9, "do_sample": True}, {"temperature": 0.6, "top_p": 0.9}),
        ({"do_sample": True, "top_k": 50}, {"temperature": 1.0, "top_k": 50}),
        ({"do_sample": False, "temperature": 0.6, "top_p": 0.9}, {"temperature": 0.0, "top_p": 0.9}),
        ({"repetition_penalty": 1.1, "min_p": None}, {"repetition_penalty": 1.1}),
    ],
)
def test_settings_of_sampling(config, found):
    assert HFTokenizer(files(more={"generation_config": config})).sampling == found


def test_settings_that_are_no_numbers_are_said(caplog):
    config = {"temperature": "hot", "top_k": 2.5, "top_p": [1], "min_p": True, "repetition_penalty": 1.5}
    assert HFTokenizer(files(more={"generation_config": config})).sampling == {"repetition_penalty": 1.5}
    for words in ("temperature is 'hot'", "top_k is 2.5", "top_p is [1]", "min_p is True"):
        assert f"generation_config.json: {words}" in caplog.text
