"""Which text is worth training on: what `jaxgpt data prepare` leaves out or changes; by default nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from jaxgpt.config.bounds import Bounds
from jaxgpt.config.check import check_types
from jaxgpt.errors import require

Characters = Annotated[int, Bounds(0, 2**40)]
Fraction = Annotated[float, Bounds(0, 1)]


@dataclass(frozen=True, kw_only=True)
class Filters:
    """Filters of documents, applied in the order of the fields; each is counted in the manifest."""

    min_chars: Characters = 0
    """Drop documents of fewer characters; 0 keeps all."""
    max_chars: Characters = 0
    """Drop documents of more characters; 0 keeps all."""
    languages: tuple[str, ...] = ()
    """Keep documents in these languages (codes such as en, zh), as py3langid tells them; empty keeps all."""
    language_share: Fraction = 0.5
    """Least probability of those languages together."""
    max_symbols: Fraction = 0.0
    """Drop documents of which more of the characters are neither letters, digits, white space nor common
    punctuation; 0 keeps all."""
    max_repetition: Fraction = 0.0
    """Drop documents of which more of the lines, or of the 5-grams of words (of Chinese, characters), stood
    there before (Rae et al. 2021, appendix A); 0 keeps all."""
    decontaminate: tuple[str, ...] = ()
    """Evaluation files: documents that share an n-gram with them are dropped. Every text in them counts,
    and the documents as they are, before lines are left out and data masked."""
    contamination_ngram: Annotated[int, Bounds(2, 1000)] = 13
    """Words of such an n-gram (Brown et al. 2020, appendix C); of Chinese, twice as many characters."""
    max_toxicity: Fraction = 0.0
    """Leave out lines whose probability of profanity is higher (alt-profanity-check, English); 0 keeps
    all."""
    toxic_words: str = ""
    """File of words, one per line, in any language: lines that hold one are left out."""
    mask_personal: bool = False
    """Replace e-mail addresses, phone, card and account numbers, IP addresses and Chinese ID numbers by their
    kind in angle brackets."""
    personal_patterns: str = ""
    """File of kinds and regular expressions (KIND, tab, REGEX per line), whose matches are replaced too."""
    duplicates: Literal["keep", "exact", "near"] = "keep"
    """Drop documents that stood there before: the same but for case and white space, or by MinHash of their
    words' 5-grams (of Chinese, characters) as similar as `similarity`. It reads the sources twice."""
    similarity: Annotated[float, Bounds(0.1, 1)] = 0.8
    """Jaccard similarity from which documents are near duplicates."""

    def __post_init__(self) -> None:
        check_types(self, "filters")
        require(
            not self.max_chars or self.max_chars >= self.min_chars,
            f"--min-chars {self.min_chars} is more than --max-chars {self.max_chars}; no document fits.",
        )
        for name in ("toxic_words", "personal_patterns"):
            path = getattr(self, name)
            flag = "--" + name.replace("_", "-")
            require(not path or Path(path).is_file(), f"{flag} is {path!r}, which is no file; name one.")
        for path in self.decontaminate:
            require(Path(path).is_file(), f"--decontaminate names {path!r}, which is no file; name files.")
        for name, given, main, on in (
            ("language-share", self.language_share != 0.5, "--languages", bool(self.languages)),
            (
                "contamination-ngram",
                self.contamination_ngram != 13,
                "--decontaminate",
                bool(self.decontaminate),
            ),
            ("similarity", self.similarity != 0.8, "--duplicates near", self.duplicates == "near"),
        ):
            require(on or not given, f"--{name} does nothing without {main}; give that too, or drop it.")

    @property
    def files(self) -> tuple[str, ...]:
        """Files that decide what is dropped or changed."""
        return tuple(f for f in (self.toxic_words, self.personal_patterns, *self.decontaminate) if f)


NO_FILTERS = Filters()
