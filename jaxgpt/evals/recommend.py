"""What any recommender must beat: popularity, and neighbours of items.

Shapes: U users, I items.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxgpt.config import Sample
from jaxgpt.evals.metrics import Interval, Prediction, interval, metric_of

Record = dict[str, Any]
"""Of `data.ratings.leave_last_out`."""
Scorer = Callable[[Record], float]
"""How much a record's candidate is recommended after its history; only the order counts."""
METRICS = ("recall@10", "ndcg@10", "mrr")


def histories(records: Sequence[Record]) -> list[list[str]]:
    """What each user had liked when asked, once a user."""
    return list({record["user"]: record["history"] for record in records}.values())


def popularity(liked: Sequence[Sequence[str]]) -> Scorer:
    """The number of users who liked the candidate."""
    count = Counter(item for items in liked for item in items)
    return lambda record: float(count[record["candidate"]])


def item_neighbours(liked: Sequence[Sequence[str]], neighbours: int = 20) -> Scorer:
    """The sum of the candidate's similarities to the nearest items of the history.

    Two items are as similar as the cosine of who liked them (item-based collaborative filtering; Sarwar et
    al. 2001, section 3; Deshpande and Karypis 2004 for what is ranked).

    Args:
      liked: items of each user.
      neighbours: items of a history that count, the nearest ones.
    """
    from scipy.sparse import csr_array

    numbers = {item: i for i, item in enumerate(dict.fromkeys(item for items in liked for item in items))}
    places = [(user, numbers[item]) for user, items in enumerate(liked) for item in items]
    rows, columns = np.asarray(places, np.int64).reshape(-1, 2).T
    shape = (len(liked), len(numbers))
    liked_UI = csr_array((np.ones(len(places), np.float32), (rows, columns)), shape=shape)
    lengths_I = np.sqrt(np.asarray(liked_UI.sum(axis=0)).ravel())
    both_II = (liked_UI.T @ liked_UI).tocsr()

    def score(record: Record) -> float:
        own = numbers.get(record["candidate"])
        if own is None:
            return 0.0
        known = [numbers[item] for item in record["history"] if item in numbers]
        start, end = both_II.indptr[own], both_II.indptr[own + 1]
        near = dict(zip(both_II.indices[start:end].tolist(), both_II.data[start:end].tolist(), strict=True))
        found = sorted((near.get(i, 0.0) / (lengths_I[own] * lengths_I[i]) for i in known), reverse=True)
        return float(sum(found[:neighbours]))

    return score


def ranking(
    records: Sequence[Record], score: Scorer, metrics: Sequence[str] = METRICS
) -> dict[str, Interval]:
    """The metrics of a recommender, as a suite has them of a model on the same records."""
    scores = np.asarray([score(record) for record in records], np.float64)
    scores /= np.abs(scores).max(initial=1e-30)  # so that the probability of a click tells them apart
    predictions = [
        Prediction(
            Sample({}, facts={"group": record["user"], "click": record["click"]}), "", "", "",
            choices=(float(value), 0.0),
        )
        for record, value in zip(records, scores, strict=True)
    ]  # fmt: skip
    found = {name: metric_of(name) for name in metrics}
    return {name: interval(metric, metric.statistics(predictions)) for name, metric in found.items()}
