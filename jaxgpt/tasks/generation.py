"""Open generation: a text is continued, or written from a prompt."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from jaxgpt.config.bounds import Bounds
from jaxgpt.config.decoding import Decoding, Sampling
from jaxgpt.config.tasks import Sample, Task
from jaxgpt.errors import require
from jaxgpt.tasks.fields import first_words, text_at, words

NUCLEUS = Sampling(temperature=0.8, top_p=0.95)


@dataclass(frozen=True, kw_only=True)
class Generation(Task):
    """Texts whose beginning is given and whose rest is written; or prompts and what was written of them."""

    metrics: tuple[str, ...] = ("perplexity", "distinct1", "distinct2", "self_repetition")
    decoding: Decoding = NUCLEUS
    max_new_tokens: int = 256
    text: str = "text"
    """Field of a whole text, where no prompt is named."""
    given: Annotated[int, Bounds(1, 10_000)] = 32
    """Words of a text that are given, of Chinese characters; of shorter texts at most half."""
    prompt: str = ""
    """Field of what the text is about or begins with; goes with completion."""
    completion: str = ""
    """Field of the text that answers the prompt."""

    names: ClassVar[tuple[str, ...]] = ("beginning",)
    disturbed: ClassVar[tuple[str, ...]] = ("beginning",)
    phrasings: ClassVar = {
        "en": (
            "Continue this text.\n{beginning}",
            "{beginning}\n\nGo on writing.",
            "Write what comes next:\n{beginning}",
        ),
        "zh": ("续写下面的文字。\n{beginning}", "{beginning}\n\n请接着写。", "接下来会怎样？\n{beginning}"),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            bool(self.prompt) == bool(self.completion),
            f"data.prompt is {self.prompt!r} and data.completion {self.completion!r}; name both or neither.",
        )

    def samples(self, record: Any) -> Iterator[Sample]:
        if self.prompt:
            beginning, rest = text_at(record, self.prompt), text_at(record, self.completion)
        else:
            text = text_at(record, self.text)
            count = len(words(text, self.language))
            if count < 2:
                raise ValueError(f"field {self.text!r} is a single word, which has no rest")
            beginning = first_words(text, min(self.given, count // 2), self.language)
            rest = text[len(beginning) :].strip()
        yield Sample({"beginning": beginning}, (rest,))
