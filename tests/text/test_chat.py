"""Where the prefix of a dialogue ends: before its first trained token, as in training."""

from __future__ import annotations

import pytest
import tiny_hf

from jaxgpt.text.chat import prefix_length, prompt_ids, render
from jaxgpt.text.hf_tokenizer import HFTokenizer
from jaxgpt.text.tokenizer import ByteTokenizer, Tokenizer


def tokenizer(name: str) -> Tokenizer:
    return ByteTokenizer() if name == "bytes" else HFTokenizer(tiny_hf.TOKENIZERS[name], name)


@pytest.mark.parametrize("name", ["bytes", *tiny_hf.TOKENIZERS])
def test_a_prefix_ends_before_the_first_trained_token(name: str) -> None:
    written = tokenizer(name)
    turns = [{"role": ("user", "assistant")[i % 2], "content": f"turn {i}"} for i in range(4)]
    for asked in (turns[:1], turns[:3]):
        prompt, whole = prompt_ids(asked, written), render(turns[: len(asked) + 1], written)
        length = prefix_length(asked, written)
        assert length == min(whole.weights.index(1.0), len(prompt))
        assert whole.tokens[:length] == prompt[:length]
    assert prefix_length(turns[:1], written) == len(prompt_ids(turns[:1], written))
