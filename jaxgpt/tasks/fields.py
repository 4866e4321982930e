"""Fields of records, read with a reason where they are not what was asked for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from jaxgpt.data.lines import as_object, check_text, field_of, kind_name
from jaxgpt.data.readers.dialogues import has_field

MARKS = " \t\r\n.,;:!?\"'\u3002\uff0c\uff1b\uff1a\uff01\uff1f\u201c\u201d"
"""What may stand around a short answer and says nothing: space and punctuation, Chinese too."""


_WORD = {"en": re.compile(r"\s*\S+"), "zh": re.compile(r"\s*[a-zA-Z0-9]+|\s*\S")}


def words(text: str, language: str) -> list[str]:
    """Words with the space before them; of Chinese its characters, words of Latin letters whole."""
    return _WORD[language].findall(text)


def first_words(text: str, count: int, language: str) -> str:
    """A text up to the end of its word of this number; all of a shorter one."""
    return "".join(words(text, language)[:count])


def text_at(record: Any, name: str, empty: bool = False) -> str:
    """The text in a field, or where a path such as `a.b[0]` leads; a number as it is written.

    Raises:
      ValueError: there is none, with a short reason; an empty one too, unless `empty` allows it.
    """
    value = field_of(as_object(record), name)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    text = str(value) if is_number else check_text(value, name)
    if not text.strip() and not empty:
        raise ValueError(f"field {name!r} is empty")
    return text


def texts_at(record: Any, name: str) -> tuple[str, ...]:
    """The texts in a field: a list of them, or one.

    Raises:
      ValueError: as `text_at`; an empty list.
    """
    value = field_of(as_object(record), name)
    if not isinstance(value, list):
        return (text_at(record, name),)
    if not value:
        raise ValueError(f"field {name!r} is an empty list")
    return tuple(text_at({name: one}, name) for one in value)


def answers_in(value: Any, name: str) -> tuple[str, ...]:
    """The different answers of a value, in order, without empty ones: a text, a list of texts or of objects
    with `text`, an object with `text` (SQuAD) or with `value` and `aliases` (TriviaQA); null is none.

    Raises:
      ValueError: it is none of these.
    """
    if isinstance(value, dict):
        parts = [part for part in ("value", "text", "aliases") if part in value]
        if not parts:
            raise ValueError(
                f"field {name!r} has neither text nor value but {', '.join(map(str, value)):.100}"
            )
        held = [one for part in parts for one in _several(value[part])]
    else:
        held = [one.get("text") if isinstance(one, dict) else one for one in _several(value)]
    found = (text_at({name: one}, name, empty=True).strip() for one in held)
    return tuple(dict.fromkeys(filter(None, found)))


def _several(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def named(record: Any, given: str, usual: Sequence[str], what: str) -> str:
    """The field that a config gives, or of the usual ones the first that a record has.

    Args:
      record: to look in.
      given: name of a field; empty for the usual ones.
      usual: names.
      what: the config's field, for messages.

    Raises:
      ValueError: the record has none of the usual ones.
    """
    record = as_object(record)
    if given:
        return given
    found = next((name for name in usual if has_field(record, name)), "")
    if not found:
        held = ", ".join(map(str, record))
        raise ValueError(
            f"it has none of {', '.join(usual)} but {held:.200}; name the field with data.{what}"
        )
    return found


def document(value: Any, name: str, longest: int = 0, language: str = "en") -> str:
    """A text, or turns or lines of one, each on a line of its own; turns as `speaker: text`.

    Args:
      value: of the field.
      name: of the field.
      longest: words that are kept, the first ones; 0 keeps all.
      language: what words are.

    Raises:
      ValueError: it is neither, or empty.
    """
    lines = value if isinstance(value, list) else [value]
    text = "\n".join(_line(line, name) for line in lines)
    if not text.strip():
        raise ValueError(f"field {name!r} is empty")
    return first_words(text, longest, language) if longest else text


def _line(value: Any, name: str) -> str:
    if not isinstance(value, dict):
        return check_text(value, name)
    said = next((key for key in ("content", "text", "utterance", "value") if key in value), None)
    who = next((key for key in ("speaker", "role", "from", "name") if key in value), None)
    if said is None:
        raise ValueError(f"a turn of {name!r} is {kind_name(value)} without content or text")
    text = check_text(value[said], said)
    return f"{check_text(value[who], who)}: {text}" if who else text
