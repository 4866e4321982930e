"""A small trained tokenizer and a small prepared corpus, made once for the tests of this folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jaxgpt.data.prepare import prepare
from jaxgpt.data.tokenizer import ByteTokenizer, SentencePiece
from jaxgpt.data.train_tokenizer import train_sentencepiece

SENTENCE = "the cat sat on a mat while seven dogs ran over green hills and far away"
WORDS = SENTENCE.split(" ")


def story(number: int, words: int) -> str:
    """Some words that differ from number to number."""
    return " ".join(WORDS[(number * 7 + i * i) % len(WORDS)] for i in range(words)) + f" {number}."


@pytest.fixture(scope="session")
def sentencepiece() -> SentencePiece:
    texts = [story(i, 40) for i in range(200)] + [
        "你好，世界。今天天气很好。",
        "naïve café — 😀\t!\r\n",
    ] * 20
    return train_sentencepiece(texts, 420, threads=1)


@pytest.fixture(params=["byte", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest, sentencepiece: SentencePiece):
    return ByteTokenizer() if request.param == "byte" else sentencepiece


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder prepared from 80 documents of very different lengths (some longer than a record)."""
    folder = tmp_path_factory.mktemp("corpus")
    sizes = [1 + (i * i * 13) % 60 for i in range(78)] + [1200, 2100]
    lines = [json.dumps({"text": story(i, n)}) for i, n in enumerate(sizes)]
    (folder / "a.jsonl").write_text("\n".join(lines) + "\n")
    prepare([str(folder / "a.jsonl")], folder / "out", validation=0.2, workers=1)
    return folder / "out"
