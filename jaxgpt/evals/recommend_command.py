"""`jaxgpt data ratings FILE --out FOLDER`: MovieLens's ratings as histories, candidates and clicks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from jaxgpt.config.bounds import Bounds, Positive, Seed, bounded
from jaxgpt.data.ratings import MIN_LIKED, leave_last_out, read_ratings, rows_of
from jaxgpt.data.sources import Report, expand
from jaxgpt.errors import require
from jaxgpt.evals.recommend import histories, item_neighbours, popularity, ranking
from jaxgpt.files import require_writable, write_json, write_jsonl

File = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
Some = Annotated[int, Bounds(0, 1_000_000)]


@bounded
def ratings(
    file: File,
    *,
    out: Path,
    items: str = "",
    user: str = "userId",
    item: str = "movieId",
    rating: str = "rating",
    time: str = "timestamp",
    title: str = "title",
    liked: Positive = 4.0,
    negatives: Some = 99,
    beside: Annotated[int, Bounds(1, 1000)] = 3,
    most: Annotated[int, Bounds(1, 10_000)] = 10,
    neighbours: Annotated[int, Bounds(1, 10_000)] = 20,
    seed: Seed = 0,
) -> None:
    """Write records for the task Recommendation, the last item that each user liked held out.

    Prints the ranking quality of popularity and of item-kNN on the test records, which a model is compared
    with, and saves it as baselines.json. Candidates that are drawn favour some methods over others (Krichene
    and Rendle 2020): compare on the same records, or with --negatives 0.

    Args:
      file: ratings.csv or .tsv with a header, or ratings.dat.
      out: folder to write train.jsonl, validation.jsonl, test.jsonl and baselines.json to.
      items: movies.csv or movies.dat; their titles take the place of their numbers.
      user, item, rating, time, title: names of the columns.
      liked: ratings from here on are clicks.
      negatives: items that a user never rated beside each of validation and test; 0 takes all.
      beside: the same of training.
      most: items of a user to train on, the last ones.
      neighbours: items of a history that count for item-kNN, the nearest ones.
      seed: of the draws.

    Raises:
      UserError: a file that cannot be read, or nobody who liked enough.
    """
    require_writable(out)
    report = Report()
    users = read_ratings(_one(file), report, (user, item, rating, time))
    if items:
        names = {row[item]: row[title] for _, row in rows_of(_one(items), report, (item, title, "genres"))}
        users = {
            who: [one._replace(item=names.get(one.item, one.item)) for one in rated]
            for who, rated in users.items()
        }
    report.check(0.01, "mend them")
    parts = leave_last_out(users, liked=liked, negatives=negatives, beside=beside, most=most, seed=seed)
    require(
        bool(parts["test"]),
        f"no user of {file} liked {MIN_LIKED} items ({rating} of at least {liked:g}); lower --liked.",
    )
    for split, records in parts.items():
        write_jsonl(out / f"{split}.jsonl", records)
    known = histories(parts["test"])
    scorers = {"popularity": popularity(known), "item-kNN": item_neighbours(known, neighbours)}
    found = {name: ranking(parts["test"], score) for name, score in scorers.items()}
    write_json(
        out / "baselines.json", {n: {k: v._asdict() for k, v in row.items()} for n, row in found.items()}
    )
    sizes = ", ".join(f"{len(records):,} {split}" for split, records in parts.items())
    print(f"{len(known):,} users, {sizes}: saved in {out}")
    for name, row in found.items():
        cells = [
            f"{k} {v.value:.1f} ({v.low:.1f} to {v.high:.1f})" for k, v in row.items() if v.low is not None
        ]
        print(f"{name}: {', '.join(cells)}")


def _one(file: str) -> str:
    found = expand([file], ("",))
    require(len(found) == 1, f"{file} is {len(found)} files; name one.")
    return found[0]
