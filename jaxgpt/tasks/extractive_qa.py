"""Extractive question answering: the answer stands in a passage, or the passage does not say it (SQuAD)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxgpt.config.tasks import Sample, Task
from jaxgpt.data.lines import as_object, field_of
from jaxgpt.tasks.fields import MARKS, answers_in, text_at


@dataclass(frozen=True, kw_only=True)
class ExtractiveQA(Task):
    """Questions on passages, in SQuAD's files (1.1 and 2.0) or a question a record, as on the Hub."""

    metrics: tuple[str, ...] = ("f1", "exact_match")
    max_new_tokens: int = 48
    passage: str = "context"
    """Field of the passage."""
    question: str = "question"
    """Field of the question."""
    answer: str = "answers"
    """Field of the answers: SQuAD's, a list of texts, or a text. The first is learned, each is right; none of
    them means that the passage does not say."""
    no_answer: str = ""
    """What is answered where the passage does not say; empty means `unanswerable`, or
    `无法回答` in Chinese."""

    names: ClassVar[tuple[str, ...]] = ("passage", "question", "no_answer")
    disturbed: ClassVar[tuple[str, ...]] = ("question",)
    phrasings: ClassVar = {
        "en": (
            "{passage}\n\nAnswer from the passage, or with \"{no_answer}\": {question}",
            "Question: {question}\nFind the answer in this passage, word for word, or say \"{no_answer}\".\n"
            "{passage}",
            "Read the passage and answer with words of it (\"{no_answer}\" if it does not say).\n"
            "Passage: {passage}\nQuestion: {question}",
            "{passage}\n\n{question} If the text does not tell, say \"{no_answer}\".",
        ),
        "zh": (
            "{passage}\n\n根据文章回答，文章没有说明则回答“{no_answer}”：{question}",
            "问题：{question}\n请从下文中摘出答案，没有则回答“{no_answer}”。\n{passage}",
            "文章：{passage}\n问题：{question}\n用文中的词语回答；无从得知时回答“{no_answer}”。",
        ),
    }  # fmt: skip

    @property
    def silence(self) -> str:
        """What is answered where the passage does not say."""
        return self.no_answer or {"en": "unanswerable", "zh": "无法回答"}[self.language]

    @property
    def wanted(self) -> str:
        return f"fields {self.passage}, {self.question} and {self.answer}"

    def samples(self, record: Any) -> Iterator[Sample]:
        passage, question = text_at(record, self.passage), text_at(record, self.question)
        values = {"passage": passage, "question": question, "no_answer": self.silence}
        answers = self._answers(as_object(record))
        learned = answers[0] or self.silence
        yield Sample(values, answers, learned=learned, together=(passage,))

    def _answers(self, record: dict[str, Any]) -> tuple[str, ...]:
        """The different answers; one empty text where there is none."""
        impossible = record.get("is_impossible")
        value = None if impossible is True else field_of(record, self.answer)
        answers = answers_in(value, self.answer)
        if impossible is False and not answers:
            raise ValueError(f"field {self.answer!r} holds no answer, but is_impossible is false")
        return answers or ("",)

    def extract(self, text: str, sample: Sample) -> str:
        return "" if text.strip(MARKS).casefold() == self.silence.casefold() else text.strip()
