"""Predicted labels of new texts: spans of a tagger, one label per text of a classifier.

Shapes: B rows, T tokens per row, W words (or 1 text), C labels.
"""

from __future__ import annotations

import logging
import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxgpt.batch import Batch
from jaxgpt.config import Classifier, Compute, Labelled, Tagged
from jaxgpt.data.loader import ValidationBatches
from jaxgpt.data.packing import Item, PackedExamples
from jaxgpt.data.readers.labelled import LabelledText, encode_labelled
from jaxgpt.data.readers.tagging import TaggedSentence, align, asked_token, to_bio
from jaxgpt.errors import NotFinite, UserError, require
from jaxgpt.evals.loss import fetch_behind
from jaxgpt.evals.scoring import progress
from jaxgpt.evals.temperature import sharpened, temperature_of
from jaxgpt.models import abstract_model, assemble
from jaxgpt.sample.load import Trained
from jaxgpt.sharding import row_shards
from jaxgpt.target import Target

log = logging.getLogger(__name__)

BATCH = 32
"""Rows at a time, unless asked otherwise."""


@dataclass(frozen=True)
class Word:
    """A word of a text and its predicted tag.

    Attributes:
      start, end: its characters are `text[start:end]`.
      tag: BIO tag, such as `B-PER`.
      score: probability of the tag.
    """

    start: int
    end: int
    tag: str
    score: float


@dataclass(frozen=True)
class Span:
    """A labelled part of a text, as conlleval reads the tags of its words.

    Attributes:
      start, end: its characters are `text[start:end]` of the text that was given.
      label: type of entity, such as `PER`; empty where entities have no type.
      score: probability that all of its words have these tags: the product over the words.
      text: its characters.
    """

    start: int
    end: int
    label: str
    score: float
    text: str


@dataclass(frozen=True)
class Label:
    """The likeliest label of a text, its probability, and those of all labels."""

    label: str
    score: float
    scores: dict[str, float]


def predict(
    trained: Trained, texts: Sequence[str | Sequence[str]], batch_size: int = BATCH
) -> list[list[Span]] | list[Label]:
    """The spans in each text by a tagger, or the label of each text by a classifier.

    Args:
      trained: a run of a Classifier.
      texts: of a tagger: texts, or lists of words, whose text is the words with `data.joiner` between them.
        Of a classifier: texts, or pairs of texts where it was trained on pairs.
      batch_size: rows at a time.

    Raises:
      UserError: the run tells no labels apart, or a text is not what it reads.
      NotFinite: the logits of labels are not finite.
    """
    _, data = labelling(trained)
    if isinstance(data, Labelled):
        return classify(trained, texts, batch_size)
    written = [text if isinstance(text, str) else data.joiner.join(text) for text in texts]
    return [spans_of(t, words) for t, words in zip(written, tag(trained, texts, batch_size), strict=True)]


def labelling(trained: Trained) -> tuple[Classifier, Tagged | Labelled]:
    """The model and the data of a run that tells labels apart; `UserError` of another."""
    task, data = trained.run.task, trained.run.data
    if task is None or not isinstance(data, Tagged | Labelled):
        raise UserError(f"{trained.folder} tells no labels apart; give the run of a Classifier.")
    return task, data


# ------------------------------------------------------------------------------------------ taggers


def tag(
    trained: Trained, texts: Sequence[str | Sequence[str]], batch_size: int = BATCH, about: str = ""
) -> list[list[Word]]:
    """Every word of each text with its tag; see `predict`. `about` is for the progress line."""
    task, data = labelling(trained)
    assert isinstance(data, Tagged)
    places = [
        word_places(text, data.joiner) if isinstance(text, str) else joined_places(text, data.joiner)
        for text in texts
    ]
    at, sentences = asked_token(data, task), list[list[str]]()
    for text, found in zip(texts, places, strict=True):
        sentences.append([text[a:b] for a, b in found] if isinstance(text, str) else list(text))
    _tell_long_words(trained, sentences, data.joiner)
    groups = [
        align(_untagged(words, task), trained.tokenizer, task.labels, trained.run.length, data.joiner, at)
        for words in sentences
    ]
    flat = [item for group in groups for item in group]
    made = iter(probabilities(trained, flat, batch_size, about, temperature_of(trained)))
    tagged: list[list[Word]] = []
    for found, group in zip(places, groups, strict=True):
        rows = [p_C for _ in group for p_C in next(made)]
        tagged.append(tagged_words(found, rows, task.labels))
    return tagged


def _untagged(words: Sequence[str], task: Classifier) -> TaggedSentence:
    return TaggedSentence(tuple(words), (task.labels[0],) * len(words))


def _tell_long_words(trained: Trained, sentences: Iterable[Sequence[str]], joiner: str) -> None:
    room = trained.run.length - 2
    # a token has a byte or more, so few words need a look
    long = [w for words in sentences for w in words if len(w.encode("utf-8", "replace")) + len(joiner) > room]
    cut = sum(len(ids) > room for ids in trained.tokenizer.encode_batch([joiner + w for w in long]))
    if cut:
        log.warning("%d words have more than %d tokens each; what is beyond them is not read", cut, room)


def tagged_words(
    places: Sequence[tuple[int, int]], rows: Sequence[np.ndarray], labels: Sequence[str]
) -> list[Word]:
    """Words at these characters with the likeliest tag by each row of probabilities [C]."""
    best = [int(p_C.argmax()) for p_C in rows]
    return [
        Word(start, end, labels[i], float(p_C[i]))
        for (start, end), i, p_C in zip(places, best, rows, strict=True)
    ]


def spans_of(text: str, words: Sequence[Word]) -> list[Span]:
    """The entities of a text's tagged words, in order."""
    groups: list[tuple[str, list[Word]]] = []
    for word, bio in zip(words, to_bio([word.tag for word in words], "bio"), strict=True):
        if bio[0] == "B":
            groups.append((bio[2:], []))
        if bio != "O":
            groups[-1][1].append(word)
    made = []
    for label, inside in groups:
        start, end = inside[0].start, inside[-1].end
        made.append(Span(start, end, label, math.prod(w.score for w in inside), text[start:end]))
    return made


def joined_places(words: Iterable[str], joiner: str) -> list[tuple[int, int]]:
    """Where each word stands in `joiner.join(words)`."""
    at, made = 0, []
    for word in words:
        made.append((at, at + len(word)))
        at += len(word) + len(joiner)
    return made


def word_places(text: str, joiner: str) -> list[tuple[int, int]]:
    """Where the words of a text stand, as a tagger's column files would have them.

    With an empty joiner every character that is not blank is a word. Else words stand between blanks, and
    marks at their edges are words of their own, but for the last dot of `U.S.`; so is an English `'s`.
    """
    if not joiner:
        return [(m.start(), m.end()) for m in re.finditer(r"\S", text)]
    return [place for m in re.finditer(r"\S+", text) for place in _split_marks(m[0], m.start())]


def _split_marks(word: str, at: int) -> list[tuple[int, int]]:
    """The places of a word and of the marks around it; `at` is where it begins."""
    marks = [unicodedata.category(c)[0] in "PS" for c in word]
    if all(marks):
        return [(at + i, at + i + 1) for i in range(len(word))]
    first, last = marks.index(False), len(word) - marks[::-1].index(False)
    if word[last : last + 1] == "." and "." in word[first:last]:
        last += 1
    inner = [(first, last)]
    if last - first > 2 and word[last - 2 : last].lower() in ("'s", "’s"):
        inner = [(first, last - 2), (last - 2, last)]
    edges = [(i, i + 1) for i in range(first)], [(i, i + 1) for i in range(last, len(word))]
    return [(at + a, at + b) for a, b in (*edges[0], *inner, *edges[1])]


def tagging_record(text: str, words: Sequence[Word], gold: Sequence[str] | None = None) -> dict[str, Any]:
    """What was predicted of a text, as JSON: `spans`, and the tag and score of each word."""
    found: dict[str, Any] = {"text": text, "spans": [vars(span) for span in spans_of(text, words)]}
    found["words"] = [text[word.start : word.end] for word in words]
    found |= {"tags": [word.tag for word in words], "scores": [word.score for word in words]}
    return found if gold is None else found | {"gold": list(gold)}


# -------------------------------------------------------------------------------------- classifiers


def classify(
    trained: Trained, texts: Sequence[str | Sequence[str]], batch_size: int = BATCH, about: str = ""
) -> list[Label]:
    """The label of each text or pair; see `predict`. What is beyond the model's length is cut, and said."""
    task, data = labelling(trained)
    assert isinstance(data, Labelled) and task.pool != "token"
    items = []
    for number, text in enumerate(texts):
        pair = (text, None) if isinstance(text, str) else tuple(text)
        require(
            len(pair) == 2 and (pair[1] is not None) == bool(data.pair),
            f"text {number} is {'one text' if isinstance(text, str) else f'{len(pair)} texts'}; "
            f"this classifier reads {'pairs of texts' if data.pair else 'one text at a time'}.",
        )
        example = LabelledText(cast(str, pair[0]), pair[1], task.labels[0])
        items.append(encode_labelled(example, trained.tokenizer, task.labels, trained.run.length, task.pool))
    full = [i for i, item in enumerate(items) if len(item.tokens) == trained.run.length]
    cut = sum(_tokens(trained, texts[i]) > trained.run.length for i in full)
    if cut:
        log.warning(
            "%d of %d texts are longer than %d tokens; their ends are not read",
            cut, len(texts), trained.run.length,
        )  # fmt: skip
    found = probabilities(trained, items, batch_size, about, temperature_of(trained))
    return [label_of(rows[0], task.labels) for rows in found]


def _tokens(trained: Trained, text: str | Sequence[str]) -> int:
    """Number of tokens of a text or pair with its control tokens, uncut."""
    parts = [text] if isinstance(text, str) else text
    return 1 + sum(len(trained.tokenizer.encode(part)) + 1 for part in parts)


def label_of(p_C: np.ndarray, labels: Sequence[str]) -> Label:
    """The likeliest of the labels by their probabilities."""
    best = int(p_C.argmax())
    return Label(labels[best], float(p_C[best]), dict(zip(labels, map(float, p_C), strict=True)))


def label_record(text: str, pair: str | None, found: Label, gold: str | None = None) -> dict[str, Any]:
    """What was predicted of a text or pair, as JSON."""
    given = {"text": text} if pair is None else {"text": text, "pair": pair}
    return given | vars(found) | ({} if gold is None else {"gold": gold})


# ---------------------------------------------------------------------------------------- the model


def ensemble(trained: Trained, others: Sequence[Trained]) -> Trained:
    """A run together with others, whose probabilities of labels are averaged with its own.

    Raises:
      UserError: they do not tell the same labels apart, or read other tokens.
    """
    task, data = labelling(trained)
    for other in others:
        own, read = labelling(other)
        require(
            (own.labels, own.pool) == (task.labels, task.pool) and type(read) is type(data),
            f"{other.folder} labels {own.pool} with {own.labels}, {trained.folder} {task.pool} with "
            f"{task.labels}; "
            "name runs of one task.",
        )
        require(
            other.tokenizer.digest == trained.tokenizer.digest,
            f"{other.folder} has another tokenizer than {trained.folder}; name runs with one.",
        )
    return trained._replace(others=tuple(others))


def probabilities(
    trained: Trained,
    items: Sequence[Item],
    batch_size: int = BATCH,
    about: str = "",
    temperature: float = 1.0,
) -> list[np.ndarray]:
    """Float32 probabilities [W, C] of the labels at the W weighted tokens of each item, in order; of an
    ensemble their means.

    Items are packed into rows as in training, which changes no prediction: documents do not see
    each other.

    Args:
      trained: a run of a Classifier.
      items: of encoded texts.
      batch_size: rows at a time.
      about: what the progress line says; nothing for none.
      temperature: divides the logits; see `temperature_of`.
    """
    if not items:
        return []
    if trained.others:
        members = trained._replace(others=()), *trained.others
        made = [probabilities(one, items, batch_size, about, temperature) for one in members]
        return [np.mean(parts, axis=0) for parts in zip(*made, strict=True)]
    run, mesh = trained.run, trained.mesh
    pad = trained.tokenizer.control["<|pad|>"]
    rows = PackedExamples(items, run.length, cast(Any, run.data).bins, None, pad)
    batch_size = min(batch_size, 1 << (len(rows) - 1).bit_length())  # a few texts fill no whole batch
    batch_size += -batch_size % row_shards(mesh)
    static = (run.model, replace(run.compute, remat="none"), Target.of(mesh))
    batches = ValidationBatches(rows, batch_size)
    found, order = [np.zeros(0)] * len(items), iter(rows.order)
    with jax.set_mesh(mesh):
        running = (_probabilities(*static, trained.params, b) for b in progress(batches, about))
        for p_BTC in fetch_behind(running):
            for p_TC, numbers in zip(p_BTC, order, strict=False):  # rows behind the last hold nothing
                at = 0
                for number in numbers:
                    weights = np.asarray(items[number].weights)
                    own_WC = p_TC[at : at + len(weights)][weights > 0]
                    found[number] = own_WC if temperature == 1 else sharpened(own_WC, temperature)
                    at += len(weights)
                    if not np.isfinite(found[number]).all():
                        raise NotFinite("logits of labels are")
    return found


@partial(jax.jit, static_argnums=(0, 1, 2))
def _probabilities(model: Classifier, compute: Compute, target: Target, params: dict, batch: Batch) -> Any:
    module: Any = assemble(abstract_model(model, compute, target)[0], params)
    logits_BTC = module.logits(module.hidden(batch).x_BTD)
    finite_BT1 = jnp.isfinite(logits_BTC).all(-1, keepdims=True)  # -inf alone would be a probability of 0
    p_BTC = jnp.where(finite_BT1, jax.nn.softmax(logits_BTC, axis=-1), jnp.nan)
    return jax.lax.with_sharding_constraint(p_BTC, P())  # for every process
