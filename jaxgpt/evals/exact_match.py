"""Exact match: the share of prompts whose greedy answer is the expected one, to the letter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jaxgpt.errors import NotFinite
from jaxgpt.sample.generate import Generator
from jaxgpt.sample.settings import Sampling


@dataclass(frozen=True)
class Answer:
    """One prompt, what was expected and what came.

    Attributes:
      example: the dialogue, its last message being the expected answer.
      text: the model's answer.
      correct: whether they are the same.
    """

    example: dict[str, Any]
    text: str
    correct: bool


def exact_match(
    generator: Generator,
    examples: Sequence[dict[str, Any]],
    is_correct: Callable[[dict[str, Any], str], bool],
    *,
    max_new_tokens: int = 32,
    batch_size: int = 64,
) -> list[Answer]:
    """Answer every dialogue greedily, its last message left out.

    Args:
      generator: the model.
      examples: dialogues as `{"messages": [...]}`, ending in the expected answer.
      is_correct: compares an example with an answer.
      max_new_tokens: an answer is cut there.
      batch_size: answers made at a time.
    """
    answers = []
    for start in range(0, len(examples), batch_size):
        part = examples[start : start + batch_size]
        asked = generator.dialogues([e["messages"][:-1] for e in part])
        made = generator.generate(decoding=Sampling(temperature=0.0), max_new_tokens=max_new_tokens, **asked)
        if any(completion.finish_reason == "error" for completion in made):
            raise NotFinite("logits in an answer are")
        answers += [
            Answer(example, completion.text, is_correct(example, completion.text))
            for example, completion in zip(part, made, strict=True)
        ]
    return answers


def share(answers: Sequence[Answer]) -> float:
    """Share of correct answers."""
    return sum(answer.correct for answer in answers) / max(1, len(answers))
