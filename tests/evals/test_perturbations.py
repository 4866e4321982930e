"""Perturbations change little, always alike, and keep what belongs to a word with it."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxgpt.evals.perturb import PERTURBATIONS, SHARE, perturb, perturb_words, words_of

TEXT = "The quick brown fox jumps over the lazy dog while twenty people watch it from the old stone bridge."
CHINESE = "黑豹队的防守只丢了三百零八分，在联赛中排名第六。"


@pytest.mark.parametrize("name", PERTURBATIONS)
@pytest.mark.parametrize("text", [TEXT, CHINESE, "one", "雨"])
def test_same_text_and_seed_same_result(name, text):
    assert perturb(text, name, 3) == perturb(text, name, 3)
    assert perturb(text, name)


@given(st.text(max_size=60), st.sampled_from(list(PERTURBATIONS)))
def test_words_keep_their_places(text, name):
    words = words_of(text)
    changed = perturb_words(words, name)
    kept = [i for _, i in changed if i >= 0]
    assert len(set(kept)) == len(kept) and set(kept) <= set(range(len(words)))
    if PERTURBATIONS[name].keeps_words:
        assert kept == list(range(len(words))) and len(changed) == len(words)


@given(st.lists(st.sampled_from(["red ", "ox ", "sat ", "by "]), min_size=3, max_size=30))
def test_words_that_must_stay_do(words):
    """Entities are neither dropped nor torn apart."""
    movable = [i % 3 != 1 for i in range(len(words))]
    for name in ("dropped words", "swapped words"):
        places = [i for _, i in perturb_words(words, name, movable)]
        fixed = [i for i, may in enumerate(movable) if not may]
        assert [i for i in places if i in fixed] == fixed
        if name == "swapped words":
            assert all(places[i] == i for i in fixed)


def test_each_by_its_definition():
    words = words_of(TEXT)
    typos = [a for (a, _), b in zip(perturb_words(words, "typos"), words, strict=True) if a != b]
    assert 1 <= len(typos) <= round(SHARE * len(words))
    assert perturb(TEXT, "lower case") == TEXT.lower() and perturb(TEXT, "upper case") == TEXT.upper()
    dropped = perturb_words(words, "dropped words")
    assert len(words) - len(dropped) == round(SHARE * len(words))
    swapped = perturb(TEXT, "swapped words").split()
    assert sorted(swapped) == sorted(TEXT.split()) and swapped != TEXT.split()
    assert perturb(TEXT, "distractor").endswith(" " + TEXT)
    assert perturb(CHINESE, "distractor").endswith(CHINESE) and not re.search(
        r"\s", perturb(CHINESE, "distractor")
    )
    assert len(perturb(CHINESE, "dropped words")) < len(CHINESE)
