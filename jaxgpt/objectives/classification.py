"""Classification of tokens and texts."""

from __future__ import annotations

from typing import Any

import jax

from jaxgpt.batch import Batch
from jaxgpt.config import Classification
from jaxgpt.objectives.sums import Objective, Sums, score
from jaxgpt.text.vocabulary import Vocabulary


def classification(config: Classification, vocabulary: Vocabulary) -> Objective:
    """Cross-entropy of labels at the tokens with nonzero weight; the batch's targets are label ids."""

    def objective(model: Any, batch: Batch, key: jax.Array | None) -> Sums:
        return score(model, model.hidden(batch, key), batch)

    return objective
