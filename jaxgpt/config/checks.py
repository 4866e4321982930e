"""What a service lets through: checks of prompts and answers, in one file of JSON or TOML."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from jaxgpt.config.bounds import Bounds
from jaxgpt.config.check import check_types, from_json
from jaxgpt.errors import UserError, require
from jaxgpt.files import parse_json, read_small

Action = Literal["mask", "refuse", "flag"]
"""`mask` puts the kind in angle brackets there; `refuse` refuses a prompt, and ends an answer before the
place with the reason `content_filter`; `flag` changes nothing, and is counted and logged as the others
are."""


def _check_file(path: str, name: str) -> None:
    require(not path or Path(path).is_file(), f"{name} is {path!r}, which is no file; name one.")


@dataclass(frozen=True, kw_only=True)
class PersonalData:
    """E-mail addresses, numbers of phones, cards, accounts and identity, IP addresses."""

    action: Action = "mask"
    patterns: str = ""
    """File of kinds and regular expressions of one's own (KIND, tab, REGEX per line)."""

    def __post_init__(self) -> None:
        check_types(self, "PersonalData")
        _check_file(self.patterns, "PersonalData.patterns")


@dataclass(frozen=True, kw_only=True)
class Toxicity:
    """Sentences that alt-profanity-check, a linear model of English comments, finds profane."""

    action: Action = "refuse"
    above: Annotated[float, Bounds(0, 1)] = 0.9
    """Probability from which a sentence counts."""

    def __post_init__(self) -> None:
        check_types(self, "Toxicity")


@dataclass(frozen=True, kw_only=True)
class Words:
    """Words of a list, in any language, whatever their case."""

    action: Action = "mask"
    file: str = ""
    """Words, one per line; empty for a short list of rude ones, English and Chinese."""

    def __post_init__(self) -> None:
        check_types(self, "Words")
        _check_file(self.file, "Words.file")


@dataclass(frozen=True, kw_only=True)
class Repetition:
    """Words (of Chinese, characters) that stand there again and again, one after another."""

    action: Action = "refuse"
    most: Annotated[int, Bounds(1, 500)] = 40
    """Longest repetition that is let through, in words after those that it repeats."""

    def __post_init__(self) -> None:
        check_types(self, "Repetition")


@dataclass(frozen=True, kw_only=True)
class SystemPrompt:
    """Parts of the system prompt in an answer, word by word; one that is translated or encoded is not
    found.
    """

    action: Action = "refuse"
    words: Annotated[int, Bounds(3, 100)] = 10
    """Words in a row that count; of Chinese, twice as many characters. A shorter prompt counts as a whole."""

    def __post_init__(self) -> None:
        check_types(self, "SystemPrompt")


Check = PersonalData | Toxicity | Words | Repetition | SystemPrompt


@dataclass(frozen=True, kw_only=True)
class Checks:
    """Checks of what goes in and what comes out, in order."""

    input: tuple[Check, ...] = ()
    """Of every message of a prompt."""
    output: tuple[Check, ...] = ()
    """Of answers."""
    look_behind: Annotated[int, Bounds(16, 4096)] = 128
    """Characters of a streamed answer that are kept back until what follows them is known: what a check finds
    and is no longer is never sent in part."""

    def __post_init__(self) -> None:
        check_types(self, "")
        given = [type(check).__name__ for check in self.input]
        require("SystemPrompt" not in given, "input holds SystemPrompt, which checks answers; move it there.")


def read_checks(path: Path) -> Checks:
    """The checks of a file: JSON, or TOML where it is called so. Each says its class under `kind`.

    Raises:
      UserError: it cannot be read, or says what there is not.
    """
    fix = "write lists `input` and `output` of checks, each with its `kind` (docs/access.md)"
    try:
        data = read_small(path, fix)
        held = tomllib.loads(data.decode()) if path.suffix == ".toml" else None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); {fix}.") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path} is no TOML ({error}); {fix}.") from None
    held = parse_json(data, dict[str, Any], path, fix, once=True) if held is None else held
    try:
        return from_json(Checks, held)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
