"""What is put before a question: passages of documents that are searched, and facts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from jaxgpt.config import code
from jaxgpt.config.bounds import Bounds, Share
from jaxgpt.config.check import check_types
from jaxgpt.errors import require


@dataclass(frozen=True, kw_only=True)
class Knowledge:
    """Passages of documents that are near to a question, and facts about what it names, put before it."""

    documents: tuple[str, ...] = ()
    """Files, folders or globs of text (.txt, .md, .jsonl, .parquet) that are searched."""
    passages: Annotated[int, Bounds(1, 1000)] = 3
    """Passages put before a question, the nearest first."""
    facts: str = ""
    """A table (TSV, CSV) of subject, relation and object; those about the names in a question are put before
    it."""
    encoder: str = ""
    """What makes vectors of texts, which are compared by their cosine: `FILE.py:NAME` of a function of a list
    of texts to an array [N, D], or in sampling the folder of a run. Empty searches by words (BM25)."""
    index: str = ""
    """File that keeps the index of the documents for the next time; empty keeps none."""
    passage_size: Annotated[int, Bounds(1, 2**20)] = 500
    """Characters of a passage at most: longer paragraphs are cut by sentences."""
    cited: bool = False
    """Each passage stands after its number and title, as `[1] Title: passage`, so that an answer can name it.
    A title is that of the JSON record (`title`), the heading above in a .md file, or the file's name."""
    least: Share = 0.0
    """Part of what the best passage could score, below which nothing counts as found
    (docs/customer_service.md)."""
    text_field: str = "text"
    """Field of the text in JSON and Parquet."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "encoder", code.references((self.encoder,), "encoder")[0])
        check_types(self, "")
        for name in ("encoder", "index"):
            value = getattr(self, name)
            require(
                not value or bool(self.documents),
                f"{name} is {value!r} but documents names nothing to search; name files or a folder.",
            )

    def __bool__(self) -> bool:
        return bool(self.documents or self.facts)
