"""Dialogues as tokens: one template, one loss mask, one rendering of a prompt.

Template: `<|bos|>`, then each turn as `<|role|> content <|end|>`, where the four names are control
tokens and the content is encoded by itself, so that no content can write a control token. The loss
weight is 1 on the content of every assistant turn and on the `<|end|>` that closes it (a model not
trained on it never stops), 0 on everything else, and on turns with `learn: False`. A tokenizer with a
chat template of its own (Hugging Face's) is used with that one: see chat_template.py.

A prompt goes through `prompt_text` wherever it comes from: training, sampling, chat and evaluation.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxgpt.errors import UserError, require, require_known
from jaxgpt.text.chat_template import MARK, OWN_KEYS
from jaxgpt.text.tokenizer import Tokenizer, text_ids

Dialogue = list[dict[str, Any]]
"""Turns in order. Each has `role` (one of `chat_template.ROLES`) and `content`; `learn: False` where an
assistant's is not trained; and what its template may know beside these, such as `tool_calls`."""
_ROLES = ("system", "user", "assistant")
_OWN = "this tokenizer has no chat template, and jaxgpt's own"


@dataclass(frozen=True)
class Example:
    """A rendered dialogue: `weights[i]` is 1 where token i is learned, 0 where it is given."""

    tokens: list[int]
    weights: list[float]


def render(messages: Sequence[dict[str, Any]], tokenizer: Tokenizer) -> Example:
    """The tokens and weights of a whole dialogue.

    Raises:
      UserError: a role or a part of a turn that the template does not know, or what it refuses.
    """
    if tokenizer.template is not None:
        return Example(*tokenizer.template.example(messages))
    tokens, weights = list[int](), list[float]()
    for text, is_control, weight in _parts(messages, tokenizer):
        ids = [tokenizer.control[text]] if is_control else tokenizer.encode(text)
        tokens += ids
        weights += [weight] * len(ids)
    return Example(tokens, weights)


def _parts(messages: Sequence[dict[str, Any]], tokenizer: Tokenizer) -> list[tuple[str, bool, float]]:
    """A dialogue as texts and names of control tokens, and their weights."""
    require(
        "<|user|>" in tokenizer.control,
        "this tokenizer has no chat template, so it cannot write dialogues; add a chat_template.jinja to "
        "its folder.",
    )
    parts = [("<|bos|>", True, 0.0)]
    for message in messages:
        role = message["role"]
        require(role != "tool", f"{_OWN} has no turns of tools; leave these dialogues out.")
        require_known(role, _ROLES, f"role {role!r} is unknown")
        ignored = [key for key in message.keys() - OWN_KEYS if message[key]]
        require(not ignored, f"{_OWN} writes no {', '.join(sorted(ignored))}; remove that from the dialogue.")
        weight = float(role == "assistant" and message.get("learn", True))
        parts += [(f"<|{role}|>", True, 0.0), (message["content"], False, weight), ("<|end|>", True, weight)]
    return parts


def render_plain(messages: Dialogue, tokenizer: Tokenizer) -> Example:
    """The tokens and weights of a prompt and its completion as plain text, without a template.

    `<|bos|>`, the prompt, the completion, `<|eos|>`; the last two are trained. A model is asked with
    `text_ids(tokenizer, prompt, bos=True)`, the same tokens: none reaches over the border, and all together
    are the two texts joined, white space as it stands in them.

    Raises:
      UserError: the dialogue is no such pair, or the tokenizer cannot write the completion by itself.
    """
    roles = [message["role"] for message in messages]
    require(
        roles == ["user", "assistant"] and all(m.keys() == {"role", "content"} for m in messages),
        f"data.template is 'none', which writes a prompt and its completion alone, but the turns are: "
        f"{', '.join(roles)}; set it to 'auto' or write all that is given into the prompt.",
    )
    prompt, completion = (message["content"] for message in messages)
    given = text_ids(tokenizer, prompt, bos=True)
    learned = [*_continuation(completion, given, tokenizer), tokenizer.control["<|eos|>"]]
    return Example([*given, *learned], [0.0] * len(given) + [1.0] * len(learned))


def _continuation(text: str, given: list[int], tokenizer: Tokenizer) -> list[int]:
    """The ids that add a text to the ids before it, as it stands or else as the tokenizer changes it."""
    for said in (text, tokenizer.decode(tokenizer.encode(text))):
        for before in ("", "\n", "."):  # some tokenizers put a space before a text, but not inside one
            head, ids = tokenizer.encode(before) if before else [], tokenizer.encode(before + text)
            if ids[: len(head)] == head and tokenizer.decode(ids[len(head) :], given) == said:
                return ids[len(head) :]
    raise UserError(
        f"this tokenizer cannot write {text[:40]!r} behind another text; use data.template='auto'."
    )


def prompt_ids(
    messages: Sequence[dict[str, Any]], tokenizer: Tokenizer, tools: list[dict[str, Any]] | None = None
) -> list[int]:
    """The tokens after which the assistant's next answer begins.

    A strict prefix of what `render` gives for the same messages followed by that answer, as far as a
    template of the tokenizer's own allows.

    Args:
      messages: turns.
      tokenizer: writes them.
      tools: that the model may call, as OpenAI writes them; for a template that `takes_tools`.

    Raises:
      UserError: as `render`.
    """
    return written_ids(prompt_text(messages, tokenizer, tools=tools), tokenizer)


def prompt_text(
    messages: Sequence[dict[str, Any]],
    tokenizer: Tokenizer,
    unfinished: bool = False,
    tools: list[dict[str, Any]] | None = None,
) -> str:
    """The prompt as a text that begins with `MARK`; `written_ids` has its tokens.

    Args:
      messages: turns.
      tokenizer: writes them.
      unfinished: the last turn goes on, rather than that an answer begins.
      tools: see `prompt_ids`.
    """
    if tokenizer.template is not None:
        own = tokenizer.template
        return MARK + (own.unfinished(messages) if unfinished else own.prompt(messages, tools))
    require(not tools, f"{_OWN} writes no tools; write them into a turn.")
    parts = _parts(messages, tokenizer)
    parts = parts[:-1] if unfinished else [*parts, ("<|assistant|>", True, 0.0)]
    return "".join(
        f"{MARK}{text}{MARK}" if is_control else quoted(text, tokenizer) for text, is_control, _ in parts
    )


def quoted(text: str, tokenizer: Tokenizer) -> str:
    """A text that may follow one of `prompt_text`: nothing in it becomes a control token."""
    if tokenizer.template is not None:
        return tokenizer.template.guarded(text)
    return text.replace(MARK, MARK + MARK)


def written_ids(text: str, tokenizer: Tokenizer) -> list[int]:
    """The tokens of a text of `prompt_text`, followed by nothing but `quoted` texts."""
    if tokenizer.template is not None:
        return tokenizer.template.ids(text.removeprefix(MARK))
    ids, plain = list[int](), ""
    for i, part in enumerate(re.split(f"{MARK}([^{MARK}]*){MARK}", text)):
        if i % 2 and part:
            ids += [*tokenizer.encode(plain), tokenizer.control[part]]
            plain = ""
        else:
            plain += MARK if i % 2 else part
    return ids + tokenizer.encode(plain)


def prefix_length(messages: Sequence[dict[str, Any]], tokenizer: Tokenizer) -> int:
    """How many tokens of `prompt_ids` come before the first answer in it; all, where there is none.

    These are what a prefix LM (`GPT.prefix`) saw both ways in training, where a document's prefix ends
    with its first trained token: an earlier answer was seen causally there, as what follows it.

    Raises:
      UserError: the tokenizer's own template does not let the answers be distinguished.
    """
    ids = prompt_ids(messages, tokenizer)
    if not any(message["role"] == "assistant" for message in messages):
        return len(ids)
    # Another answer, since a template may write earlier ones otherwise once another follows.
    weights = render([*messages, {"role": "assistant", "content": "answer"}], tokenizer).weights
    return min(weights.index(1.0), len(ids))


def truncate(example: Example, length: int) -> Example | None:
    """The example cut to `length` + 1 tokens (`length` inputs); None if nothing trained is left."""
    cut = Example(example.tokens[: length + 1], example.weights[: length + 1])
    return cut if any(cut.weights) else None
