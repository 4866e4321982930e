"""Translation of sentence pairs, in one direction or both."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxgpt.config.tasks import Sample, Task
from jaxgpt.data.lines import as_object, check_text, field_of
from jaxgpt.errors import require

LANGUAGES = {
    "en": "English", "zh": "Chinese", "de": "German", "fr": "French", "es": "Spanish", "it": "Italian",
    "ja": "Japanese", "ko": "Korean", "ru": "Russian", "pt": "Portuguese", "nl": "Dutch", "ar": "Arabic",
}  # fmt: skip
"""Names of languages in prompts; of another the field's name stands there."""


@dataclass(frozen=True, kw_only=True)
class Translation(Task):
    """Pairs of sentences: `source` is given, `target` is written. Score: BLEU and chrF."""

    prompts: tuple[str, ...] = (
        "Translate from {source} to {target}: {text}",
        "Translate this into {target}.\n{text}",
        "{text}\n\nHow do you say this in {target}?",
    )
    held_out: str = "What is the {target} translation of this {source} sentence?\n{text}"
    metrics: tuple[str, ...] = ("chrf", "bleu")
    source: str = "en"
    """Field of the given sentence, or a path such as `translation.en`; its last part names the language."""
    into: str = "zh"
    """Field of its translation."""

    names: ClassVar[tuple[str, ...]] = ("text", "source", "target")
    disturbed: ClassVar[tuple[str, ...]] = ("text",)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            bool(self.source and self.into) and self.source != self.into,
            f"data.source is {self.source!r} and data.into {self.into!r}; name two different fields.",
        )
        if _name(self.into) == "Chinese":
            object.__setattr__(self, "language", "zh")

    @property
    def name(self) -> str:
        return f"{self.source}-{self.into}".replace(".", "-")

    @property
    def wanted(self) -> str:
        return f"fields {self.source} and {self.into}"

    @property
    def columns(self) -> tuple[str, ...]:
        return self.header or (self.source, self.into)

    def samples(self, record: Any) -> Iterator[Sample]:
        record = as_object(record)
        given, written = (check_text(field_of(record, name), name) for name in (self.source, self.into))
        if not given.strip() or not written.strip():
            raise ValueError("a side of the pair is empty")
        # Alike in both directions, so that no pair is held out in the one and trained in the other.
        sides = f"{self.source}: {given}", f"{self.into}: {written}"
        languages = {"source": _name(self.source), "target": _name(self.into)}
        yield Sample({"text": given, **languages}, (written,), together=sides)


def _name(field: str) -> str:
    code = field.rpartition(".")[2]
    return LANGUAGES.get(code.lower()[:2] if len(code) in (2, 5) else code, code)
