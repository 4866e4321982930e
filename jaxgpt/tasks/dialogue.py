"""Dialogue of one or several turns, in every layout that `Chat` reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxgpt.config.tasks import Sample, Task
from jaxgpt.data.readers.dialogues import KNOWN, shape_of, to_dialogue
from jaxgpt.data.readers.tasks import Noted
from jaxgpt.errors import require


@dataclass(frozen=True, kw_only=True)
class Dialogue(Task):
    """Dialogues: all answers are learned; the last one is asked for in evaluation, after the turns before."""

    prompts: tuple[str, ...] = ("{message}",)
    held_out: str = "{message}"
    metrics: tuple[str, ...] = ("perplexity", "rougeL", "distinct2", "self_repetition")
    max_new_tokens: int = 256
    prompt: str = ""
    """Field of what is given (a path such as `a.b[0].c` reaches into objects and lists), where it is not one
    of the usual names; goes with completion."""
    completion: str = ""
    """Field of the answer; goes with prompt."""

    names: ClassVar[tuple[str, ...]] = ("message",)
    disturbed: ClassVar[tuple[str, ...]] = ("message",)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            bool(self.prompt) == bool(self.completion),
            f"data.prompt is {self.prompt!r} and data.completion {self.completion!r}; name both or neither.",
        )

    @property
    def wanted(self) -> str:
        return f"fields {self.prompt} and {self.completion}" if self.prompt else f"known shape ({KNOWN})"

    def samples(self, record: Any) -> Iterator[Sample]:
        shape = shape_of(record, self.prompt, self.completion)
        if shape is None:
            raise ValueError(f"it has no {self.wanted}")
        turns, unread = to_dialogue(record, shape)
        last = next((i for i in reversed(range(1, len(turns))) if _is_answer(turns[i - 1], turns[i])), 0)
        if not last:
            raise ValueError("no turn of a user is answered in text that is to be trained")
        if isinstance(record, Noted):
            later = [f"{len(turns) - last - 1} turns after the last answer"] * (last + 1 < len(turns))
            record.leave([*unread, *later])
        given, answer = turns[last - 1], turns[last]
        yield Sample({"message": given["content"]}, (answer["content"],), tuple(turns[: last - 1]))


def _is_answer(before: dict[str, Any], turn: dict[str, Any]) -> bool:
    """Whether a turn is an answer in text alone to a user's, and is to be trained."""
    plain = turn["role"] == "assistant" and turn.keys() <= {"role", "content"}
    return plain and before["role"] == "user" and before.keys() <= {"role", "content"}
