"""Next-item recommendation as text: of a user's history and a candidate, whether the user takes it.

The candidate's score is the probability of `yes` among the two choices, so that candidates of one user are
ranked (as LLM recommenders do, such as TALLRec; Bao et al. 2023, section 3).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar

from jaxgpt.config.bounds import Bounds, Positive
from jaxgpt.config.tasks import Sample, Task
from jaxgpt.data.lines import as_object, field_of, kind_name
from jaxgpt.data.ratings import SUFFIXES, read_ratings, rows_of
from jaxgpt.data.sources import Report
from jaxgpt.errors import require
from jaxgpt.tasks.fields import MARKS, text_at, texts_at


@dataclass(frozen=True, kw_only=True)
class Recommendation(Task):
    """Users' histories and candidates that were clicked or not: a candidate a record, as `jaxgpt data
    ratings` writes them, or MovieLens's table of ratings, of which each user's last ones are asked for.
    """

    metrics: tuple[str, ...] = ("auc", "ndcg@10", "hit@10")
    max_new_tokens: int = 4
    user: str = "user"
    """Field of the user; candidates of one user are ranked together."""
    history: str = "history"
    """Field of what the user took before, the oldest first: a list of texts, or one text."""
    candidate: str = "candidate"
    """Field of the candidate; of a table of ratings, of the item (`movieId`)."""
    click: str = "click"
    """Field that is 1 where the user took the candidate, else 0; of a table of ratings, the rating."""
    time: str = ""
    """Field of the time of a rating, which says that files are tables of ratings."""
    liked: Positive = 4.0
    """Ratings from here on are clicks."""
    asked: Annotated[int, Bounds(1, 10_000)] = 10
    """Ratings per user that are asked for, the last ones; what was liked before them is the history."""
    most: Annotated[int, Bounds(1, 10_000)] = 20
    """Items of a history that are given, the last ones."""
    items: str = ""
    """A table (.csv, .tsv, or MovieLens's .dat) with the names of items, where histories and candidates hold
    their numbers."""
    item: str = "movieId"
    """Column of an item's number in that table."""
    title: str = "title"
    """Column of its name."""

    one_each: ClassVar[bool] = True
    suffixes: ClassVar[tuple[str, ...]] = (".dat",)
    names: ClassVar[tuple[str, ...]] = ("history", "candidate")
    phrasings: ClassVar = {
        "en": (
            "A user chose, in this order:\n{history}\n\nWill the user choose this next: {candidate}?",
            "{history}\n\nGiven these, does the user like {candidate}?",
            "Somebody liked these:\n{history}\n\nWould that person like {candidate} too?",
            "History:\n{history}\n\nCandidate: {candidate}\nIs it a good recommendation, yes or no?",
        ),
        "zh": (
            "用户依次选择了：\n{history}\n\n接下来会选择“{candidate}”吗？",
            "{history}\n\n据此，用户会喜欢“{candidate}”吗？",
            "历史：\n{history}\n\n候选：{candidate}\n值得推荐吗，是或否？",
        ),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            not self.items or self.items.lower().endswith(SUFFIXES),
            f"data.items is {self.items!r}; name a .csv, .tsv or .dat file of {self.item} and {self.title}.",
        )

    @property
    def wanted(self) -> str:
        return f"fields {self.user}, {self.history}, {self.candidate} and {self.click}"

    def records(self, path: str, report: Any) -> Iterator[tuple[str, Any]] | None:
        return self._ratings(path, report) if self.time and path.lower().endswith(SUFFIXES) else None

    def _ratings(self, path: str, report: Report) -> Iterator[tuple[str, Any]]:
        """A record for each of the last ratings of each user."""
        names = (self.user, self.candidate, self.click, self.time)
        users = read_ratings(path, report, names, self.header)
        for user, rated in users.items():
            before = [one.item for one in rated[: -self.asked] if one.value >= self.liked]
            for one in rated[-self.asked :] if before else ():
                yield one.where, {self.user: user, self.history: before, self.candidate: one.item,
                                  self.click: int(one.value >= self.liked)}  # fmt: skip

    def samples(self, record: Any) -> Iterator[Sample]:
        record = as_object(record)
        history = [self._called(one) for one in texts_at(record, self.history)][-self.most :]
        click = field_of(record, self.click)
        if click not in (0, 1, "0", "1"):
            raise ValueError(
                f"field {self.click!r} is {click!r:.40} ({kind_name(click)}); a click is 1, none is 0"
            )
        user, clicked = text_at(record, self.user), int(click)
        values = {"history": "\n".join(history), "candidate": self._called(text_at(record, self.candidate))}
        choices = {"en": ("yes", "no"), "zh": ("是", "否")}[self.language]
        facts = {"group": user, "click": clicked}
        yield Sample(
            values, (choices[1 - clicked],), choices=choices, facts=facts, together=(f"user {user}",)
        )

    def _called(self, item: str) -> str:
        if not self.items:
            return item
        stat = Path(self.items).stat() if Path(self.items).is_file() else None
        require(stat is not None, f"data.items {self.items!r} is not a file; name the table of items.")
        names = _titles(self.items, self.item, self.title, stat.st_mtime_ns if stat else 0)
        if item not in names:
            raise ValueError(f"item {item!r:.40} is not in {self.items}")
        return names[item]

    def extract(self, text: str, sample: Sample) -> str:
        said = text.strip(MARKS).casefold()
        return next((choice for choice in sample.choices if said == choice), "")


@lru_cache(maxsize=4)
def _titles(path: str, item: str, title: str, stamp: int) -> dict[str, str]:
    report = Report()
    rows = (row for _, row in rows_of(path, report, (item, title, "genres")))
    first = next(rows, {})
    for name in (item, title):
        require(
            name in first, f"{path} has no column {name!r} but {', '.join(first)}; set data.item and title."
        )
    found = {row[item]: row[title] for row in itertools.chain([first], rows)}
    report.check(0.01, "mend them")
    return found
