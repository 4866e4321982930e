"""docs/config.md: every field of every config class, as the code has it."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from jaxgpt.config.load import KINDS
from jaxgpt.config.reference import page

PAGE = Path(__file__).parents[1] / "docs" / "config.md"


def test_the_page_is_that_of_the_code() -> None:
    assert PAGE.read_text("utf-8") == page(), "run `python -m jaxgpt.config.reference > docs/config.md`"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_field_is_there_and_says_something(kind: type) -> None:
    (section,) = [part for part in page().split("\n## ") if re.match(rf"{kind.__name__}\b", part)]
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in section.splitlines() if line.startswith("| `")]
    assert [row[0].strip() for row in rows] == [f"`{field.name}`" for field in dataclasses.fields(kind)]
    assert all(len(row) == 4 and all(cell.strip() for cell in row) for row in rows)


def test_values_and_defaults_are_those_of_the_classes() -> None:
    for row in (
        "| `peak_lr` | Learning rate after the warm-up. | float between 1e-30 and 1e+06 | `0.0006` |",
        "| `name` | Name of the run's folder. | text | required |",
        "empty for a plain one. | tuple of int between 1 and 16,777,216 | `()` |",
        "(Llama 3.1); None leaves them. | `RopeScaling` or None | `None` |",
        "wherever it goes on. | `auto`, `float32`, `bfloat16` | `'bfloat16'` |",
    ):
        assert row in page()
