"""Summaries that answer a query (QMSum)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxgpt.config.bounds import Limit
from jaxgpt.config.tasks import Sample, Task
from jaxgpt.data.lines import as_object, field_of, kind_name
from jaxgpt.tasks.fields import document, named, text_at, texts_at
from jaxgpt.tasks.summarization import DOCUMENTS, SUMMARIES

_QUERIES = ("general_query_list", "specific_query_list")


@dataclass(frozen=True, kw_only=True)
class QuerySummarization(Task):
    """Documents, queries and summaries that answer them: one a record, or meetings as QMSum has them."""

    metrics: tuple[str, ...] = ("rougeL", "rouge1", "rouge2")
    max_new_tokens: int = 192
    document: str = ""
    """Field of what is summarised; empty means dialogue, document, article, transcript or text."""
    query: str = "query"
    """Field of the query."""
    summary: str = ""
    """Field of the summary, or of a list of them; empty means summary, highlights or abstract."""
    spans: bool = True
    """Of QMSum's specific queries, give the turns that they are about alone, not the whole meeting."""
    longest: Limit = 0
    """Words of a document that are given, the first ones (of Chinese characters); 0 gives all."""

    names: ClassVar[tuple[str, ...]] = ("document", "query")
    disturbed: ClassVar[tuple[str, ...]] = ("query",)
    phrasings: ClassVar = {
        "en": (
            "{document}\n\nSummarise what answers this: {query}",
            "{query}\nAnswer with a summary of what this says:\n{document}",
            "From the text below, {query}\n{document}",
            "Question: {query}\nText: {document}\nWrite a short summary that answers the question.",
        ),
        "zh": (
            "{document}\n\n针对这个问题作摘要：{query}",
            "问题：{query}\n请根据下文概括回答。\n{document}",
            "{document}\n\n请概括：{query}",
        ),
    }

    def samples(self, record: Any) -> Iterator[Sample]:
        record = as_object(record)
        if "meeting_transcripts" in record:
            yield from self._meeting(record)
            return
        source = named(record, self.document, DOCUMENTS, "document")
        text = document(field_of(record, source), source, self.longest, self.language)
        values = {"document": text, "query": text_at(record, self.query)}
        for summary in texts_at(record, named(record, self.summary, SUMMARIES, "summary")):
            yield Sample(values, (summary,), together=(text,))

    def _meeting(self, record: dict[str, Any]) -> Iterator[Sample]:
        turns = record["meeting_transcripts"]
        if not isinstance(turns, list):
            raise ValueError(f"field 'meeting_transcripts' is {kind_name(turns)}, not a list of turns")
        whole = document(turns, "meeting_transcripts", self.longest, self.language)
        for name in _QUERIES:
            for asked in record.get(name) or []:
                about = self._about(as_object(asked), turns) or whole
                values = {"document": about, "query": text_at(asked, "query")}
                yield Sample(values, (text_at(asked, "answer"),), together=(whole,))

    def _about(self, asked: dict[str, Any], turns: list[Any]) -> str:
        """The turns that a query is about, or nothing where it is about all."""
        spans = asked.get("relevant_text_span") if self.spans else None
        try:
            kept = [turn for first, last in spans or [] for turn in turns[int(first) : int(last) + 1]]
        except (TypeError, ValueError, OverflowError):
            raise ValueError("field 'relevant_text_span' is no list of [first, last] turns") from None
        if not kept:
            return ""
        return document(kept, "meeting_transcripts", self.longest, self.language)
