"""Training a SentencePiece model on texts."""

from __future__ import annotations

import io
import logging
import os
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Literal

from jaxgpt.errors import UserError, require
from jaxgpt.text.tokenizer import CONTROL, SentencePiece

log = logging.getLogger(__name__)

_LINE_BYTES = 4096  # longer lines are cut: SentencePiece would leave them out of training
_COVERAGE = 0.9995  # share of the text whose characters get entries: SentencePiece's own default


def sentences(texts: Iterable[str]) -> Iterator[str]:
    """The lines of the texts, as SentencePiece's trainer takes them.

    It drops a whole sentence that holds a tab or NUL, so those cut a line too; like the newline
    they are always encoded as bytes. A long line is cut before a space.
    """
    for text in texts:
        for line in re.split("[\n\t\0\u2581]+", text):
            while len(line) > _LINE_BYTES // 4:
                cut = line.rfind(" ", 1, _LINE_BYTES // 4)
                cut = cut if cut > 0 else _LINE_BYTES // 4
                yield line[:cut]
                line = line[cut:]
            if line:
                yield line


def train_sentencepiece(
    texts: Iterable[str],
    vocab_size: int,
    model_type: Literal["bpe", "unigram", "char"] = "bpe",
    *,
    max_sentences: int = 2_000_000,
    threads: int | None = None,
) -> SentencePiece:
    """A SentencePiece tokenizer with byte fallback, through which every string round-trips.

    Characters outside the most frequent 99.95 % of the text are left to the byte tokens; a
    vocabulary too small for the rest (Chinese in 2,000 entries, say) leaves more of them. A `char`
    tokenizer leaves only those for which there is no room, and is smaller where there are fewer.

    Args:
      texts: the training text; at most `max_sentences` lines of it are kept in memory.
      vocab_size: entries, the control and byte tokens among them.
      threads: of the unigram trainer; None takes every core.

    Raises:
      UserError: when there is no text, or too little for `vocab_size`.
    """
    least = 1 + len(CONTROL) + 256
    require(
        vocab_size > least,
        f"--vocab-size is {vocab_size}; it must be above {least} (bytes and control tokens alone).",
    )
    kept = _reservoir(sentences(texts), max_sentences)
    require(bool(kept), "the sources hold no text to train a tokenizer on; name files that do.")
    if model_type == "char":
        kept = _cut_at_rare(kept, room=vocab_size - least, coverage=1.0)
    else:
        kept = _cut_at_rare(kept, room=vocab_size - least - 1, coverage=_COVERAGE)
    try:
        return SentencePiece(_train(kept, vocab_size, model_type, threads))
    except RuntimeError as error:
        largest = re.search(r"value <= (\d+)", str(error))
        if largest is None:
            raise UserError(f"SentencePiece could not train on this text ({error}).") from None
    raise UserError(
        f"--vocab-size {vocab_size} is too large for this text, which gives at most "
        f"{largest[1]} entries; use --vocab-size {largest[1]} or add text."
    )


def _cut_at_rare(lines: list[str], room: int, coverage: float) -> list[str]:
    """The lines cut at the characters that get no entry of their own.

    SentencePiece's own `character_coverage` fails where the characters outnumber the vocabulary
    (Chinese in 2,000 entries) and cannot go below 0.98.
    """
    counts: Counter[str] = Counter()
    for line in lines:
        counts.update(line)
    most = room
    if coverage < 1 and len(counts) > room:
        most = max(1, 3 * room // 4)  # the rest is for longer pieces
    left, rare = coverage * counts.total(), []
    for rank, (character, count) in enumerate(sorted(counts.items(), key=lambda c: (-c[1], c[0]))):
        if left <= 0 or rank >= most:
            rare.append(character)
        left -= count
    if not rare:
        return lines
    log.info("%d rare characters of %d are left to the byte tokens", len(rare), len(counts))
    cuts = str.maketrans(dict.fromkeys(rare, "\n"))
    return [part for line in lines for part in line.translate(cuts).split("\n") if part] or lines


def _reservoir(lines: Iterable[str], size: int) -> list[str]:
    """A uniform sample of at most `size` lines that does not change from run to run."""
    rng, kept = random.Random(0), list[str]()
    for i, line in enumerate(lines):
        if i < size:
            kept.append(line)
        elif (j := rng.randrange(i + 1)) < size:
            kept[j] = line
    return kept


def _train(kept: list[str], vocab_size: int, model_type: str, threads: int | None) -> bytes:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(kept),
        model_writer=model,
        vocab_size=vocab_size,
        model_type=model_type,
        character_coverage=1.0,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        max_sentence_length=4 * _LINE_BYTES,
        unk_id=0,
        bos_id=-1,
        eos_id=-1,
        pad_id=-1,
        control_symbols=list(CONTROL),
        num_threads=threads or os.cpu_count() or 1,
        minloglevel=2,
    )
    return model.getvalue()
