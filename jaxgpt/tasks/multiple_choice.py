"""Multiple choice: one of several answers, named by its letter or written (MMLU, ARC, HellaSwag)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any, ClassVar, Literal

from jaxgpt.config.tasks import Sample, Task
from jaxgpt.data.lines import as_object, field_of
from jaxgpt.data.readers.dialogues import has_field
from jaxgpt.tasks.fields import MARKS, named, text_at, texts_at

_KEYS = ("answer", "answerKey", "label", "target")
_LETTER = (
    re.compile(r"\W*([A-Z])(?:\W|$)"),
    re.compile(r"(?:answer|choice|option)(?:\s+is|:)\W*([A-Z])(?:\W|$)", re.IGNORECASE),
    re.compile(r"(?:答案|选择?)[是为:\uff1a]?\W*([A-Z])"),
)


@dataclass(frozen=True, kw_only=True)
class MultipleChoice(Task):
    """Questions with choices, in records (MMLU, ARC, HellaSwag and their like) or MMLU's tables."""

    metrics: tuple[str, ...] = ("choice_accuracy", "accuracy", "parsed")
    max_new_tokens: int = 32
    question: str = "question"
    """Field of the question, or of what the choices go on with."""
    choices: str = "choices"
    """Field of the choices: a list of texts, or ARC's objects with text and label; where there is none, they
    are the fields A, B, C, ..."""
    answer: str = ""
    """Field of the right one: its number from 0, its letter, its label or its text; empty means answer,
    answerKey, label or target."""
    answer_with: Literal["letter", "text"] = "letter"
    """What is learned and scored: the letter of the right choice, or its text."""

    one_each: ClassVar[bool] = True
    names: ClassVar[tuple[str, ...]] = ("question", "choices")
    disturbed: ClassVar[tuple[str, ...]] = ("question",)
    phrasings: ClassVar = {
        "en": (
            "{question}\n{choices}",
            "Question: {question}\n{choices}\nWhich one is right?",
            "Choose the right answer.\n{question}\n{choices}",
            "{question}\nPick one of these:\n{choices}",
        ),
        "zh": (
            "{question}\n{choices}",
            "问题：{question}\n{choices}\n哪一个正确？",
            "{question}\n请从下列选项中选择：\n{choices}",
        ),
    }

    @property
    def wanted(self) -> str:
        return f"fields {self.question} and {self.choices}"

    @property
    def columns(self) -> tuple[str, ...]:
        return self.header or (self.question, *"ABCD", self.answer or "answer")

    def samples(self, record: Any) -> Iterator[Sample]:
        record = as_object(record)
        asked = field_of(record, self.question)
        inner = asked if isinstance(asked, dict) else {}  # ARC's own files: {"stem": ..., "choices": [...]}
        question = text_at(inner, "stem") if inner else text_at(record, self.question)
        texts, labels = self._choices(inner or record)
        right = self._right(
            text_at(record, named(record, self.answer, _KEYS, "answer")).strip(), texts, labels
        )
        letters = tuple(ascii_uppercase[: len(texts)])
        listed = "\n".join(f"{a}. {text}" for a, text in zip(letters, texts, strict=True))
        choices = letters if self.answer_with == "letter" else texts
        yield Sample({"question": question, "choices": listed}, (choices[right],), choices=choices,
                     facts={"texts": list(texts)})  # fmt: skip

    def _choices(self, record: dict[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The texts of the choices and their own labels, if they have some."""
        labels: tuple[str, ...] = ()
        if not has_field(record, self.choices):
            letters = [a for a in ascii_uppercase if a in record]
            texts = tuple(
                text_at(record, a) for a in letters if letters == [*ascii_uppercase[: len(letters)]]
            )
            if not texts:
                field_of(record, self.choices)  # says what is there
        else:
            value = field_of(record, self.choices)
            if isinstance(value, list) and value and isinstance(value[0], dict):
                value = {key: [as_object(one).get(key) for one in value] for key in ("text", "label")}
            if isinstance(value, dict):
                texts, labels = texts_at(value, "text"), texts_at(value, "label")
            else:
                texts = texts_at(record, self.choices)
        if not 2 <= len(texts) <= len(ascii_uppercase) or len(set(texts)) < len(texts):
            raise ValueError(
                f"its choices are {len(texts)}; 2 to {len(ascii_uppercase)} different ones are asked"
            )
        return texts, labels

    def _right(self, key: str, texts: tuple[str, ...], labels: tuple[str, ...]) -> int:
        for names in (labels, ascii_uppercase[: len(texts)], [str(i) for i in range(len(texts))], texts):
            if key in names:
                return list(names).index(key)
        raise ValueError(
            f"the right answer is {key!r:.40}, which is none of its {len(texts)} choices (by letter, "
            "number from 0, or text)"
        )

    def extract(self, text: str, sample: Sample) -> str:
        """The letter that a completion names, or the choice that it is; nothing where it is neither."""
        texts = sample.facts["texts"]
        said = text.strip()
        same = said.strip(MARKS).casefold()
        matched = [i for i, one in enumerate(texts) if one.strip(MARKS).casefold() == same]
        letters = ascii_uppercase[: len(texts)]
        found = _LETTER[0].match(said) or next((m for p in _LETTER[1:] if (m := p.search(said))), None)
        if not matched and found and found[1].upper() in letters:
            matched = [letters.index(found[1].upper())]
        return sample.choices[matched[0]] if matched else ""
