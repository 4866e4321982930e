"""Customer service: dialogues whose last question is answered from documents.

The answer learned cites its passage, or says that none has it. As in RAFT (Zhang et al. 2024, section 3) the
passages are those that the search finds, right or wrong, so that the model learns to tell which one answers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from jaxgpt.config.tasks import Sample
from jaxgpt.data.knowledge import open_library
from jaxgpt.tasks.dialogue import Dialogue
from jaxgpt.text.retrieve import MARK, best_support

UNKNOWN = {
    "en": "I do not find an answer to this in the documents.",
    "zh": "资料里没有这个问题的答案。",
}


@dataclass(frozen=True, kw_only=True)
class Support(Dialogue):
    """Dialogues with a customer, in every layout that `Chat` reads: the last answer is learned with the mark
    of the passage that has at least half of its words, such as `Two days. [1]`; where none has, what is
    learned says so. Without `knowledge` the answer alone is learned.
    """

    metrics: tuple[str, ...] = ("f1", "cited", "rougeL")
    unknown: str = ""
    """What is answered where no passage answers; empty for a sentence in `language`."""

    def samples(self, record: Any) -> Iterator[Sample]:
        for sample in super().samples(record):
            if self.knowledge is None:
                yield replace(sample, facts={"passage": 0})
                continue
            near = open_library(self.knowledge).near(self.searched(sample))
            number = best_support(sample.answers[0], [p.text for p in near])
            learned = f"{sample.answers[0]} [{number}]" if number else self.unknown or UNKNOWN[self.language]
            yield replace(sample, facts={"passage": number}, learned=learned)

    def extract(self, text: str, sample: Sample) -> str:
        return re.sub(rf"\s*{MARK.pattern}", "", text).strip()
