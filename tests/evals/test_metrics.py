"""Metrics equal the libraries that define them; intervals and paired tests equal scipy's."""

from dataclasses import dataclass, field

import numpy as np
import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer
from scipy import stats
from sklearn.metrics import f1_score, ndcg_score, roc_auc_score

from jaxgpt.errors import UserError
from jaxgpt.evals.metrics import METRICS, Prediction, compare, interval, metric_of
from jaxgpt.evals.metrics.answers import normalized, number_of, token_f1


@dataclass(frozen=True)
class Given:
    answers: tuple = ()
    choices: tuple = ()
    facts: dict = field(default_factory=dict)


def made(answer, *answers, language="en", **parts):
    facts = {name: parts.pop(name) for name in ("click", "group") if name in parts}
    sample = Given(answers, parts.pop("options", ()), facts)
    return Prediction(sample, "", answer, answer, language, **parts)


def value(name, predictions):
    metric = metric_of(name)
    return metric.of(metric.statistics(predictions))


SYSTEM = ["the cat sat on the mat", "there is a dog in the old garden", "birds fly high", "he said yes"]
FIRST = ["the cat is on the mat", "a dog is in the old garden", "birds fly high", "he says yes"]
SECOND = ["a cat sat on the mat today", None, "the birds fly very high", None]
CHINESE = ["猫坐在垫子上。", "花园里有一只狗。"], ["猫在垫子上坐着。", "有一只狗在花园里。"]
ENGLISH = [
    made(a, *(r for r in refs if r is not None)) for a, *refs in zip(SYSTEM, FIRST, SECOND, strict=True)
]


def test_bleu_and_chrf_are_sacrebleus():
    assert value("bleu", ENGLISH) == pytest.approx(sacrebleu.corpus_bleu(SYSTEM, [FIRST, SECOND]).score)
    assert value("chrf", ENGLISH) == pytest.approx(sacrebleu.corpus_chrf(SYSTEM, [FIRST, SECOND]).score)
    chinese = [made(a, b, language="zh") for a, b in zip(*CHINESE, strict=True)]
    expected = sacrebleu.corpus_bleu(CHINESE[0], [CHINESE[1]], tokenize="zh").score
    assert value("bleu", chinese) == pytest.approx(expected) and expected > 1
    assert "tok:zh" in METRICS["bleu"].signature("zh") and "tok:13a" in METRICS["bleu"].signature("en")


@pytest.mark.parametrize("name", ["rouge1", "rouge2", "rougeL"])
def test_rouge_is_rouge_scores(name):
    scorer = RougeScorer([name], use_stemmer=True)
    best = [max(scorer.score(ref, p.answer)[name].fmeasure for ref in p.sample.answers) for p in ENGLISH]
    assert value(name, ENGLISH) == pytest.approx(100 * np.mean(best))
    assert value(name, [made("猫坐着", "猫坐着", language="zh")]) == 100


def test_answers_of_squad():
    """Cases of SQuAD's own evaluation, and CMRC's, by hand."""
    assert normalized("The  Cat, an old-one!") == "cat oldone"
    assert normalized("《红楼梦》 的 作者", "zh") == "红楼梦的作者"
    assert token_f1("the big red dog", "a red dog") == pytest.approx(2 * 2 / (3 + 2))
    assert token_f1("曹雪芹", "作者曹雪芹", "zh") == pytest.approx(2 * 3 / (3 + 5))
    assert token_f1("", "") == 1 and token_f1("x", "") == 0
    answers = [made("Denver Broncos", "the Denver Broncos", "Denver"), made("x", ""), made("", "")]
    assert value("exact_match", answers) == pytest.approx(200 / 3)
    assert value("f1", answers) == pytest.approx(200 / 3)


def test_labels_are_sklearns():
    rng, labels = np.random.default_rng(0), ["good", "bad", "so so"]
    gold, said = (rng.choice(labels, 60).tolist() for _ in range(2))
    predictions = [made(a, b, options=tuple(labels)) for a, b in zip(said, gold, strict=True)]
    assert value("macro_f1", predictions) == pytest.approx(100 * f1_score(gold, said, average="macro"))
    said[0] = "no label"
    predictions = [made(a, b, options=tuple(labels)) for a, b in zip(said, gold, strict=True)]
    expected = f1_score(gold, said, labels=labels, average="macro", zero_division=0)
    assert value("macro_f1", predictions) == pytest.approx(100 * expected)
    assert value("accuracy", predictions) == pytest.approx(
        100 * np.mean([a == b for a, b in zip(said, gold, strict=True)])
    )


def test_entities_and_numbers_by_hand():
    """Two of three right, one made up, one missing: precision 2/3, recall 2/3."""
    entity = made("PER: Ada\nLOC: London\nLOC: Paris", "PER: Ada\nLOC: London\nORG: Royal Society")
    assert value("entity_f1", [entity]) == pytest.approx(200 / 3)
    assert number_of("so 3 + 4 is 1,007.50 dollars.") == number_of("1007.5")
    assert [number_of(text) for text in ("10-12", "1,2", "GPT-4", "\u22125", "-1,000", "x")] == [
        12,
        2,
        4,
        -5,
        -1000,
        None,
    ]
    assert value("number_match", [made("it is 12", "12"), made("none", "12"), made("13", "12.0")]) == (
        pytest.approx(100 / 3)
    )


def test_ranking_is_sklearns():
    rng = np.random.default_rng(1)
    logits, clicks = rng.normal(size=(5, 8)), rng.integers(0, 2, (5, 8))
    predictions = [
        made("", options=("yes", "no"), choices=(float(x), 0.0), click=int(c), group=user)
        for user in range(5)
        for x, c in zip(logits[user], clicks[user], strict=True)
    ]
    auc = roc_auc_score(clicks.ravel(), logits.ravel())
    assert value("auc", predictions) == pytest.approx(100 * auc)
    for k in (3, 10):
        expected = ndcg_score(clicks, logits, k=k)
        assert value(f"ndcg@{k}", predictions) == pytest.approx(100 * expected)
    best = np.take_along_axis(clicks, logits.argmax(1)[:, None], 1)
    assert value("hit@1", predictions) == pytest.approx(100 * best.mean())


def test_variety_by_hand():
    """Bigrams: (a b) (b a) (a b), (a b) (b c): 3 different of 5."""
    predictions = [made("a b a b"), made("a b c")]
    assert value("distinct2", predictions) == pytest.approx(3 / 5)
    assert value("self_repetition", [made("x y z w x y z w"), made("a b c")]) == pytest.approx(1 / 5)
    scored = [made("", reference=(-2.0, 2)), made("", reference=(-4.0, 1))]
    assert value("perplexity", scored) == pytest.approx(np.exp(2.0))


def test_intervals_are_scipys():
    rng = np.random.default_rng(0)
    rows = METRICS["accuracy"].statistics([made("a", "a" if rng.random() < 0.7 else "b") for _ in range(80)])
    found = interval(METRICS["accuracy"], rows, 2000)
    expected = stats.bootstrap((rows[:, 0],), np.mean, n_resamples=2000, method="percentile", rng=1)
    assert found.value == pytest.approx(rows[:, 0].mean())
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval), abs=1.5)
    assert interval(METRICS["distinct1"], rows, 100).low is None


def test_the_paired_test_is_scipys():
    rng = np.random.default_rng(3)
    right = rng.random((2, 60)) < np.array([[0.75], [0.5]])
    ours, theirs = (
        METRICS["accuracy"].statistics([made("a", "a" if r else "b") for r in side]) for side in right
    )
    found = compare(METRICS["accuracy"], ours, theirs, 4000)
    expected = stats.permutation_test(
        tuple(100.0 * right), lambda a, b: np.mean(a) - np.mean(b), permutation_type="samples",
        n_resamples=4000, rng=0,
    )  # fmt: skip
    assert found.difference.value == pytest.approx(expected.statistic)
    assert found.p == pytest.approx(expected.pvalue, abs=0.02)
    assert compare(METRICS["accuracy"], ours, ours).p == 1.0


def test_names():
    with pytest.raises(UserError, match=r"names 'blue'.*bleu"):
        metric_of("blue")
    with pytest.raises(UserError, match="ndcg@0"):
        metric_of("ndcg@0")
    assert metric_of("hit@3").title == "hit@3"
    with pytest.raises(UserError, match="'group'"):
        value("hit@3", [made("a", "a", options=("a", "b"), choices=(0.0, -1.0))])
