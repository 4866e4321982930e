"""Exported tokenizers: the library's ids are ours, dialogues too; what differs is not exported."""

from __future__ import annotations

import json
from pathlib import Path

import jinja2
import pytest
import tokenizers as library

from jaxgpt.convert import tokenizers
from jaxgpt.text.chat import render
from jaxgpt.text.tokenizer import ByteTokenizer, Tokenizer
from jaxgpt.text.train import train_sentencepiece

TEXTS = [f"{text} {i} <|>+-*/=" for i in range(40) for text in (*tokenizers.SAMPLE, "the cat sat on the mat")]
DIALOGUE = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "  What is 2 + 2?\n"},
    {"role": "assistant", "content": "4"},
]


def make(kind: str) -> Tokenizer:
    return ByteTokenizer() if kind == "byte" else train_sentencepiece(TEXTS, 380, kind, threads=1)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["byte", "bpe", "unigram"])
def test_the_librarys_ids_are_ours(kind: str, tmp_path: Path) -> None:
    words = make(kind)
    words.save(tmp_path / "ours")
    tokenizers.write(tmp_path, words, tmp_path / "ours", dialogues=True)
    built = library.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in [*TEXTS, "never seen: Ω≈ç√∫˜µ\n\n\n   x", "the mat sat"]:
        assert built.encode(text, add_special_tokens=False).ids == words.encode(text)
        assert built.decode(words.encode(text)) == text
    assert built.encode("a").ids == [words.control["<|bos|>"], *words.encode("a")]
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    template = jinja2.Environment().from_string(config["chat_template"])
    text = template.render(messages=DIALOGUE)
    assert built.encode(text, add_special_tokens=False).ids == render(DIALOGUE, words).tokens
    asked = template.render(messages=DIALOGUE[:2], add_generation_prompt=True)
    assert text.startswith(asked)


def test_one_that_would_differ_is_not_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    words = make("byte")
    words.save(tmp_path / "ours")
    monkeypatch.setattr(words, "encode", lambda text: [0])
    tokenizers.write(tmp_path, words, tmp_path / "ours", dialogues=False)
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]
    assert "not exported" in caplog.text
