"""What may be explained of each kind of model: an answer's token, a masked one, a word's tag, a text's label.

Shapes: T tokens, C outputs that are explained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from jaxgpt.config import Labelled, Tagged
from jaxgpt.data.packing import Item
from jaxgpt.data.readers.labelled import LabelledText, encode_labelled
from jaxgpt.data.readers.tagging import TaggedSentence, align, asked_token
from jaxgpt.errors import UserError, require
from jaxgpt.evals.explain.question import Question, answers
from jaxgpt.evals.predict import labelling, word_places
from jaxgpt.models import context_of
from jaxgpt.sample.load import Trained
from jaxgpt.text.tokenizer import Tokenizer

OUTSIDE = "O"


@dataclass(frozen=True)
class Asked:
    """A question in its text.

    Attributes:
      kind: `answer` (a token that follows others), `masked` (one between others), `tag` or `label`.
      question: the prediction that is explained.
      whole: the same with all that is shown of the text.
      targets_T: the output that is looked for at each token of `whole`: the next token, the one that stands
        there, or the predicted label.
      parts_T: `control`, `prompt` or `answer`.
      places: the tokens of `whole` at which something is predicted, of labels.
      words: what is predicted there.
    """

    kind: Literal["answer", "masked", "tag", "label"]
    question: Question
    whole: Question
    targets_T: list[int]
    parts_T: list[str]
    places: list[int]
    words: list[str]


def token_name(tokenizer: Tokenizer, token: int) -> str:
    """What an id stands for, as text; bytes that are no whole characters as ⟨E4⟩."""
    if token in tokenizer.names:
        return tokenizer.names[token]
    if token >= tokenizer.vocab_size:
        return f"(id {token})"
    piece = tokenizer.piece_bytes(token)
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "".join(f"⟨{byte:02X}⟩" for byte in piece)


def ask_answer(trained: Trained, prompt: Sequence[int], answer: Sequence[int], token: int | None) -> Asked:
    """Why a causal model gives one token of an answer its probability.

    Args:
      trained: the run.
      prompt: ids before the answer; what a prefix LM sees both ways.
      answer: its ids.
      token: which of them, from 0; None means the first.

    Raises:
      UserError: there is no such token, or no room for it.
    """
    at = token or 0
    require(len(prompt) > 0, "the prompt has no token; write at least one character.")
    require(len(answer) > 0, "the answer has no token; write at least one character.")
    require(at < len(answer), f"--token is {at} but the answer has {len(answer)} tokens, counted from 0.")
    ids = (*prompt, *answer)
    _require_room(trained, len(ids))
    fixed = _fixed(trained, ids)
    whole = Question(ids, len(prompt) + at - 1, (answer[at],), fixed, given=len(prompt))
    end = whole.at + 1
    cut = replace(whole, tokens=ids[:end], fixed=fixed[:end])
    parts = ["control" if f else "answer" if i >= len(prompt) else "prompt" for i, f in enumerate(fixed)]
    targets = [*ids[1:], 0]
    places = list(range(len(ids) - 1))
    words = [token_name(trained.tokenizer, i) for i in ids[1:]]
    return Asked("answer", cut, whole, targets, parts, places, words)


def ask_masked(trained: Trained, text: str, token: int | None) -> Asked:
    """Why a masked language model expects one token of a text, which it does not see.

    Args:
      trained: the run.
      text: is read between `<|bos|>` and `<|eos|>`.
      token: which of its tokens, from 0; None means the first.

    Raises:
      UserError: there is no such token, no room for the text, or no token to mask with.
    """
    control, own, at = trained.tokenizer.control, trained.tokenizer.encode(text), token or 0
    mask = _mask(trained)
    if mask is None:
        raise UserError("this tokenizer has no <|mask|>, so no token can be hidden from the model.")
    require(len(own) > 0, "the text has no token; write at least one character.")
    require(at < len(own), f"--token is {at} but the text has {len(own)} tokens, counted from 0.")
    ids = (control["<|bos|>"], *own, control["<|eos|>"])
    _require_room(trained, len(ids))
    seen = (*ids[: at + 1], mask, *ids[at + 2 :])
    question = Question(seen, at + 1, (own[at],), _fixed(trained, seen), mask=mask)
    parts = ["control", *["prompt"] * len(own), "control"]
    words = [token_name(trained.tokenizer, i) for i in own]
    return Asked("masked", question, question, list(ids), parts, list(range(1, len(own) + 1)), words)


def ask_tag(trained: Trained, text: str, word: int | None, labels: int) -> Asked:
    """Why a tagger gives a word its tag.

    Args:
      trained: the run.
      text: is cut into words as by `jaxgpt predict`.
      word: which of them, from 0; None means the first that is tagged as something.
      labels: how many of the likeliest tags are explained.

    Raises:
      UserError: there is no such word, or the text is longer than the model's rows.
    """
    task, data = labelling(trained)
    assert isinstance(data, Tagged)
    words = [text[a:b] for a, b in word_places(text, data.joiner)]
    require(len(words) > 0, "the text has no word; write at least one.")
    sentence = TaggedSentence(tuple(words), (task.labels[0],) * len(words))
    items = align(
        sentence, trained.tokenizer, task.labels, trained.run.length, data.joiner, asked_token(data, task)
    )
    require(
        len(items) == 1,
        f"the text is cut into {len(items)} rows of {trained.run.length} tokens; give one sentence of it.",
    )
    places = [i for i, weight in enumerate(items[0].weights) if weight > 0]
    found = _labels_at(trained, items[0], places)
    if word is None:
        entities = [i for i, made_C in enumerate(found) if task.labels[int(made_C.argmax())] != OUTSIDE]
        word = entities[0] if entities else 0
    require(word < len(words), f"--token is {word} but the text has {len(words)} words, counted from 0.")
    return _label_question(trained, "tag", items[0], places, found, word, labels, words)


def ask_label(trained: Trained, text: str, pair: str, labels: int) -> Asked:
    """Why a classifier gives a text, or a pair of texts, its label; see `ask_tag`.

    Raises:
      UserError: one text for a classifier of pairs, or the other way round.
    """
    task, data = labelling(trained)
    assert isinstance(data, Labelled) and task.pool != "token"
    require(
        bool(pair) == bool(data.pair),
        f"--pair is {pair!r} but this classifier reads {'pairs of texts' if data.pair else 'one text'}.",
    )
    example = LabelledText(text, pair or None, task.labels[0])
    item = encode_labelled(example, trained.tokenizer, task.labels, trained.run.length, task.pool)
    places = [i for i, weight in enumerate(item.weights) if weight > 0]
    found = _labels_at(trained, item, places)
    return _label_question(trained, "label", item, places, found, 0, labels, ["the text"])


def _label_question(
    trained: Trained,
    kind: Literal["tag", "label"],
    item: Item,
    places: list[int],
    found: list[np.ndarray],
    which: int,
    labels: int,
    words: list[str],
) -> Asked:
    likeliest = np.argsort(-found[which], kind="stable")[:labels]
    question = _of_item(trained, item, places[which], tuple(map(int, likeliest)))
    targets = [int(likeliest[0])] * len(item.tokens)
    for place, made_C in zip(places, found, strict=True):
        targets[place] = int(made_C.argmax())
    parts = ["control" if f else "prompt" for f in question.fixed]
    return Asked(kind, question, question, targets, parts, places, words)


def _labels_at(trained: Trained, item: Item, places: list[int]) -> list[np.ndarray]:
    return list(answers(trained, [_of_item(trained, item, place, (0,)) for place in places]))


def _of_item(trained: Trained, item: Item, at: int, outputs: tuple[int, ...]) -> Question:
    types = None if item.types is None else tuple(item.types)
    fixed = _fixed(trained, item.tokens)
    return Question(tuple(item.tokens), at, outputs, fixed, types=types, mask=_mask(trained))


def _fixed(trained: Trained, ids: Sequence[int]) -> tuple[bool, ...]:
    names = trained.tokenizer.names
    return tuple(i in names for i in ids)


def _mask(trained: Trained) -> int | None:
    """The id that stands for a token that is not seen; None where the model never learned one."""
    both_ways = not getattr(trained.run.model, "backbone", trained.run.model).causal
    return trained.tokenizer.control.get("<|mask|>") if both_ways else None


def _require_room(trained: Trained, tokens: int) -> None:
    context = context_of(trained.run.model, trained.params)
    require(
        tokens <= context, f"prompt and answer have {tokens} tokens but the model's context is {context}."
    )
