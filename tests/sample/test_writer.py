"""Text as it is made: stop strings over borders of tokens, and prompts that end anywhere."""

from __future__ import annotations

from functools import cache

import pytest
import tiny_hf
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import RECITED

from jaxgpt.errors import UserError
from jaxgpt.sample.generate import Generator
from jaxgpt.sample.settings import Sampling
from jaxgpt.sample.writer import Writer
from jaxgpt.text.hf_tokenizer import HFTokenizer
from jaxgpt.text.tokenizer import ByteTokenizer, Tokenizer

GREEDY = Sampling(temperature=0)
X = [ord("x")]
quick = settings(max_examples=150, deadline=None)


@cache
def tokenizer(name: str) -> Tokenizer:
    return ByteTokenizer() if name == "byte" else HFTokenizer(tiny_hf.TOKENIZERS[name])


def by_hand(text: str, stops: list[str]) -> str:
    """The text up to the first stop string, read character by character."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return text


@pytest.mark.parametrize("name", ["byte", "chatml", "mistral"])
@quick
@given(
    prompt=st.text("ab é", max_size=4),
    text=st.text("ab é", max_size=12),
    stops=st.lists(st.text("ab é", min_size=1, max_size=4), max_size=3),
)
def test_a_stop_string_ends_the_text_wherever_tokens_meet(name, prompt, text, stops):
    before, ids = tokenizer(name).encode(prompt), tokenizer(name).encode(text)
    writer, shown = Writer(tokenizer(name), before, stops), ""
    whole = tokenizer(name).decode(ids, after=before)
    for token in ids:
        shown += writer.feed(token)
        assert by_hand(whole, stops).startswith(shown), "text was shown that a stop string takes back"
    assert shown + writer.flush() == by_hand(whole, stops)
    assert writer.stopped == (by_hand(whole, stops) != whole or any(whole.endswith(s) for s in stops))


def test_text_is_held_back_no_longer_than_it_may_be_a_stop_string():
    writer = Writer(ByteTokenizer(), (), ["END", "x"])
    assert [writer.feed(ord(c)) for c in "aENENDb"] == ["a", "", "", "EN", "", "", ""]
    assert writer.stopped and writer.flush() == ""


def test_an_empty_stop_string_is_refused():
    with pytest.raises(UserError, match="a stop string is empty"):
        Writer(ByteTokenizer(), (), ["a", ""])


@pytest.mark.parametrize(
    ("stops", "text", "ids"),
    [(("日",), "é", 5), (("é日", "日"), "", 5), (("🎉",), "é日", 9), (("never",), RECITED, 10)],
)
def test_generation_ends_at_a_stop_string(reciter: Generator, stops: tuple, text: str, ids: int) -> None:
    """The reciter makes é (2 bytes), 日 (3), 🎉 (4) and an end."""
    made = reciter.generate([X, X], GREEDY, max_new_tokens=20, stop_strings=stops)
    for completion in made:
        assert (completion.text, completion.finish_reason, len(completion.ids)) == (text, "stop", ids)
        assert len(completion.logprobs) == ids
    tokens = list(reciter.stream([X], GREEDY, max_new_tokens=20, stop_strings=stops, chunk=1))
    assert "".join(t.text for t in tokens) == text
    assert [t.finish_reason for t in tokens] == [None] * (ids - 1) + ["stop"]


def test_stop_strings_of_each_row(reciter: Generator) -> None:
    made = reciter.generate([X] * 3, GREEDY, max_new_tokens=3, stop_strings=[["é"], [], ["z", "日"]])
    assert [(c.text, c.finish_reason) for c in made] == [
        ("", "stop"),
        ("é\ufffd", "length"),
        ("é\ufffd", "length"),
    ]
    with pytest.raises(UserError, match="stop_strings has 1 entries for 2 prompts"):
        reciter.generate([X, X], stop_strings=[["a"]])
    with pytest.raises(UserError, match="a stop string is empty"):
        reciter.generate([X], stop_strings=[""])


def test_a_prompt_that_ends_within_a_character_is_gone_on_with(reciter: Generator) -> None:
    first = [*"é".encode()][:1]  # the next byte follows it by heart
    made = reciter.generate([[*X, *first]], GREEDY, max_new_tokens=20)[0]
    assert made.text == RECITED
    assert reciter.generate([[*X, *first]], GREEDY, max_new_tokens=20, apart=True)[0].text != RECITED
