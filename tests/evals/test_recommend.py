"""Recommendation: MovieLens's layouts, the last item held out, and what a recommender must beat."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from jaxgpt.cli import main
from jaxgpt.data.ratings import Rating, leave_last_out, read_ratings
from jaxgpt.data.readers.tasks import evaluation_samples
from jaxgpt.data.sources import Report
from jaxgpt.evals.metrics import METRICS, Prediction
from jaxgpt.evals.recommend import histories, item_neighbours, popularity, ranking
from jaxgpt.tasks import Recommendation

NAMES = ("userId", "movieId", "rating", "timestamp")
GENRES, FILMS = 4, 60


def made(users: int = 150, seed: int = 0) -> list[tuple[int, int, float, int]]:
    """Ratings of users who each like one genre, and its first films more often; film i is of genre i % 4."""
    drawn, rows = random.Random(seed), list[tuple[int, int, float, int]]()
    for user in range(users):
        genre = user % GENRES
        own = [film for film in range(FILMS) if film % GENRES == genre]
        weights = [1 / (1 + i) for i in range(len(own))]
        films = dict.fromkeys(drawn.choices(own, weights, k=12) + drawn.choices(range(FILMS), k=4))
        for time, film in enumerate(films):
            rows.append((user, film, 5.0 if film % GENRES == genre else 2.0, 1000 + time))
    return rows


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    rows = made()
    (tmp_path / "ratings.csv").write_text(
        "userId,movieId,rating,timestamp\n" + "".join(f"{u},{m},{r},{t}\n" for u, m, r, t in rows)
    )
    (tmp_path / "ratings.dat").write_text("".join(f"{u}::{m}::{r:g}::{t}\n" for u, m, r, t in rows))
    films = "".join(f"{film}::Café {film} (1979)::Drama|War\n" for film in range(FILMS))
    (tmp_path / "movies.dat").write_bytes(films.encode("latin-1"))
    return tmp_path


def test_both_layouts_hold_the_same(tables: Path) -> None:
    held = [read_ratings(str(tables / f"ratings.{kind}"), Report(), NAMES) for kind in ("csv", "dat")]
    plain = [
        {user: [one._replace(where="") for one in rated] for user, rated in users.items()} for users in held
    ]
    assert plain[0] == plain[1] and len(plain[0]) == 150
    report = Report()
    (tables / "bad.dat").write_text("1::2::3\n1::2::x::4\n1::2::5::4\n1::::5::4\n")
    users = read_ratings(str(tables / "bad.dat"), report, NAMES)
    assert report.bad == 3 and [one.item for one in users["1"]] == ["2"]


def test_the_last_liked_item_is_held_out_and_nothing_of_it_is_seen() -> None:
    items = ["a", "b", "c", "d", "e", "f"]
    rated = [Rating(i, "", item, 2.0 if item == "b" else 5.0) for i, item in enumerate(items)]
    others = [Rating(0, "", item, 5.0) for item in ("x", "y", "z", "a")]
    parts = leave_last_out({"u": rated, "v": others[:3]}, liked=4.0, negatives=2, beside=1, most=10, seed=0)
    test = parts["test"]
    assert {r["user"] for r in test} == {"u"} and len(test) == 3  # the other one liked too little
    (asked,) = [r for r in test if r["click"]]
    assert asked["candidate"] == "f" and asked["history"] == ["a", "c", "d", "e"]
    assert {r["candidate"] for r in test if not r["click"]} <= {"x", "y", "z"}
    (before,) = [r for r in parts["validation"] if r["click"]]
    assert (before["candidate"], before["history"]) == ("e", ["a", "c", "d"])
    assert [r["candidate"] for r in parts["train"] if r["click"]] == ["c", "d"]
    everything = leave_last_out({"u": rated, "v": others}, liked=4.0, negatives=0, beside=1, most=1, seed=0)
    assert sorted(r["candidate"] for r in everything["test"] if r["user"] == "u") == ["f", "x", "y", "z"]


def test_neighbours_are_cosines_by_hand() -> None:
    liked = [["a", "b"], ["a", "b", "c"], ["c"]]
    score = item_neighbours(liked, neighbours=1)
    record = {"user": "u", "click": 0, "history": ["b", "c"], "candidate": "a"}
    assert score(record) == pytest.approx(1.0)  # a and b are liked by the same two
    both = item_neighbours(liked, neighbours=2)
    assert both(record) == pytest.approx(1.0 + 1 / 2)  # of c's two users one liked a
    assert score(record | {"candidate": "new"}) == 0.0 and score(record | {"history": ["new"]}) == 0.0
    assert popularity(liked)(record) == 2.0


def test_metrics_of_ranks_by_hand() -> None:
    records = [
        {"user": user, "history": [], "candidate": f"{i}", "click": click}
        for user, clicks in (("u", (0, 1, 0)), ("v", (0, 0, 1)))
        for i, click in enumerate(clicks)
    ]
    found = ranking(records, lambda r: -float(r["candidate"]), ("recall@1", "recall@2", "mrr"))
    assert {k: v.value for k, v in found.items()} == {
        "recall@1": 0.0, "recall@2": 50.0, "mrr": pytest.approx(100 * (1 / 2 + 1 / 3) / 2)
    }  # fmt: skip


def test_the_command_writes_what_the_task_reads(tables: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["data", "ratings", str(tables / "ratings.dat"), "--items", str(tables / "movies.dat")]
    assert main([*command, "--out", str(tables / "ml"), "--negatives", "20"]) == 0
    assert "popularity: recall@10" in capsys.readouterr().out
    found = json.loads((tables / "ml" / "baselines.json").read_text())
    for metric in (
        "recall@10",
        "ndcg@10",
        "mrr",
    ):  # users like one genre each
        assert found["item-kNN"][metric]["value"] > 1.2 * found["popularity"][metric]["value"]
    task = Recommendation(test=(str(tables / "ml" / "test.jsonl"),), tokenizer="byte")
    samples = [sample for _, sample in evaluation_samples(task, "test")]
    records = [json.loads(line) for line in (tables / "ml" / "test.jsonl").read_text().splitlines()]
    assert len(samples) == len(records) and samples[0].values["candidate"].startswith("Café ")
    score = item_neighbours(histories(records))
    predictions = [
        Prediction(s, "", "", "", choices=(score(r), 0.0)) for s, r in zip(samples, records, strict=True)
    ]
    metric = METRICS["mrr"]
    value = metric.of(metric.statistics(predictions))
    assert value == pytest.approx(found["item-kNN"]["mrr"]["value"], rel=1e-3)
    assert main([*command, "--out", str(tables / "no"), "--liked", "9"]) == 2
    assert "liked 4 items (rating of at least 9); lower --liked." in capsys.readouterr().err


def test_the_task_reads_dat_files_itself(tables: Path) -> None:
    task = Recommendation(
        test=(str(tables / "ratings.dat"),), tokenizer="byte", user="userId", candidate="movieId",
        click="rating", time="timestamp", items=str(tables / "movies.dat"), asked=2,
    )  # fmt: skip
    samples = [sample for _, sample in evaluation_samples(task, "test")]
    assert len(samples) == 300 and {s.facts["click"] for s in samples} == {0, 1}
