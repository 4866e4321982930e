"""Metrics of tasks by name; see `base` for what a metric is."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import numpy as np

from jaxgpt.config import code
from jaxgpt.errors import require, require_known
from jaxgpt.evals.metrics.answers import ANSWERS
from jaxgpt.evals.metrics.base import (
    Interval,
    Metric,
    Paired,
    Prediction,
    compare,
    interval,
    mean_of,
    ratio,
)
from jaxgpt.evals.metrics.ranking import AUC, MRR, hit, ndcg, recall
from jaxgpt.evals.metrics.texts import TEXTS

__all__ = ["METRICS", "Interval", "Metric", "Paired", "Prediction", "compare", "interval", "metric_of"]

_RANKED: dict[str, Callable[[int], Metric]] = {"ndcg": ndcg, "recall": recall, "hit": hit}
_AT_10 = {f"{name}@10": make(10) for name, make in _RANKED.items()}
METRICS: dict[str, Metric] = {**TEXTS, **ANSWERS, "auc": AUC, "mrr": MRR, **_AT_10}
"""From names to metrics; `ndcg@K`, `recall@K` and `hit@K` exist for every K."""


def metric_of(name: str, where: str = "metrics") -> Metric:
    """The metric of a name: one of `METRICS`, or a function `FILE.py:NAME` of a prediction to a number.

    Of such a function the mean is taken, of all but None; higher is better, unless its attribute
    `higher_is_better` is False.

    Raises:
      UserError: there is no such metric.
    """
    if code.is_reference(name):
        function = code.function_of(name, where)
        better = bool(getattr(function, "higher_is_better", True))

        def number(p: Prediction) -> float:
            value = function(p)
            known = value is None or isinstance(value, int | float | np.number | np.bool_)
            require(known, f"{where}: {name} gives {value!r:.80} of a prediction; return a number, or None.")
            return math.nan if value is None else float(value)

        return Metric(name.rpartition(":")[2], mean_of(number), ratio, higher_is_better=better)
    kind, _, k = name.partition("@")
    if kind in _RANKED and re.fullmatch(r"[1-9]\d{0,5}", k):
        return _RANKED[kind](int(k))
    require_known(name, METRICS, f"{where} names {name!r}")
    return METRICS[name]
