"""Data to text: a sentence that says what a record of slots and values says (E2E NLG, WebNLG)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxgpt.config.tasks import Sample, Task
from jaxgpt.data.lines import as_object, field_of
from jaxgpt.tasks.fields import text_at, texts_at


@dataclass(frozen=True, kw_only=True)
class DataToText(Task):
    """Data and texts that say them: of several texts each is learned, and in evaluation any is right."""

    metrics: tuple[str, ...] = ("bleu", "rougeL", "chrf")
    mr: str = "mr"
    """Field of the data: a text such as E2E's, or a list (of triples as well), whose parts are joined."""
    ref: str = "ref"
    """Field of a text that says it, or of a list of such texts."""

    names: ClassVar[tuple[str, ...]] = ("data",)
    phrasings: ClassVar = {
        "en": (
            "Write a sentence that says this: {data}",
            "Turn the data into text.\n{data}",
            "{data}\n\nSay this in words.",
            "Describe in plain English: {data}",
        ),
        "zh": ("用一句话说明：{data}", "把数据写成文字。\n{data}", "请描述：{data}"),
    }

    @property
    def wanted(self) -> str:
        return f"fields {self.mr} and {self.ref}"

    def samples(self, record: Any) -> Iterator[Sample]:
        value = field_of(as_object(record), self.mr)
        data = "; ".join(map(self._part, value)) if isinstance(value, list) else text_at(record, self.mr)
        for text in texts_at(record, self.ref):
            yield Sample({"data": data}, (text,))

    def _part(self, value: Any) -> str:
        if isinstance(value, dict):
            value = [f"{name}: {text_at(value, name)}" for name in value]
        return " | ".join(texts_at({self.mr: value}, self.mr))
