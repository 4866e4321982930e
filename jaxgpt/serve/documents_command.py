"""`jaxgpt serve documents FOLDER --questions FILE`: below which share a question counts as unknown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

import tyro

from jaxgpt.config import Knowledge
from jaxgpt.config.bounds import Part, bounded
from jaxgpt.data.knowledge import Library
from jaxgpt.data.lines import as_object, check_text, decode_line, field_of, parse_line, read_lines
from jaxgpt.data.sources import Report, expand
from jaxgpt.errors import require
from jaxgpt.sample.options import library_of

Folder = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
SEARCHED = Knowledge()


@bounded
def calibrate(
    folder: Folder,
    *,
    questions: tuple[str, ...],
    others: tuple[str, ...] = (),
    keep: Part = 0.95,
    field: str = "question",
    known: Annotated[Knowledge, tyro.conf.arg(name=""), tyro.conf.UseAppendAction] = SEARCHED,
) -> None:
    """Print the --least with which a service that has these documents still answers most questions.

    Args:
      folder: documents, as for `jaxgpt serve --documents`.
      questions: files of questions that they answer: a question a line, or JSON lines (.jsonl).
      others: files of questions that they do not answer, to see how many are refused.
      keep: share of the first ones that is still answered.
      field: of the question in JSON lines.
      known: how the documents are searched.

    Raises:
      UserError: a file that cannot be read, or no question.
    """
    library = library_of(replace(known, documents=(*known.documents, folder), least=0.0), True)
    assert library is not None
    shares = shares_of(library, read_questions(questions, field))
    require(bool(shares), f"there is no question in {', '.join(questions)}; name others.")
    least = least_of(shares, keep)
    print(f"--least {least:.4f}")
    kept = sum(share >= least for share in shares)
    print(f"answers {kept} of {len(shares)} questions ({kept / len(shares):.1%})")
    if others:
        rest = shares_of(library, read_questions(others, field))
        refused = sum(share < least for share in rest)
        print(f"refuses {refused} of {len(rest)} others ({refused / max(1, len(rest)):.1%})")


def read_questions(files: Sequence[str], field: str) -> list[str]:
    """The questions of files.

    Raises:
      UserError: a file that cannot be read, or a line that holds none.
    """
    report, found = Report(), list[str]()
    for path in expand(files, ("",)):
        if path.endswith((".jsonl", ".ndjson")):
            records = read_lines(path, report, lambda line: as_object(parse_line(line)))
            found += [check_text(field_of(record, field), field) for _, record in records]
        else:
            found += [text.strip() for _, text in read_lines(path, report, decode_line)]
    report.check(0, "fix or remove them")
    return found


def shares_of(library: Library, questions: Sequence[str]) -> list[float]:
    """What part of the most that it could score each question's best passage has; 0 where none is found."""
    assert library.retriever is not None
    found = [library.retriever.search(question, 1) for question in questions]
    pairs = zip(questions, found, strict=True)
    return [library.retriever.share(question, near[0].score) if near else 0.0 for question, near in pairs]


def least_of(shares: Sequence[float], keep: float) -> float:
    """The highest share that at least this part of the questions reaches, rounded down to four digits."""
    ranked = sorted(shares, reverse=True)
    return math.floor(1e4 * ranked[math.ceil(keep * len(ranked)) - 1]) / 1e4
