"""Metrics of recommendation: each prediction scores one candidate of one user by the probability of a click.

A sample's first choice says that the candidate is taken; its facts hold `group`, whose candidates are ranked
together, and `click`, 1 or 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxgpt.errors import UserError, require
from jaxgpt.evals.metrics.base import Metric, Prediction, ratio


def click_probability(p: Prediction) -> float:
    """The probability of the first choice among all of them."""
    scores = np.asarray(p.choices, np.float64)
    return float(np.exp(scores[0] - np.logaddexp.reduce(scores)))


def _fact(p: Prediction, name: str) -> Any:
    require(
        name in p.sample.facts and bool(p.choices),
        "auc, mrr, ndcg@K, recall@K and hit@K rank candidates, but a sample of this task has no "
        f"{f'facts[{name!r}]' if p.choices else 'choices'}; take them out of its metrics, or yield "
        "Sample(..., choices=(...), facts={'group': ..., 'click': ...}).",
    )
    return p.sample.facts[name]


def _pairs(predictions: Sequence[Prediction]) -> np.ndarray:
    return np.asarray([(_fact(p, "click"), click_probability(p))[::-1] for p in predictions], np.float64)


def _auc(rows: np.ndarray) -> float:
    try:
        from sklearn.metrics import roc_auc_score
    except ImportError:
        raise UserError(
            "AUC is computed by scikit-learn, which is not installed; run `pip install 'jaxgpt[eval]'`."
        ) from None
    scores, clicks = rows.T
    return 100 * float(roc_auc_score(clicks, scores)) if 0 < clicks.sum() < len(clicks) else math.nan


def _by_group(value: Callable[[np.ndarray], float]) -> Callable[[Sequence[Prediction]], np.ndarray]:
    """A row for each group that has a click: the value of its clicks in order of their scores, and 1."""

    def statistics(predictions: Sequence[Prediction]) -> np.ndarray:
        groups: dict[object, list[Prediction]] = {}
        for p in predictions:
            groups.setdefault(_fact(p, "group"), []).append(p)
        rows = []
        for members in groups.values():
            pairs = _pairs(members)
            ranked = pairs[np.argsort(-pairs[:, 0], kind="stable"), 1]
            rows.append([value(ranked), 1.0] if ranked.any() else [0.0, 0.0])
        return np.asarray(rows, np.float64)

    return statistics


def _ndcg(k: int) -> Callable[[np.ndarray], float]:
    def value(ranked: np.ndarray) -> float:
        discounts = 1 / np.log2(np.arange(2, len(ranked) + 2))
        best = np.sort(ranked)[::-1]
        return 100 * float((ranked * discounts)[:k].sum() / (best * discounts)[:k].sum())

    return value


def ndcg(k: int) -> Metric:
    """NDCG@k (Jarvelin and Kekalainen 2002), a mean over groups; ties stay in their order."""
    return Metric(f"NDCG@{k}", _by_group(_ndcg(k)), ratio, needs="choices")


def hit(k: int) -> Metric:
    """Share of groups with a click among the k best."""
    return Metric(
        f"hit@{k}", _by_group(lambda ranked: 100.0 * bool(ranked[:k].any())), ratio, needs="choices"
    )


def recall(k: int) -> Metric:
    """Share of a group's clicks among its k best, a mean over groups."""
    return Metric(
        f"recall@{k}",
        _by_group(lambda ranked: 100.0 * float(ranked[:k].sum() / ranked.sum())),
        ratio,
        needs="choices",
    )


MRR = Metric(
    "mean reciprocal rank",
    _by_group(lambda ranked: 100.0 / (1 + int(ranked.argmax()))),
    ratio,
    needs="choices",
)
"""Of the first click of each group (Voorhees 1999), in %."""
AUC = Metric("AUC", _pairs, _auc, whole=True, needs="choices")
