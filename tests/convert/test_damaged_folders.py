"""Hugging Face folders, damaged at random: read right, or refused in one sentence."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path

import pytest
import tiny_hf
from damage import damaged, damaged_copy, right_or_refused
from families import golden, write_folder
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt.convert import files, weights
from jaxgpt.convert.registry import read_config, text_part
from jaxgpt.errors import UserError
from jaxgpt.text.load import load_tokenizer
from jaxgpt.text.tokenizer import MODEL_FILE

EXAMPLES = int(os.environ.get("JAXGPT_EXAMPLES", "0"))
"""More of them than a test has time for, to be tried by hand."""
SLOW = 3.0
"""Seconds that reading a tiny folder may take, whatever it holds."""


def few(count: int) -> settings:
    """So many examples, the same in every run, unless more are asked for."""
    return settings(max_examples=EXAMPLES or count, deadline=None, derandomize=not EXAMPLES, database=None)


@pytest.fixture(scope="module", params=["llama", "gpt2", "mixtral", "bert", "gemma3_text"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    stored = golden(request.param)
    folder = tmp_path_factory.mktemp(request.param) / "hf"
    return write_folder(folder, stored["config"], stored["tensors"], 1 + (request.param == "llama"))


@few(25)
@given(data=st.data())
def test_a_model_is_read_or_refused(model: Path, data: st.DataObject) -> None:
    """All that `jaxgpt import` does before it makes arrays."""
    with damaged_copy(model, data.draw(damaged(model))) as folder, right_or_refused():
        start = time.perf_counter()
        try:
            original = files.read_json(folder / files.CONFIG)
            config = text_part(original, str(folder))
            family, read = read_config(config, str(folder))
            found = files.headers(folder)
            read = weights.as_found(family, read, found, config)
            used, _ = weights.check(family, read, found, str(folder))
            for _ in files.each(found, used):
                pass
        finally:
            assert time.perf_counter() - start < SLOW


TOKENIZERS = {
    "byte-level": tiny_hf.TOKENIZERS["chatml"],
    "metaspace": tiny_hf.TOKENIZERS["gemma"],
    "wordpiece": tiny_hf.wordpiece(),
}


@pytest.fixture(scope="module", params=[*TOKENIZERS, "old gpt2", "sentencepiece", "saved"])
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, sentencepiece
) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "hf"
    if request.param == "saved":
        sentencepiece.save(folder)
        return folder
    folder.mkdir()
    sentencepiece.save(folder.parent / "saved")
    model = (folder.parent / "saved" / MODEL_FILE).read_bytes()
    for name, data in tokenizer_files(request.param, model).items():
        (folder / name).write_bytes(data)
    load_tokenizer(folder)
    return folder


def tokenizer_files(kind: str, model: bytes) -> dict[str, bytes]:
    if kind in TOKENIZERS:
        return TOKENIZERS[kind]
    if kind == "sentencepiece":
        return {
            "tokenizer.model": model,
            "added_tokens.json": json.dumps({"<new>": 420}).encode(),
            "tokenizer_config.json": json.dumps(
                {"eos_token": {"content": "<|eos|>"}, "added_tokens_decoder": {"420": {"content": "<new>"}}}
            ).encode(),
        }
    spec = json.loads(TOKENIZERS["byte-level"]["tokenizer.json"])["model"]
    vocab = {**spec["vocab"], "<|endoftext|>": len(spec["vocab"])}
    return {
        "vocab.json": json.dumps(vocab).encode(),
        "merges.txt": ("#version: 0.2\n" + "\n".join(map(" ".join, spec["merges"]))).encode(),
        "special_tokens_map.json": json.dumps({"eos_token": "<|endoftext|>"}).encode(),
        "config.json": json.dumps({"eos_token_id": len(spec["vocab"])}).encode(),
        "generation_config.json": json.dumps({"eos_token_id": [3], "temperature": 0.5}).encode(),
    }


@few(40)
@given(data=st.data())
def test_a_tokenizer_is_read_or_refused(tokenizer: Path, data: st.DataObject) -> None:
    with damaged_copy(tokenizer, data.draw(damaged(tokenizer))) as folder, right_or_refused():
        start = time.perf_counter()
        try:
            words = load_tokenizer(folder)
            ids = words.encode("the cat sat\n 1")
            assert all(0 <= i < words.vocab_size for i in ids)
            words.decode(ids)
            words.word_starts()
            assert words.stop_ids
        finally:
            assert time.perf_counter() - start < SLOW


def vocabulary(change) -> bytes:
    """tokenizer.json with a change of its model and its added tokens."""
    spec = json.loads(TOKENIZERS["byte-level"]["tokenizer.json"])
    change(spec["model"], spec["added_tokens"])
    return json.dumps(spec).encode()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda model, added: model["vocab"].update(x="y"), "Expected `int`"),
        (lambda model, added: model["vocab"].update(x=-1), ">= 0"),
        (lambda model, added: model["vocab"].update(x=10**12), "<= 8388607"),
        (lambda model, added: model["vocab"].update(x=0), "gives one id to '!' and 'x'"),
        (lambda model, added: model.update(vocab={}), "length >= 1"),
        (lambda model, added: model["merges"].append(["a", "b", "c"]), "length 2"),
        (lambda model, added: model["merges"].append("ab"), "matching regex"),
        (lambda model, added: model["merges"].append(3), "got `int` - at `$.model.merges[41]`"),
        (lambda model, added: added[0].update(id=10**400), "<= 8388607"),
        (lambda model, added: added[0].pop("content"), "missing required field `content`"),
        (lambda model, added: added[0].update(content="\ud800"), "surrogates not allowed"),
    ],
)  # fmt: skip
def test_a_vocabulary_that_is_none_is_refused(change, words: str, tmp_path: Path) -> None:
    whole = TOKENIZERS["byte-level"] | {"tokenizer.json": vocabulary(change)}
    for name, data in whole.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=re.escape(words)):
        load_tokenizer(tmp_path)
