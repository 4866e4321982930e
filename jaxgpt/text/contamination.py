"""Text that stands in evaluation files: n-grams that a training document must not share with them."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from typing import Any

from jaxgpt.config.filters import Filters
from jaxgpt.errors import UserError, require
from jaxgpt.text.words import words_of

SHORTEST = 8
"""Words of an evaluation text that is shorter than the n-gram and still counts, as a whole; of Chinese, twice
as many characters."""


def contamination_filter(config: Filters) -> Callable[[str], str | None]:
    """Drops texts that share an n-gram with the evaluation files (Brown et al. 2020, appendix C).

    An n-gram is of words, of mostly Chinese text of twice as many characters. Memory holds the n-grams of the
    evaluation files alone.

    Raises:
      UserError: a file that cannot be read, or holds no text that is long enough.
    """
    grams: dict[int, set[int]] = {}
    for path in config.decontaminate:
        for text in evaluation_texts(path):
            words = words_of(text)
            whole = _size(words, config.contamination_ngram)
            size = min(whole, len(words))
            if size >= min(_size(words, SHORTEST), whole):
                grams.setdefault(size, set()).update(_hashes(words, size))
    require(
        bool(grams),
        f"the files of --decontaminate {config.decontaminate} hold no text of {SHORTEST} words; name others.",
    )

    def apply(text: str) -> str | None:
        words = words_of(text)
        shared = (gram in known for size, known in grams.items() for gram in _hashes(words, size))
        return None if any(shared) else text

    return apply


def _size(words: list[str], n: int) -> int:
    chinese = sum(len(word) == 1 and not word.isascii() for word in words)
    return 2 * n if 2 * chinese > len(words) else n


def _hashes(words: list[str], size: int) -> Iterator[int]:
    return (hash(tuple(words[i : i + size])) for i in range(len(words) - size + 1))


def evaluation_texts(path: str) -> Iterator[str]:
    """Every text in a file: values of JSON (lines) however deep, cells of a table, or lines.

    Raises:
      UserError: it cannot be read.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            whole = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--decontaminate {path} cannot be read ({error}); name a UTF-8 file.") from None
    if path.endswith((".json", ".jsonl", ".ndjson")):
        try:
            values = [json.loads(whole)]
        except ValueError:
            lines = enumerate(whole.split("\n"), 1)  # JSON may hold other separators of lines
            values = [_line(path, i, line) for i, line in lines if line.strip()]
        yield from (text for value in values for text in _strings(value))
    elif path.endswith(".csv"):
        try:
            yield from (cell for row in csv.reader(whole.splitlines(keepends=True)) for cell in row)
        except csv.Error as error:
            raise UserError(f"--decontaminate {path} is no CSV file ({error}); fix it.") from None
    elif path.endswith(".tsv"):
        yield from (cell for line in whole.splitlines() for cell in line.split("\t"))
    else:
        yield from whole.splitlines()


def _line(path: str, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise UserError(f"{path}:{number} is not JSON ({error}); fix it or leave the file out.") from None


def _strings(value: Any) -> Iterator[str]:
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            yield one
        elif isinstance(one, dict):
            waiting += one.values()
        elif isinstance(one, list):
            waiting += one
