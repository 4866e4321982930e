"""Dialogues as tokens: one template, one loss mask.

Template: `<|bos|>`, then each turn as `<|role|> content <|end|>`, where the four names are control
tokens and the content is encoded by itself, so that no content can write a control token. The loss
weight is 1 on the content of every assistant turn and on the `<|end|>` that closes it (a model not
trained on it never stops), 0 on everything else. A tokenizer with a chat template of its own (Hugging
Face's) is used with that one: see chat_template.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxgpt.errors import require, require_known
from jaxgpt.text.chat_template import ROLES
from jaxgpt.text.tokenizer import Tokenizer

Dialogue = list[dict[str, str]]
"""Turns in order, each with `role` (one of `ROLES`) and `content`."""


@dataclass(frozen=True)
class Example:
    """A rendered dialogue: `weights[i]` is 1 where token i is learned, 0 where it is given."""

    tokens: list[int]
    weights: list[float]


def render(messages: Sequence[dict[str, str]], tokenizer: Tokenizer) -> Example:
    """The tokens and weights of a whole dialogue.

    Raises:
      UserError: a role that is not one of `ROLES`, or what the tokenizer's own template refuses.
    """
    if tokenizer.template is not None:
        return Example(*tokenizer.template.example(messages))
    control = tokenizer.control
    require(
        "<|user|>" in control,
        "this tokenizer has no chat template, so it cannot write dialogues; add a chat_template.jinja to "
        "its folder.",
    )
    tokens, weights = [control["<|bos|>"]], [0.0]
    for message in messages:
        role = message["role"]
        require_known(role, ROLES, f"role {role!r} is unknown")
        content = tokenizer.encode(message["content"])
        tokens += [control[f"<|{role}|>"], *content, control["<|end|>"]]
        weights += [0.0] + [float(role == "assistant")] * (len(content) + 1)
    return Example(tokens, weights)


def prompt_ids(messages: Sequence[dict[str, str]], tokenizer: Tokenizer) -> list[int]:
    """The tokens after which the assistant's next answer begins.

    A strict prefix of what `render` gives for the same messages followed by that answer, as far as a
    template of the tokenizer's own allows.
    """
    if tokenizer.template is not None:
        return tokenizer.template.prompt_ids(messages)
    return [*render(messages, tokenizer).tokens, tokenizer.control["<|assistant|>"]]


def prefix_length(messages: Sequence[dict[str, str]], tokenizer: Tokenizer) -> int:
    """How many tokens of `prompt_ids` come before the first answer in it; all, where there is none.

    These are what a prefix LM (`GPT.prefix`) saw both ways in training, where a document's prefix ends
    with its first trained token: an earlier answer was seen causally there, as what follows it.

    Raises:
      UserError: the tokenizer's own template does not let the answers be told apart.
    """
    ids = prompt_ids(messages, tokenizer)
    if not any(message["role"] == "assistant" for message in messages):
        return len(ids)
    # A template may write earlier answers otherwise, and untrained, once another follows.
    weights = render([*messages, {"role": "assistant", "content": "answer"}], tokenizer).weights
    return min(weights.index(1.0), len(ids))


def truncate(example: Example, length: int) -> Example | None:
    """The example cut to `length` + 1 tokens (`length` inputs); None if nothing trained is left."""
    cut = Example(example.tokens[: length + 1], example.weights[: length + 1])
    return cut if any(cut.weights) else None
