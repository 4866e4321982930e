"""Arithmetic word problems: the answer is a number at the end of what is written (GSM8K)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxgpt.config.tasks import Sample, Task
from jaxgpt.tasks.fields import text_at

_DIGITS = r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+"
_NUMBER = re.compile(_DIGITS)
_MARK = r"####|answer is|answer:|答案[是为:\uff1a]|答[:\uff1a]"
_MARKED = re.compile(rf"(?:{_MARK})\D{{0,12}}?({_DIGITS})", re.IGNORECASE)
_CALCULATED = re.compile(r"<<[^<>]*>>")


@dataclass(frozen=True, kw_only=True)
class Arithmetic(Task):
    """Word problems with a number as the answer, in GSM8K's files or such as have the number alone."""

    metrics: tuple[str, ...] = ("number_match", "parsed")
    max_new_tokens: int = 256
    question: str = "question"
    """Field of the problem."""
    answer: str = "answer"
    """Field of the number, or of a worked solution that ends with it, as GSM8K's `#### 42`."""
    reasoning: bool = True
    """Learn the worked solution before the number, where there is one (GSM8K's calculations in `<<...>>` are
    left out); False learns the number alone."""

    names: ClassVar[tuple[str, ...]] = ("question",)
    disturbed: ClassVar[tuple[str, ...]] = ("question",)
    phrasings: ClassVar = {
        "en": (
            "{question}",
            "Solve this problem: {question}",
            "{question}\nEnd with the number that is the answer.",
            "Here is a word problem. {question} What number is the answer?",
        ),
        "zh": ("{question}", "解答这道题：{question}", "{question}\n最后写出答案的数字。"),
    }

    @property
    def wanted(self) -> str:
        return f"fields {self.question} and {self.answer}"

    def samples(self, record: Any) -> Iterator[Sample]:
        question, solution = text_at(record, self.question), text_at(record, self.answer)
        number = _number(solution)
        if not number:
            raise ValueError(f"field {self.answer!r} has no number")
        solution = _CALCULATED.sub("", solution).strip()
        yield Sample({"question": question}, (number,), learned=solution if self.reasoning else number)

    def extract(self, text: str, sample: Sample) -> str:
        return _number(text)


def _number(text: str) -> str:
    """The number that a text marks as its answer (`#### 42`, `the answer is 42`), else its last one."""
    found = _MARKED.findall(text) or _NUMBER.findall(_CALCULATED.sub("", text))
    return found[-1].replace(",", "") if found else ""
