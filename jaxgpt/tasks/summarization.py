"""Summaries of documents and dialogues (CNN/DailyMail, SAMSum, DialogSum)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxgpt.config.bounds import Limit
from jaxgpt.config.tasks import Sample, Task
from jaxgpt.data.lines import field_of
from jaxgpt.tasks.fields import document, named, texts_at

DOCUMENTS = ("dialogue", "document", "article", "transcript", "text")
SUMMARIES = ("summary", "highlights", "abstract")


@dataclass(frozen=True, kw_only=True)
class Summarization(Task):
    """Documents or dialogues and their summaries; of several summaries each is learned, and any is right."""

    metrics: tuple[str, ...] = ("rougeL", "rouge1", "rouge2")
    max_new_tokens: int = 128
    document: str = ""
    """Field of what is summarised: a text, or turns (with speaker and text); empty means dialogue, document,
    article, transcript or text."""
    summary: str = ""
    """Field of the summary, or of a list of them; empty means summary, highlights or abstract."""
    longest: Limit = 0
    """Words of a document that are given, the first ones (of Chinese characters); 0 gives all."""

    names: ClassVar[tuple[str, ...]] = ("document",)
    disturbed: ClassVar[tuple[str, ...]] = ("document",)
    phrasings: ClassVar = {
        "en": (
            "Summarise this.\n{document}",
            "{document}\n\nSummary:",
            "Say in a few sentences what this is about.\n{document}",
            "{document}\n\nWhat are the main points of this text?",
        ),
        "zh": ("概括下面的内容。\n{document}", "{document}\n\n摘要：", "请写一段摘要：\n{document}"),
    }

    def samples(self, record: Any) -> Iterator[Sample]:
        source = named(record, self.document, DOCUMENTS, "document")
        text = document(field_of(record, source), source, self.longest, self.language)
        for summary in texts_at(record, named(record, self.summary, SUMMARIES, "summary")):
            yield Sample({"document": text}, (summary,))
