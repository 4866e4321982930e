"""The report's numbers and its layout are those of seqeval and scikit-learn, ill-formed tags included."""

from __future__ import annotations

import builtins
import json
import re
import warnings

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from seqeval.metrics import classification_report as seqeval_report
from seqeval.metrics import f1_score
from seqeval.scheme import IOB2
from sklearn.metrics import classification_report as sklearn_own
from sklearn.metrics import confusion_matrix

from jaxgpt.errors import UserError
from jaxgpt.evals.tagging_report import by_class, classification_report, confusion, layout, tagging_report

quick = settings(max_examples=60, deadline=None)
tag = st.sampled_from(["O", "O", "B-PER", "I-PER", "B-LOC", "I-LOC", "B-A-B", "I-A-B"])
pairs = st.lists(st.lists(st.tuples(tag, tag), min_size=1, max_size=8), min_size=1, max_size=5)


def sklearn_report(*both, **settings):
    """Its report; where nothing was right, its table has supports such as `1.0`, which are counts."""
    made = sklearn_own(*both, **settings)
    counts = re.compile(r"(\d+)\.0$", re.MULTILINE)
    return counts.sub(r"  \1", made) if isinstance(made, str) else made


@pytest.fixture(autouse=True)
def quiet():
    """Neither library warns of what it cannot divide."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@quick
@given(pairs)
@example([[("B-PER", "I-PER")], [("O", "I-LOC"), ("I-LOC", "I-LOC")]])
@example([[("O", "O")]])
@example([[("O", "I-PER")]])  # the default mode has an entity, the strict mode none
def test_every_number_is_theirs(sentences):
    gold, predicted = ([[pair[i] for pair in s] for s in sentences] for i in (0, 1))
    report = tagging_report(gold, predicted)
    flat = [t for tags in gold for t in tags], [t for tags in predicted for t in tags]
    assert report.tokens == sklearn_report(*flat, output_dict=True, zero_division=0)
    assert layout(report.tokens) == sklearn_report(*flat, digits=4, zero_division=0)
    for scores, mode in ((report.default, {}), (report.strict, {"mode": "strict", "scheme": IOB2})):
        if len(scores) == 3:  # averages alone: seqeval itself stops where there is no entity
            assert {n for row in scores.values() for n in row.values()} == {0}
            with pytest.raises((ValueError, RuntimeWarning)):
                seqeval_report(gold, predicted, zero_division=0, **mode)
            continue
        assert scores == seqeval_report(gold, predicted, output_dict=True, zero_division=0, **mode)
        assert layout(scores) == seqeval_report(gold, predicted, digits=4, zero_division=0, **mode)
        assert scores["micro avg"]["f1-score"] == f1_score(gold, predicted, zero_division=0, **mode)
    for scores in (report.default, report.strict, report.tokens):
        assert json.loads(json.dumps(scores)) == scores and layout(scores) in report.text


@quick
@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from("abcd")), min_size=1, max_size=20))
def test_labels_are_counted_by_scikit_learn(both):
    gold, predicted = zip(*both, strict=True)
    report = classification_report(gold, predicted)
    assert report.scores == sklearn_report(gold, predicted, output_dict=True, zero_division=0)
    assert report.text == sklearn_report(gold, predicted, digits=4, zero_division=0)
    assert report.scores["accuracy"] == sum(a == b for a, b in both) / len(both)
    counts = confusion(gold, predicted, "dcba")
    assert (counts == confusion_matrix(gold, predicted, labels=list("dcba"))).all()


def test_a_hundred_labels_are_no_regression():
    labels = [f"intent {i}" for i in range(100)]
    assert classification_report(labels, labels).scores["accuracy"] == 1


def test_a_label_named_like_an_average_does_not_part_the_table():
    both = ["loss avg", "a"], ["loss avg", "a"]
    assert classification_report(*both).text == sklearn_report(*both, digits=4)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: tagging_report([["O"]], []), "1 gold sentences and 0 predicted"),
        (lambda: tagging_report([["O"], ["O"]], [["O"], []]), "sentence 2 has 1 gold tags and 0 predicted"),
        (lambda: tagging_report([[]], [[]]), "there is no tag to compare"),
        (lambda: tagging_report([["S-X"]], [["O"]]), "tag 'S-X' is not BIO"),
        (lambda: tagging_report([["O"]], [["B-"]]), "tag 'B-' is not BIO"),
        (lambda: classification_report(["a"], []), "1 gold labels and 0 predicted"),
        (lambda: classification_report([], []), "there is no label to compare"),
        (lambda: confusion(["a"], ["b"], ("a",)), "label 'b' is not one of those to count; allowed: a"),
        (lambda: confusion(["a"], [], ("a",)), "1 gold labels and 0 predicted"),
    ],
)
def test_mistakes_are_named(call, words):
    with pytest.raises(UserError, match=words):
        call()


@pytest.mark.parametrize(("library", "call"), [
    ("seqeval", lambda: tagging_report([["O"]], [["O"]])),
    ("sklearn", lambda: classification_report(["a"], ["a"])),
])  # fmt: skip
def test_what_to_install_is_said(monkeypatch, library, call):
    real = builtins.__import__

    def without(name, *rest):
        if name.startswith(library):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=re.escape("run `pip install 'jaxgpt[eval]'`")):
        call()


def test_each_type_has_its_row() -> None:
    """One of two people found, and a place where there is none."""
    gold, predicted = [["B-PER", "O", "B-PER", "O"]], [["B-PER", "O", "O", "B-LOC"]]
    rows = {row["label"]: row for row in by_class(tagging_report(gold, predicted).strict)}
    found = [rows["PER"][name] for name in ("precision", "recall", "f1", "support")]
    assert found == pytest.approx([1.0, 0.5, 2 / 3, 2])
    assert rows["LOC"]["precision"] == 0 and rows["LOC"]["support"] == 0
    labels = by_class(classification_report(["a", "b", "a"], ["a", "a", "a"]).scores)
    assert [(row["label"], row["recall"], row["support"]) for row in labels] == [("a", 1.0, 2), ("b", 0.0, 1)]
