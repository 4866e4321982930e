"""Rules that completions keep: nothing outside of them is written, and nothing inside is made less likely."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest
import tiny_hf
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import RECITED, full_logits

from jaxgpt.config import Beam, BestOf, Sampling
from jaxgpt.errors import UserError
from jaxgpt.sample.constrained import Guide, Rule, choices, grammar, json_schema, regex
from jaxgpt.sample.generate import Generator
from jaxgpt.text.hf_tokenizer import HFTokenizer
from jaxgpt.text.tokenizer import ByteTokenizer
from jaxgpt.text.train import train_sentencepiece

GREEDY, WILD = Sampling(temperature=0), Sampling(temperature=3.0)
PROMPT = [5, 250, 7]
ANSWERS = ["yes", "yes please", "no", "non/sense", "是的", "a\nb", " the cat"]

PIECES = st.sampled_from(
    ["a", "b?", "[xyz]", "[0-9]{1,3}", "é", "日", r"\.", " ", "(?:no|yes)", "[^q]", "[a-z_]"]
)
REGEXES = st.lists(st.lists(PIECES, min_size=1, max_size=4).map("".join), min_size=1, max_size=2).map(
    "|".join
)


@settings(max_examples=6, deadline=None)
@given(patterns=st.lists(REGEXES, min_size=4, max_size=4), seed=st.integers(0, 1000))
def test_no_completion_leaves_its_regular_expression(modern: Any, patterns: list[str], seed: int) -> None:
    generator = modern[2]
    made = generator.generate(
        [PROMPT] * 4, WILD, rules=list(map(regex, patterns)), max_new_tokens=60, seeds=range(seed, seed + 4)
    )
    for pattern, completion in zip(patterns, made, strict=True):
        assert completion.finish_reason == "stop"
        assert re.fullmatch(pattern, completion.text), (pattern, completion.text)


def test_a_grammar_may_nest(modern: Any) -> None:
    """Balanced brackets, which no regular expression matches."""
    rules = grammar('start: "(" inner ")"\ninner: start? /[ab]{1,2}/')
    for completion in modern[2].generate([PROMPT] * 4, WILD, rules=rules, max_new_tokens=90):
        text = completion.text
        while (inner := re.fullmatch(r"\((.*?)[ab]{1,2}\)", text)) is not None:
            text = inner[1]
        assert text == "" or completion.finish_reason == "length"


def test_json_keeps_its_schema(modern: Any) -> None:
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 3},
            "kind": {"enum": ["red", "green"]},
            "count": {"type": "integer", "minimum": 0, "maximum": 99},
        },
        "required": ["name", "kind", "count"],
        "additionalProperties": False,
    }
    made = modern[2].generate([PROMPT] * 4, WILD, rules=json_schema(schema), max_new_tokens=90)
    for completion in made:
        value = json.loads(completion.text)
        assert value.keys() == {"name", "kind", "count"}
        assert len(value["name"]) <= 3 and value["kind"] in ("red", "green") and 0 <= value["count"] <= 99
        assert completion.text.startswith('{"name": ')  # spaced as Python writes it


def test_where_all_is_allowed_nothing_changes(reciter: Generator, modern: Any) -> None:
    (free,), (ruled,) = (
        reciter.generate([[ord("x")]], GREEDY, rules=rules) for rules in (None, regex("(?s:.)*"))
    )
    assert free == ruled and free.text == RECITED
    prompts, generator = [PROMPT, [9] * 20, PROMPT], modern[2]
    alone = generator.generate(prompts, WILD, max_new_tokens=12)
    beside = generator.generate(prompts, WILD, max_new_tokens=12, rules=[None, choices(["yes"]), None])
    assert [beside[i].ids for i in (0, 2)] == [alone[i].ids for i in (0, 2)]
    assert beside[1].text == "yes"


def test_greedy_choices_are_the_likeliest_bytes_that_still_lead_to_an_answer(modern: Any) -> None:
    model, params, generator = modern
    (made,) = generator.generate([PROMPT], GREEDY, rules=choices(ANSWERS), max_new_tokens=20)
    logits_TV = full_logits(model, params, PROMPT + made.ids)[len(PROMPT) - 1 : -1]
    written = [answer.encode() for answer in ANSWERS]
    for i, (token, logits_V) in enumerate(zip(made.ids, logits_TV, strict=True)):
        so_far = bytes(made.ids[:i])
        may = {a[i] for a in written if a.startswith(so_far) and len(a) > i}
        may |= set(generator.stop) if so_far in written else set()
        assert token == max(sorted(may), key=logits_V.__getitem__)
    assert made.text in ANSWERS and made.ids[-1] in generator.stop
    # The log-probabilities are the model's own, not those among what is allowed.
    own_T = logits_TV[range(len(made.ids)), made.ids] - np.logaddexp.reduce(logits_TV, axis=-1)
    np.testing.assert_allclose(made.logprobs, own_T, atol=1e-4)


@pytest.fixture(scope="module")
def tokenizers() -> list[Any]:
    return [
        ByteTokenizer(),
        train_sentencepiece(["the cat sat. yes please, no", "是的 the world\n"] * 20, 300),
        HFTokenizer(tiny_hf.byte_level()),
        HFTokenizer(tiny_hf.metaspace()),
    ]


def test_tokens_of_every_tokenizer_spell_answers_byte_for_byte(tokenizers: list[Any]) -> None:
    rule, random = choices(ANSWERS), np.random.default_rng(0)
    for tokenizer in tokenizers:
        stops, leads = tokenizer.stop_ids, tokenizer.strips_space
        # As training would write it; metaspace has no way to write a text that begins with a space.
        for answer in (a for a in ANSWERS if tokenizer.decode(tokenizer.encode(a)) == a):
            guide = Guide(rule, tokenizer, stops, tokenizer.vocab_size, leads)
            for token in [*tokenizer.encode(answer), stops[0]]:
                assert guide.allowed()[token], (tokenizer.kind, answer, tokenizer.piece_bytes(token))
                guide.feed(token)
        seen = set()
        for _ in range(40):  # and in any other way
            guide, ids = Guide(rule, tokenizer, stops, tokenizer.vocab_size + 3, leads), list[int]()
            while not ids or ids[-1] not in stops:
                ids.append(int(random.choice(np.flatnonzero(guide.allowed()))))
                guide.feed(ids[-1])
            seen.add(tokenizer.decode(ids[:-1]))
        assert seen <= set(ANSWERS) and len(seen) > 3


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: regex("(a"), r"regex '\(a' cannot be followed \(unclosed group\)"),
        (lambda: regex("(?=a)b"), "look-around"),
        (lambda: regex(""), "regex is empty"),
        (lambda: grammar("begin: x"), "grammar cannot be followed"),
        (lambda: grammar(" "), "grammar is empty"),
        (lambda: choices(["a", ""]), "none of them empty"),
        (lambda: json_schema({"type": "foo"}), "json_schema cannot be followed .*Invalid type: foo"),
    ],
)
def test_what_is_no_rule_is_refused_in_one_sentence(make: Any, why: str) -> None:
    with pytest.raises(UserError, match=why):
        make()


def test_samples_to_choose_among_keep_the_rule_and_searches_say_that_they_do_not(modern: Any) -> None:
    (made,) = modern[2].generate([PROMPT], BestOf(n=3), rules=choices(["yes", "no"]), max_new_tokens=9)
    assert {one.text for one in made.candidates} <= {"yes", "no"} and len(made.candidates) == 3
    with pytest.raises(UserError, match="Beam follows no rules; use Sampling, BestOf or MBR"):
        modern[2].generate([PROMPT], Beam(), rules=choices(["yes"]))


def test_a_rule_needs_an_end_and_one_per_prompt(modern: Any) -> None:
    with pytest.raises(UserError, match="needs a token that ends the text"):
        modern[2].generate([PROMPT], rules=choices(["a"]), stop=())
    with pytest.raises(UserError, match="rules has 1 entries for 2 prompts"):
        modern[2].generate([PROMPT] * 2, rules=[choices(["a"])])
    assert isinstance(choices(["a"]), Rule)
