"""Named entities as text: the answer lists them, a line each, as `TYPE: text`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from jaxgpt.config.tasks import Sample, Task
from jaxgpt.data.lines import as_object, field_of
from jaxgpt.data.readers.tagging import SUFFIXES, read_conll, scheme_of, to_bio
from jaxgpt.data.records import SUFFIXES as RECORDS
from jaxgpt.errors import UserError
from jaxgpt.tasks.fields import MARKS, texts_at

_LINES = tuple(ending for ending in RECORDS if ending.startswith((".json", ".ndjson", ".parquet")))


@dataclass(frozen=True, kw_only=True)
class Entities(Task):
    """Sentences with a tag for every word (CoNLL files, or records of words and tags), whose entities are
    listed in the order of the text, a line each, as `TYPE: text`.
    """

    metrics: tuple[str, ...] = ("entity_f1", "parsed")
    max_new_tokens: int = 128
    joiner: str = " "
    """What stands between words; empty where every character is a word, as in Chinese files."""
    types: tuple[str, ...] = ()
    """Types of entities that are asked for, by name; others are left out. Empty asks for all."""
    words: str = "tokens"
    """Field of the words, of files of records."""
    tags: str = "ner_tags"
    """Field of the tags of files of records, as text or as places in tag_names."""
    tag_names: tuple[str, ...] = ()
    """Names of the tags, where files have their numbers from 0 on."""
    none: str = ""
    """What is answered where there is no entity; empty means `none`, or `无` in Chinese."""

    suffixes: ClassVar[tuple[str, ...]] = SUFFIXES
    one_each: ClassVar[bool] = True
    names: ClassVar[tuple[str, ...]] = ("text", "types", "none")
    phrasings: ClassVar = {
        "en": (
            "List the named entities{types}, a line each, as TYPE: text, or \"{none}\".\n{text}",
            "{text}\n\nWhich entities{types} are in this text? Write TYPE: text, one a line (or \"{none}\").",
            "Find all names{types} in: {text}\nAnswer with lines of TYPE: text, or \"{none}\".",
        ),
        "zh": (
            "列出命名实体{types}，每行一个，写作 类型: 文字；没有则写“{none}”。\n{text}",
            "{text}\n\n这段文字中有哪些实体{types}？每行写 类型: 文字（没有则写“{none}”）。",
            "请找出下文的全部实体{types}，每行一个 类型: 文字，若无则写“{none}”。\n{text}",
        ),
    }  # fmt: skip

    @property
    def nothing(self) -> str:
        """What is answered where there is no entity."""
        return self.none or {"en": "none", "zh": "无"}[self.language]

    @property
    def wanted(self) -> str:
        return f"fields {self.words} and {self.tags}"

    def records(self, path: str, report: Any) -> Iterator[tuple[str, Any]] | None:
        return None if path.lower().endswith(_LINES) else self._sentences(path, report)

    def _sentences(self, path: str, report: Any) -> Iterator[tuple[str, Any]]:
        for i, sentence in enumerate(read_conll([Path(path)]), 1):
            report.lines += 1
            yield f"{path}: sentence {i}", {self.words: list(sentence.words), self.tags: list(sentence.tags)}

    def samples(self, record: Any) -> Iterator[Sample]:
        record = as_object(record)
        words, tags = texts_at(record, self.words), self._tags(field_of(record, self.tags))
        if len(words) != len(tags):
            raise ValueError(f"{len(words)} words have {len(tags)} tags")
        try:
            tags = to_bio(tags, scheme_of([tags]))
        except UserError as error:
            raise ValueError(str(error)) from None
        found = [one for one in entities(tags) if not self.types or one[0] in self.types]
        spans = [f"{kind}: {self.joiner.join(words[a:b])}" for kind, a, b in found]
        types = {"en": f" ({', '.join(self.types)})", "zh": f"（{'、'.join(self.types)}）"}[self.language]
        values = {"text": self.joiner.join(words), "types": types if self.types else "", "none": self.nothing}
        yield Sample(values, ("\n".join(spans) or self.nothing,))

    def _tags(self, value: Any) -> tuple[str, ...]:
        if not (isinstance(value, list) and value and all(isinstance(tag, int) for tag in value)):
            return texts_at({self.tags: value}, self.tags)
        if not self.tag_names:
            raise ValueError(f"field {self.tags!r} holds numbers; name what they mean with data.tag_names")
        if unknown := [tag for tag in value if not 0 <= tag < len(self.tag_names)]:
            raise ValueError(
                f"field {self.tags!r} holds {unknown[0]}, but data.tag_names are {len(self.tag_names)}"
            )
        return tuple(self.tag_names[tag] for tag in value)

    def extract(self, text: str, sample: Sample) -> str:
        """The lines that are entities; the word for none of them; nothing where no line can be read."""
        if text.strip(MARKS).casefold() == self.nothing.casefold():
            return self.nothing
        parts = (line.replace("\uff1a", ":", 1).partition(":") for line in text.splitlines())
        found = [(kind.strip(), said.strip()) for kind, colon, said in parts if colon]
        return "\n".join(f"{kind}: {said}" for kind, said in found if kind and said)


def entities(tags: list[str]) -> Iterator[tuple[str, int, int]]:
    """(type, first word, one past the last) of each entity of BIO tags; without a type it is `ENTITY`."""
    start = 0
    for i, (tag, after) in enumerate(zip(tags, [*tags[1:], "O"], strict=True)):
        start = i if tag[0] == "B" else start
        if tag != "O" and after[0] != "I":
            yield tag[2:] or "ENTITY", start, i + 1
