"""Classification as text: the answer is the name of a label (SST-2's sentiment, topics, inference)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxgpt.config.tasks import Sample, Task
from jaxgpt.data.lines import as_object, field_of
from jaxgpt.errors import nearest, require
from jaxgpt.tasks.fields import MARKS, text_at


@dataclass(frozen=True, kw_only=True)
class TextClassification(Task):
    """Texts, or pairs of them, with one label each, whose name is written; by default of sentiment."""

    metrics: tuple[str, ...] = ("accuracy", "macro_f1", "choice_accuracy", "parsed")
    max_new_tokens: int = 8
    labels: tuple[str, ...] = ()
    """What the labels are called in answers, in the order of `values`, or of the numbers 0, 1, ... that files
    have; empty means negative and positive (负面 and 正面 in Chinese)."""
    values: tuple[str, ...] = ()
    """The labels as files have them; empty means the names themselves, or their numbers from 0 on."""
    about: str = ""
    """What is asked for, such as `topic`; empty means sentiment."""
    text: str = "text"
    """Field of the text."""
    pair: str = ""
    """Field of a second text, where two are judged together; empty for none."""
    label: str = "label"
    """Field of the label."""

    one_each: ClassVar[bool] = True
    names: ClassVar[tuple[str, ...]] = ("text", "labels", "about")
    disturbed: ClassVar[tuple[str, ...]] = ("text",)
    phrasings: ClassVar = {
        "en": (
            "What is the {about} of this text: {labels}?\n{text}",
            "{text}\n\nChoose the {about} ({labels}).",
            "Classify by {about} as {labels}: {text}",
            "Text: {text}\nIs its {about} {labels}?",
        ),
        "zh": (
            "下面这段文字的{about}是{labels}？\n{text}",
            "{text}\n\n请判断{about}（{labels}）。",
            "文字：{text}\n它的{about}属于{labels}中的哪一种？",
        ),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        folded = {name.strip().casefold() for name in self.called}
        require(
            len(folded) == len(self.called) >= 2 and "" not in folded,
            f"data.labels is {self.labels}; name at least two, all different.",
        )
        require(
            len(set(self.values)) == len(self.values) and len(self.values) in (0, len(self.called)),
            f"data.values is {self.values} for the labels {self.called}; give each one of its own, or none.",
        )

    @property
    def called(self) -> tuple[str, ...]:
        """The names of the labels."""
        return self.labels or {"en": ("negative", "positive"), "zh": ("负面", "正面")}[self.language]

    @property
    def wanted(self) -> str:
        return f"fields {', '.join(filter(None, (self.text, self.pair, self.label)))}"

    @property
    def columns(self) -> tuple[str, ...]:
        return self.header or tuple(filter(None, (self.text, self.pair, self.label)))

    def samples(self, record: Any) -> Iterator[Sample]:
        text = text_at(record, self.text)
        if self.pair:
            text += f"\n{text_at(record, self.pair)}"
        label, joint = self._named(self._value(record)), {"en": " or ", "zh": "还是"}[self.language]
        about = self.about or {"en": "sentiment", "zh": "情感"}[self.language]
        values = {"text": text, "about": about, "labels": joint.join(self.called)}
        yield Sample(values, (label,), choices=self.called)

    def _value(self, record: Any) -> str:
        """The label as a file has it; false is 0 and true 1."""
        value = field_of(as_object(record), self.label)
        return str(int(value)) if isinstance(value, bool) else text_at(record, self.label)

    def _named(self, value: str) -> str:
        """The name of a label as a file has it."""
        known = {self.values[i] if self.values else str(i): name for i, name in enumerate(self.called)}
        if not self.values:
            known |= {name.casefold(): name for name in self.called}
        found = known.get(value.strip()) or known.get(value.strip().casefold())
        if found is None:
            raise ValueError(f"label {value!r:.40} is not one of data.{'values' if self.values else 'labels'}"
                             f"{nearest(value, known)}")  # fmt: skip
        return found

    def extract(self, text: str, sample: Sample) -> str:
        """The label that a completion is, or else the one that it names alone."""
        said = text.strip(MARKS).casefold()
        whole = [name for name in sample.choices if name.casefold() == said]
        edge = r"\b" if self.language == "en" else ""
        inside = [n for n in sample.choices if re.search(f"{edge}{re.escape(n.casefold())}{edge}", said)]
        return whole[0] if whole else inside[0] if len(inside) == 1 else ""
