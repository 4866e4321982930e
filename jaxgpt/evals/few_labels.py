"""Learning with few labels: which texts a model may label itself, and which a person should.

A record is what `jaxgpt predict` says of a text: `score` or `scores`, and of a tagger `tags`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxgpt.config import Labelled, Tagged
from jaxgpt.data.readers.labelled import read_labelled
from jaxgpt.data.readers.tagging import DOCUMENT, read_conll
from jaxgpt.errors import UserError, require, require_known

By = Literal["entropy", "margin", "least-confidence"]
"""How uncertain a prediction is (Settles 2009, section 3.1)."""
Record = dict[str, Any]


def confidence(record: Record) -> float:
    """Probability of a text's label; of a sentence, the lowest of its tags."""
    return min(record["scores"], default=0.0) if "tags" in record else record["score"]


def uncertainty(record: Record, by: By) -> float:
    """How uncertain a prediction is; larger is less certain.

    Of a sentence the least certain word counts, whose other tags' probabilities are not known.

    Raises:
      UserError: a measure that needs them.
    """
    if by == "least-confidence":
        return 1 - confidence(record)
    if "tags" in record:
        raise UserError(
            f"--by is {by!r}, which needs probabilities of all tags; use least-confidence for a tagger."
        )
    p = sorted(record["scores"].values(), reverse=True)
    if by == "margin":
        return 1 - (p[0] - p[1]) if len(p) > 1 else 0.0
    return -sum(x * math.log(x) for x in p if x > 0)


class Taken(NamedTuple):
    """Which texts were taken, and why the others were not.

    Attributes:
      places: of those taken, in the order of the file.
      counts: of each label (of a sentence's tags: none) among them.
      unsure, known, repeated, over: how many were below the confidence, are in the run's own files, stand in
        the file more than once, or are more than was asked for.
    """

    places: list[int]
    counts: Counter[str]
    unsure: int
    known: int
    repeated: int
    over: int


def take_confident(
    keys: Sequence[str],
    records: Sequence[Record],
    above: float,
    most: int,
    balance: bool,
    known: Collection[str],
) -> Taken:
    """The texts that a model is sure of, the surest first where there are more than wanted.

    Args:
      keys: of each text, what tells it from others.
      records: what was predicted of each.
      above: least confidence.
      most: most texts to take; 0 means all.
      balance: take as many of each label, as many as the rarest has (of texts that are sure enough).
      known: keys of texts that have labels already.

    Raises:
      UserError: fewer texts are wanted than there are labels to balance.
    """
    seen, sure = set[str](), list[int]()
    repeated = unsure = own = 0
    for i, key in enumerate(keys):
        if key in known:
            own += 1
        elif key in seen:
            repeated += 1
        elif not key or confidence(records[i]) < above:  # a sentence without a word teaches nothing
            unsure += 1
        else:
            sure.append(i)
        seen.add(key)
    sure.sort(key=lambda i: -confidence(records[i]))
    kept = sure
    if balance:
        by_label: dict[str, list[int]] = {}
        for i in sure:
            by_label.setdefault(_label(records[i]), []).append(i)
        few = 0 < most < len(by_label)
        require(
            not few,
            f"--most is {most}, fewer than the {len(by_label)} labels to balance; raise it.",
        )
        least = min(map(len, by_label.values()), default=0)
        least = min(least, most // len(by_label)) if most and by_label else least
        kept = [i for members in by_label.values() for i in members[:least]]
    kept = kept[: most or None]
    counts = Counter(_label(records[i]) for i in kept if "label" in records[i])
    return Taken(sorted(kept), counts, unsure, own, repeated, len(sure) - len(kept))


def _label(record: Record) -> str:
    return record.get("label", "")


def most_uncertain(
    keys: Sequence[str],
    records: Sequence[Record],
    by: By,
    count: int,
    known: Collection[str],
    features: Callable[[list[int]], np.ndarray] | None = None,
    pool: int = 10,
) -> list[int]:
    """Places of the texts that a model is least certain of, the least certain first.

    Args:
      keys, records, known: as for `take_confident`.
      by: the measure.
      count: how many.
      features: from places to vectors [N, D]: of the `pool` times as many least certain texts, those are
        chosen that lie far from each other (greedy k-centre: Sener and Savarese 2018, algorithm 1).
      pool: see features.
    """
    first = dict(reversed([(key, i) for i, key in enumerate(keys) if key and key not in known]))
    free = sorted(first.values())
    free.sort(key=lambda i: -uncertainty(records[i], by))
    if features is None or len(free) <= count:
        return free[:count]
    candidates = free[: pool * count]
    x_ND = features(candidates).astype(np.float64)
    x_ND /= np.maximum(np.linalg.norm(x_ND, axis=1, keepdims=True), 1e-12)
    chosen, distance_N = [0], np.full(len(candidates), np.inf)
    while len(chosen) < count:
        distance_N = np.minimum(distance_N, 1 - x_ND @ x_ND[chosen[-1]])
        distance_N[chosen] = -1
        chosen.append(int(distance_N.argmax()))
    return [candidates[i] for i in chosen]


def key_of(text: str | Sequence[str], joiner: str = " \0 ") -> str:
    """What tells a text, its words or a pair from others."""
    return " ".join((text if isinstance(text, str) else joiner.join(text)).split())


def known_texts(data: Labelled | Tagged) -> set[str]:
    """Keys of the texts in a run's own files, of every split."""
    files = dict.fromkeys((*data.train, *data.validation, *data.test))
    if isinstance(data, Tagged):
        return {key_of(sentence.words, data.joiner) for sentence in read_conll(files)}
    examples = read_labelled(files, data.text, data.pair, data.label)
    return {key_of(e.text if e.pair is None else (e.text, e.pair)) for e in examples}


def written(
    data: Labelled,
    texts: Sequence[str | Sequence[str]],
    records: Sequence[Record],
    ending: str,
    source: str = "",
    own: Sequence[Record] = (),
) -> tuple[list[Record], list[str]]:
    """What a next run reads: records of JSON lines, or lines of a table.

    Args:
      data: of the run, whose fields are used.
      texts: of each record: a text or a pair.
      records: what was predicted.
      ending: of the file: `.jsonl` or `.tsv`.
      source: which model gives the labels. Empty where a person is to fill them in: they are left empty,
        and what was predicted stands beside.
      own: what JSON lines keep of each text's own record.
    """
    require_known(ending, (".jsonl", ".tsv"), f"--out ends in {ending!r}")
    made = []
    for i, (text, record) in enumerate(zip(texts, records, strict=True)):
        parts = (
            {data.text: text}
            if isinstance(text, str)
            else dict(zip((data.text, data.pair), text, strict=True))
        )
        parts |= {data.label: record["label"] if source else ""}
        more = {"source": source} if source else {"predicted": record["label"]}
        more |= {"confidence": round(confidence(record), 6)}
        if own and ending == ".jsonl":
            more = own[i] | more
        made.append(parts | {name: value for name, value in more.items() if name not in parts})
    if ending == ".jsonl":
        return made, []
    for record in made:
        bad = [name for name, value in record.items() if set(str(value)) & set("\t\r\n")]
        require(
            not bad, f"field {''.join(bad[:1])!r} holds a tab or a line's end; write JSON lines (.jsonl)."
        )
    names = list(made[0])
    return [], ["\t".join(names), *("\t".join(str(record[name]) for name in names) for record in made)]


def column_lines(records: Sequence[Record], texts: Sequence[Sequence[str]]) -> list[str]:
    """Sentences of a tagger as column files hold them: a word and its tag per line.

    Raises:
      UserError: a word that such a file cannot hold.
    """
    lines = []
    for words, record in zip(texts, records, strict=True):
        bad = [word for word in words if set(word) & set("\t\r\n") or word == DOCUMENT]
        require(
            not bad, f"word {bad[:1]} has no place in a column file; leave its sentence out of the input."
        )
        lines += [f"{word}\t{tag}" for word, tag in zip(words, record["tags"], strict=True)]
        lines.append("")
    return lines
