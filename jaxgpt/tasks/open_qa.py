"""Open question answering: from what the model knows, or from passages that somebody retrieved."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxgpt.config.tasks import Sample, Task
from jaxgpt.data.lines import as_object, check_text, field_of
from jaxgpt.tasks.fields import answers_in, named, text_at

_ANSWERS = ("answer", "answers")


@dataclass(frozen=True, kw_only=True)
class OpenQA(Task):
    """Questions without a passage, or with several; any of the answers is right, the first is learned."""

    metrics: tuple[str, ...] = ("exact_match", "f1")
    max_new_tokens: int = 48
    question: str = "question"
    """Field of the question."""
    answer: str = ""
    """Field of the answers: a text, a list of texts, or an object with `value` and `aliases` (TriviaQA) or
    `text` (SQuAD); empty means `answer` or `answers`."""
    passages: str = ""
    """Field of passages: a text, or a list of texts or of objects with `text` and `title`; empty for none."""

    names: ClassVar[tuple[str, ...]] = ("context", "question")
    disturbed: ClassVar[tuple[str, ...]] = ("question",)
    phrasings: ClassVar = {
        "en": (
            "{context}Question: {question}",
            "{context}Answer in a few words: {question}",
            "{context}{question} Give only the answer.",
            "{context}Please answer briefly.\n{question}",
        ),
        "zh": (
            "{context}问题：{question}",
            "{context}{question}只写答案。",
            "{context}请简短回答：{question}",
        ),
    }

    def samples(self, record: Any) -> Iterator[Sample]:
        values = {"context": self._context(as_object(record)), "question": text_at(record, self.question)}
        name = named(record, self.answer, _ANSWERS, "answer")
        answers = answers_in(field_of(as_object(record), name), name)
        if not answers:
            raise ValueError(f"field {name!r} holds no answer")
        yield Sample(values, answers, together=(values["question"],))

    def _context(self, record: dict[str, Any]) -> str:
        """The passages by number, with an empty line after each."""
        if not self.passages:
            return ""
        value = field_of(record, self.passages)
        parts = [self._passage(one) for one in (value if isinstance(value, list) else [value])]
        return "".join(f"[{i}] {part}\n\n" for i, part in enumerate(parts, 1))

    def _passage(self, value: Any) -> str:
        if not isinstance(value, dict):
            return check_text(value, self.passages)
        text = text_at(value, "text")
        return f"{text_at(value, 'title')}: {text}" if value.get("title") else text
