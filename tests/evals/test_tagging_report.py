"""The report's numbers and its layout are those of seqeval and scikit-learn, ill-formed tags included."""

from __future__ import annotations

import builtins
import json
import re
import warnings

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from seqeval.metrics import classification_report as seqeval_report
from seqeval.metrics import f1_score
from seqeval.scheme import IOB2
from sklearn.metrics import classification_report as sklearn_own
from sklearn.metrics import confusion_matrix

from jaxgpt.config import UserError
from jaxgpt.evals.tagging_report import classification_report, confusion, layout, tagging_report
from jaxgpt.report import Html
from jaxgpt.report_confusion import _short, confusion_picture

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
        (lambda: confusion_picture(("a",), np.zeros((2, 2), int)), r"the shape \(2, 2\) for 1 labels"),
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


# -------------------------------------------------------------------------------------- the picture


@pytest.mark.parametrize("size", [1, 2, 9, 40])
def test_the_picture_has_every_cell_and_every_label(size):
    labels = [f"<label&{i}>" for i in range(size)]
    counts = np.arange(size * size).reshape(size, size)
    counts[-1] = 0  # a label without gold examples divides nothing by zero
    picture = confusion_picture(labels, counts)
    assert isinstance(picture, Html) and "<label" not in picture
    assert picture.count("<rect") == size * size
    for i in range(size):
        assert picture.count(f">&lt;label&amp;{i}&gt;</text>") == 2
    tips = re.findall(r"gold &lt;label&amp;(\d+)&gt;, predicted &lt;label&amp;(\d+)&gt;: ([\d,]+) ", picture)
    found = {(int(a), int(b)): int(n.replace(",", "")) for a, b, n in tips}
    assert found == {(i, j): counts[i, j] for i, j in np.ndindex(size, size)}
    opacity = [float(v) for v in re.findall(r"fill-opacity:([\d.]+)", picture)]
    rows = np.array(opacity).reshape(size, size).sum(axis=1)
    assert np.allclose(rows, counts.any(axis=1), atol=0.03)  # colours of a row are shares of it


@given(st.integers(0, 999_499_999))
@example(999)
@example(9_950)
@example(999_499)
@example(999_500)
@example(9_999_999)
def test_short_counts_are_four_characters_and_near(count):
    shown = _short(count)
    value = float(shown.rstrip("kM")) * {"k": 1e3, "M": 1e6}.get(shown[-1], 1)
    assert len(shown) <= 4 and abs(value - count) <= 0.051 * count
