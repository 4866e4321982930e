"""Filters of text: each takes a text and gives it back, changed, or None where it is to be left out.

They are plain functions of one text, so that documents of a corpus, prompts and answers go through the same.
Nothing here needs a network or a model that is not in a wheel.
"""

from __future__ import annotations

import hashlib
import ipaddress
import logging
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from jaxgpt.config.filters import Filters
from jaxgpt.errors import UserError, require
from jaxgpt.files import Count
from jaxgpt.text.contamination import contamination_filter
from jaxgpt.text.words import words_of

log = logging.getLogger(__name__)

_PUNCTUATION = frozenset(".,;:!?'\"()-–—…’‘“”[]/%&$，。、；：！？（）《》「」“”·")
EXAMPLES = 3
"""Beginnings of texts that each filter keeps as examples."""


class Filter(NamedTuple):
    """A filter by its name, which says what it leaves out or changes."""

    name: str
    apply: Callable[[str], str | None]


class Tally(TypedDict):
    """What a filter did: documents seen, dropped and changed, and beginnings of some that were dropped."""

    seen: Count
    dropped: Count
    changed: Count
    examples: list[str]


@dataclass
class Pipeline:
    """Filters in order, and what each did."""

    filters: Sequence[Filter]
    tallies: dict[str, Tally] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for one in self.filters:
            self.tallies[one.name] = {"seen": 0, "dropped": 0, "changed": 0, "examples": []}

    def clean(self, text: str) -> str | None:
        """The text after all filters; None where one leaves it out."""
        for one in self.filters:
            made, tally = one.apply(text), self.tallies[one.name]
            tally["seen"] += 1
            if made is None:
                note_drop(tally, text)
                return None
            tally["changed"] += made != text
            text = made
        return text


def note_drop(tally: Tally, text: str) -> None:
    """Count a text that was left out."""
    tally["dropped"] += 1
    if len(tally["examples"]) < EXAMPLES:
        tally["examples"].append(" ".join(text[:200].split())[:80])


def add_tallies(total: dict[str, Tally], more: dict[str, Tally]) -> None:
    """Add what the filters of another part of the documents did."""
    for name, tally in more.items():
        own = total.setdefault(name, {"seen": 0, "dropped": 0, "changed": 0, "examples": []})
        own["seen"] += tally["seen"]
        own["dropped"] += tally["dropped"]
        own["changed"] += tally["changed"]
        own["examples"] = (own["examples"] + tally["examples"])[:EXAMPLES]


def make_filters(config: Filters) -> list[Filter]:
    """The filters that a config turns on, in order; duplicates are told apart over all documents, not here.

    Raises:
      UserError: a file cannot be read, or a package is not installed.
    """
    made = []
    if config.min_chars or config.max_chars:
        made.append(Filter("length", lambda text: _within(text, config.min_chars, config.max_chars)))
    if config.languages:
        made.append(Filter("language", language_filter(config.languages, config.language_share)))
    if config.max_symbols:
        made.append(Filter("symbols", lambda t: t if symbol_share(t) <= config.max_symbols else None))
    if config.max_repetition:
        made.append(Filter("repetition", lambda t: t if repetition(t) <= config.max_repetition else None))
    if config.decontaminate:
        made.append(Filter("contamination", contamination_filter(config)))
    if config.max_toxicity or config.toxic_words:
        words = read_words(config.toxic_words) if config.toxic_words else ()
        made.append(Filter("toxic lines", toxic_filter(config.max_toxicity, words)))
    if config.mask_personal or config.personal_patterns:
        own = read_patterns(config.personal_patterns) if config.personal_patterns else []
        made.append(Filter("personal data", personal_filter(config.mask_personal, own)))
    return made


# ------------------------------------------------------------------------------- length and quality


def _within(text: str, least: int, most: int) -> str | None:
    return text if len(text) >= least and (not most or len(text) <= most) else None


def symbol_share(text: str) -> float:
    """Share of the characters that are neither letters, digits, white space nor common punctuation."""
    odd = sum(
        not (c.isalnum() or c.isspace() or c in _PUNCTUATION or unicodedata.category(c)[0] == "M")
        for c in text
    )
    return odd / max(1, len(text))


def repetition(text: str) -> float:
    """Share of the lines, or of the 5-grams of words, that stood there before, whichever is larger."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    words = words_of(text)
    grams = list(zip(*(words[i:] for i in range(5)), strict=False))
    shares = [1 - len(set(parts)) / len(parts) for parts in (lines, grams) if len(parts) > 1]
    return max(shares, default=0.0)


def language_filter(codes: Sequence[str], share: float) -> Callable[[str], str | None]:
    """Keeps texts whose languages are these, with that probability together (py3langid).

    Raises:
      UserError: a language that is not known.
    """
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise _missing("py3langid", "languages are told", "clean") from None
    known = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    unknown = [code for code in codes if code not in known.nb_classes]
    require(
        not unknown, f"--languages names {unknown[:1]}; known are: {', '.join(sorted(known.nb_classes))}."
    )

    def apply(text: str) -> str | None:
        ranked = known.rank(text[:5000])  # enough to tell
        return text if sum(float(p) for code, p in ranked if code in codes) >= share else None

    return apply


# ---------------------------------------------------------------------------------------- toxicity


def read_words(path: str) -> tuple[str, ...]:
    """Words of a file, one per line, in lower case.

    Raises:
      UserError: it holds none.
    """
    words = tuple(w for line in _lines(path) if (w := line.strip().lower()))
    require(bool(words), f"{path} holds no word; write one per line.")
    return words


def toxic_filter(most: float, words: Sequence[str] = ()) -> Callable[[str], str | None]:
    """Leaves out lines whose probability of profanity is above `most` (0: none), or that hold a word.

    A text of which no line is left is left out.
    """
    judge = toxicity if most else None
    bounded = [rf"(?<!\w){re.escape(w)}(?!\w)" if w[0].isascii() else re.escape(w) for w in words]
    listed = re.compile("|".join(bounded)) if bounded else None

    def apply(text: str) -> str | None:
        lines = text.splitlines(keepends=True)
        p = judge(lines) if judge else [0.0] * len(lines)
        kept = [
            line
            for line, high in zip(lines, p, strict=True)
            if not (most and high > most) and not (listed and listed.search(line.lower()))
        ]
        return "".join(kept) if any(line.strip() for line in kept) else None

    return apply


def toxicity(texts: Sequence[str]) -> list[float]:
    """The probability of profanity of each text (alt-profanity-check: a linear model of English comments).

    Raises:
      UserError: it is not installed.
    """
    if not texts:
        return []
    try:
        from profanity_check import predict_prob
    except ImportError:
        raise _missing("alt-profanity-check", "toxicity is judged", "safety") from None
    return [float(p) for p in predict_prob(list(texts))]


# ------------------------------------------------------------------------------------ personal data

_NUMBERS = {
    "CN_ID": re.compile(
        r"(?<!\d)\d{6}(?:19|20)\d{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])\d{3}[\dXx](?!\d)"
    ),
    "PHONE_NUMBER": re.compile(
        r"(?<!\d)(?:\+?86[- ]?)?1[3-9]\d[- ]?\d{4}[- ]?\d{4}(?!\d)"
        r"|(?<!\d)(?:\(0\d{2,3}\) ?|(?:\+?86[- ]?)?0\d{2,3}-)[2-9]\d{6,7}(?!\d)"
    ),
    "BANK_CARD": re.compile(r"(?<!\d)62(?:[ -]?\d){14,17}(?!\d)"),
    "IP_ADDRESS": re.compile(r"(?<![\w:])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{1,4}(?!:?\w)"),
}
"""Numbers of Chinese people: identity (GB 11643, its check digit is checked), mobile phone and land line,
UnionPay card;
and addresses of IPv6, of which presidio's pattern finds the beginning alone, and `::` in every program."""


_UNSPACED = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff]")
"""Characters of scripts that need no spaces: to regular expressions they are letters, so that no word begins
or ends between one and an address, which presidio's patterns need."""


class Found(NamedTuple):
    """Personal data in a text: `text[start:end]` is of this kind."""

    start: int
    end: int
    kind: str


def personal_data(text: str, own: Sequence[tuple[str, re.Pattern[str]]] = ()) -> list[Found]:
    """E-mail addresses, phone, card, account and ID numbers and IP addresses in a text, without overlaps.

    By presidio's recognisers that need no model; and what the patterns of one's own match.
    """
    found = _matches(text, own)
    for kind, pattern in _NUMBERS.items():
        found += [Found(m.start(), m.end(), kind) for m in pattern.finditer(text) if _checks(kind, m[0])]
    spaced = _UNSPACED.sub(" ", text)
    for recognizer in _recognizers():
        results = recognizer.analyze(spaced, recognizer.supported_entities, None) or []
        sure = [Found(r.start, r.end, r.entity_type) for r in results if r.score >= 0.4]
        found += [one for one in sure if _believed(one.kind, text[one.start : one.end])]
    return apart(found)


def _believed(kind: str, text: str) -> bool:
    """Whether what presidio found counts: not IPv6, which `_NUMBERS` finds whole, nor scores as 169-10."""
    if kind == "PHONE_NUMBER":
        return sum(c.isdigit() for c in text) >= 7
    return kind != "IP_ADDRESS" or ":" not in text


def _matches(text: str, own: Sequence[tuple[str, re.Pattern[str]]]) -> list[Found]:
    return [Found(m.start(), m.end(), kind) for kind, pattern in own for m in pattern.finditer(text)]


def apart(found: Iterable[Found]) -> list[Found]:
    """What was found in order, with what overlaps as one of the first's kind, so that none of it stays."""
    kept: list[Found] = []
    for one in sorted((f for f in found if f.end > f.start), key=lambda f: (f.start, -f.end)):
        if kept and one.start < kept[-1].end:
            kept[-1] = kept[-1]._replace(end=max(one.end, kept[-1].end))
        else:
            kept.append(one)
    return kept


def _checks(kind: str, text: str) -> bool:
    """Whether the check digit of an ID or card number is right; whether an address is one."""
    if kind == "CN_ID":
        weights = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
        return (
            "10X98765432"[sum(int(c) * w for c, w in zip(text, weights, strict=False)) % 11]
            == text[-1].upper()
        )
    if kind == "IP_ADDRESS":  # `1::2` and `a::b` stand in programs
        digits = text.replace(":", "")
        return len(digits) > 4 and not digits.isalpha() and _is_ip(text)
    if kind == "BANK_CARD":  # Luhn
        values = [int(c) for c in reversed(text) if c.isdigit()]
        return (sum(values[::2]) + sum(d * 2 - 9 * (d > 4) for d in values[1::2])) % 10 == 0
    return True


def _is_ip(text: str) -> bool:
    try:
        return bool(ipaddress.ip_address(text))
    except ValueError:
        return False


def personal_filter(
    known: bool, own: Sequence[tuple[str, re.Pattern[str]]] = ()
) -> Callable[[str], str | None]:
    """Replaces personal data by its kind in angle brackets; `known` for what is told without patterns."""
    if known:
        _recognizers()  # a missing package is told at once

    def apply(text: str) -> str:
        return masked(text, personal_data(text, own) if known else apart(_matches(text, own)))

    return apply


def masked(text: str, found: Sequence[Found]) -> str:
    """The text with these places, in order and apart, replaced by their kinds."""
    parts, at = [], 0
    for one in found:
        parts += [text[at : one.start], f"<{one.kind}>"]
        at = one.end
    return "".join([*parts, text[at:]])


@lru_cache
def _recognizers() -> tuple[Any, ...]:
    try:
        from presidio_analyzer import predefined_recognizers as known
        from tldextract import TLDExtract
    except ImportError:
        raise _missing("presidio-analyzer", "personal data are found", "safety") from None
    offline = TLDExtract(suffix_list_urls=(), cache_dir=None)  # by the list in its wheel

    class Email(known.EmailRecognizer):
        def validate_result(self, pattern_text: str) -> bool:
            return bool(offline(pattern_text).suffix)

    kinds = (
        Email,
        known.CreditCardRecognizer,
        known.IbanRecognizer,
        known.IpRecognizer,
        known.PhoneRecognizer,
    )
    return tuple(kind() for kind in kinds)


def read_patterns(path: str) -> list[tuple[str, re.Pattern[str]]]:
    """Kinds and regular expressions of a file, `KIND<tab>REGEX` per line.

    Raises:
      UserError: a line that is none, with its number.
    """
    found = []
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        kind, tab, pattern = line.rstrip("\r\n").partition("\t")
        require(
            bool(tab and kind and pattern), f"{path}:{number} is no KIND, tab and regular expression; fix it."
        )
        try:
            found.append((kind, re.compile(pattern)))
        except re.error as error:
            raise UserError(f"{path}:{number} holds no regular expression ({error}); fix it.") from None
    require(bool(found), f"{path} holds no pattern; write KIND, a tab and a regular expression per line.")
    return found


# --------------------------------------------------------------------------------------- duplicates


def exact_key(text: str) -> int:
    """A hash of a text but for case and white space."""
    same = " ".join(unicodedata.normalize("NFKC", text).lower().split())
    return int.from_bytes(hashlib.blake2b(same.encode("utf-8", "replace"), digest_size=8).digest(), "big")


def shingles(text: str, size: int = 5) -> Iterator[str]:
    """The n-grams of a text's words, in order; of a short one all words as one, without words the text."""
    words = words_of(text) or text.split()
    return (" ".join(words[i : i + size]) for i in range(max(1, len(words) - size + 1)))


def _missing(package: str, what: str, extra: str) -> UserError:
    return UserError(f"{what} by {package}, which is not installed; run `pip install 'jaxgpt[{extra}]'`.")


def _lines(path: str) -> Iterable[str]:
    try:
        return Path(path).read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); name a UTF-8 text file.") from None
