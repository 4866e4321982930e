"""Retrieval: planted passages are found, scores are the formula's, facts are about a question's names."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from bm25s import BM25
from hypothesis import given
from hypothesis import strategies as st

from jaxgpt.errors import UserError
from jaxgpt.text.facts import MOST_FACTS, Facts
from jaxgpt.text.retrieve import Passage, Retriever, cut, terms

TEXTS = [
    "The heron stands in the shallow river at dawn.",
    "Copper melts at 1,085 degrees; tin melts at 232.",
    "A river carries sand to the sea, and the sea carries it on.",
    "白鹭在河边站着，等鱼游过来。",
    "铜的熔点是一千零八十五度。",
    "The Danube is a river of ten countries.",
]
PASSAGES = [Passage(text, f"a.txt:{i}") for i, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def retriever() -> Retriever:
    return Retriever.build(PASSAGES)


@pytest.mark.parametrize(
    ("query", "best"),
    [
        ("Where does the HERON stand?", 0),
        ("melting: copper melts when?", 1),
        ("Which countries are on the Danube?", 5),
        ("铜在多少度熔化？熔点", 4),
        ("白鹭站在哪里", 3),
    ],
)
def test_what_was_planted_is_found(retriever: Retriever, query: str, best: int) -> None:
    assert retriever.search(query, 2)[0][:2] == PASSAGES[best][:2]


def bm25(query: str, k1: float = 1.5, b: float = 0.75) -> list[float]:
    """Lucene's form of BM25 (Robertson and Zaragoza 2009, section 3.4.2), straight from the formula."""
    bags = [Counter(terms(text)) for text in TEXTS]
    mean = sum(bag.total() for bag in bags) / len(bags)
    scores = []
    for bag in bags:
        total = 0.0
        for word in terms(query):
            df = sum(word in other for other in bags)
            idf = math.log(1 + (len(bags) - df + 0.5) / (df + 0.5))
            total += idf * bag[word] / (bag[word] + k1 * (1 - b + b * bag.total() / mean))
        scores.append(total)
    return scores


def test_scores_are_those_of_the_formula_and_of_bm25s(retriever: Retriever) -> None:
    query = "the river river of the sea 河边"
    found = {p.source: p.score for p in retriever.search(query, 10)}
    expected = {p.source: s for p, s in zip(PASSAGES, bm25(query), strict=True) if s > 0}
    assert found == pytest.approx(expected, rel=1e-5) and len(found) == 4
    library = BM25(method="lucene", k1=1.5, b=0.75)
    library.index([terms(text) for text in TEXTS], show_progress=False)
    theirs = library.get_scores([t for t in terms(query) if t in library.vocab_dict])
    np.testing.assert_allclose([found.get(p.source, 0) for p in PASSAGES], theirs, rtol=1e-5)


def test_without_a_shared_word_nothing_is_found(retriever: Retriever) -> None:
    assert retriever.search("zebra 斑马", 3) == [] == retriever.search("", 3)


class Letters:
    """Counts of letters: a vector whose cosines are known."""

    identity = "letters"

    def __call__(self, texts):
        return np.array([[text.count(c) for c in "abcdefghijklmnopqrstuvwxyz铜鹭"] for text in texts]) + 1e-3


def test_vectors_are_compared_by_their_cosine() -> None:
    encode = Letters()
    found = Retriever.build(PASSAGES, encode).search("herons", 6)
    query = encode(["herons"])[0]
    cosines = [v @ query / np.linalg.norm(v) / np.linalg.norm(query) for v in encode(TEXTS)]
    assert [p.text for p in found] == [TEXTS[i] for i in np.argsort(cosines)[::-1]]
    np.testing.assert_allclose([p.score for p in found], sorted(cosines, reverse=True), rtol=1e-5)


@pytest.mark.parametrize("encode", [None, Letters()])
def test_an_index_comes_back_whole_or_is_refused(encode, tmp_path) -> None:
    path, made = tmp_path / "i.index", Retriever.build(PASSAGES, encode)
    made.save(path, "digest")
    again = Retriever.load(path, "digest", encode)
    assert again is not None and again.search("river 铜", 4) == made.search("river 铜", 4)
    assert Retriever.load(path, "another", encode) is None
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match=r"i\.index is no index of documents .*remove it"):
        Retriever.load(path, "digest", encode)


@given(
    st.lists(st.text("ab. \n。日", max_size=60), max_size=4).map("\n\n".join),
    st.integers(1, 20),
)
def test_passages_hold_all_the_text_in_order_and_in_place(text: str, size: int) -> None:
    passages = list(cut(text, size))
    assert "".join("".join(p.split()) for _, p in passages) == "".join(text.split())
    for at, passage in passages:
        assert text[at : at + len(passage)] == passage == passage.strip() and 0 < len(passage) <= size


def test_long_paragraphs_are_cut_between_sentences() -> None:
    text = "One two. Three four.\n\nFive is v. 1.5 high. 六七八。九十。"
    assert [p for _, p in cut(text, 100)] == ["One two. Three four.", "Five is v. 1.5 high. 六七八。九十。"]
    assert [p for _, p in cut(text, 20)][1:] == ["Five is v. 1.5 high.", "六七八。九十。"]
    assert [p for _, p in cut(text, 9)][:2] == ["One two.", "Three"]


FACTS = Facts(
    [
        ("France", "capital", "Paris"),
        ("York", "country", "England"),
        ("New York", "country", "United States"),
        ("法国", "首都", "巴黎"),
    ]
)


@pytest.mark.parametrize(
    ("question", "facts"),
    [
        ("Is france nice?", ("France, capital: Paris.",)),
        ("Which country has Paris in it?", ("France, capital: Paris.",)),
        ("Where is New York?", ("New York, country: United States.",)),
        ("Where is York?", ("York, country: England.",)),
        ("Yorkshire and Francesca", ()),
        ("请问法国的首都？", ("法国，首都：巴黎。",)),
    ],
)
def test_facts_are_about_the_longest_names_that_stand_in_a_question(question, facts) -> None:
    assert FACTS.about(question) == facts


def test_there_are_not_too_many_facts() -> None:
    many = Facts([("x", "has", str(i)) for i in range(100)])
    assert many.about("What is x?") == tuple(f"x, has: {i}." for i in range(MOST_FACTS))
