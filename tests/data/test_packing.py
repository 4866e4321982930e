"""Packing against a naive reference, and the promises about what an epoch holds."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import grain
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxgpt.data.packing import ConcatRows, Item, PackedExamples, StreamRows, first_fit
from jaxgpt.errors import UserError
from jaxgpt.text.chat import Example

quick = settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))


class Memory:
    """Documents held in memory, in the form of a `Corpus`; each token is a number of its own."""

    folder, split, digest = "memory", "train", "0" * 64

    def __init__(self, lengths: list[int]) -> None:
        self.lengths_D = np.array(lengths, np.uint32)
        edges = np.cumsum([0, *lengths])
        self.documents = [np.arange(a, b) for a, b in pairwise(edges)]

    def read(self, document: int, start: int, stop: int) -> np.ndarray:
        assert 0 <= start < stop <= len(self.documents[document])
        return self.documents[document][start:stop]


def naive_rows(documents, length, order, offset, rows, wrap):
    """Token by token: (tokens, targets, weights, segments, positions) of each row."""
    stream = [(int(t), place) for place, d in enumerate(order) for t in documents[d]]
    out = []
    for r in range(rows):
        row, segment, position, last = [], 0, 0, None
        for i in range(length):
            at = offset + r * length + i
            if not wrap and at + 1 >= len(stream):
                row.append((-1, -1, 0, 0, 0))
                continue
            here, following = stream[at % len(stream)], stream[(at + 1) % len(stream)]
            border = last is None or here[1] != last[1] or at % len(stream) == 0
            segment, position = (segment + 1, 0) if border else (segment, position + 1)
            inside = here[1] == following[1] and (at + 1) % len(stream) != 0
            row.append((here[0], following[0], int(inside), segment, position))
            last = here
        out.append(np.array(row).T)
    return out


def as_array(row):
    names = ("tokens", "targets", "weights", "segments", "positions")
    return np.stack([row[n] for n in names]).astype(int)


lengths = st.lists(st.integers(1, 30), min_size=1, max_size=12).filter(lambda x: sum(x) >= 2)


@quick
@given(sizes=lengths, length=st.integers(2, 17))
def test_validation_rows_equal_the_naive_ones(sizes, length):
    memory = Memory(sizes)
    rows = ConcatRows(memory, length, None, pad=-1)
    naive = naive_rows(memory.documents, length, range(len(sizes)), 0, len(rows), wrap=False)
    for i, expected in enumerate(naive):
        np.testing.assert_array_equal(as_array(rows[i]), expected)


@quick
@given(sizes=lengths, length=st.integers(2, 17), seed=st.integers(0, 9), epoch=st.integers(0, 3))
def test_training_rows_equal_the_naive_ones(sizes, length, seed, epoch):
    memory = Memory(sizes)
    if sum(sizes) < length:
        with pytest.raises(UserError, match="fewer than one row"):
            ConcatRows(memory, length, seed)
        return
    rows = ConcatRows(memory, length, seed)
    plan, count = rows._plan(epoch), rows.epoch_rows
    assert sorted(plan.order_D) == list(range(len(sizes)))
    assert sorted(plan.rows) == list(range(count))
    naive = naive_rows(memory.documents, length, plan.order_D, plan.offset, count, wrap=True)
    for i in range(count):
        np.testing.assert_array_equal(as_array(rows[epoch * count + i]), naive[plan.rows[i]])


@quick
@given(sizes=lengths, length=st.integers(2, 17))
def test_validation_predicts_every_token_once(sizes, length):
    memory = Memory(sizes)
    rows = ConcatRows(memory, length, None)
    trained = [row["targets"][row["weights"] > 0] for row in map(rows.__getitem__, range(len(rows)))]
    expected = [t for d in memory.documents for t in d[1:]]  # a document's first has no context
    assert sorted(np.concatenate(trained)) == expected


@quick
@given(sizes=lengths, length=st.integers(2, 17), seed=st.integers(0, 9))
def test_an_epoch_reads_every_token_once_but_for_less_than_a_row(sizes, length, seed):
    if sum(sizes) < length:
        return
    rows = ConcatRows(Memory(sizes), length, seed)
    for epoch in range(2):
        ids = range(epoch * rows.epoch_rows, (epoch + 1) * rows.epoch_rows)
        counts = Counter(t for i in ids for t in rows[i]["tokens"].tolist())
        assert set(counts.values()) == {1}
        assert sum(sizes) - len(counts) < length


def test_epochs_differ_and_seeds_differ():
    memory = Memory([20, 30, 25, 40])
    a, b = ConcatRows(memory, 8, 0), ConcatRows(memory, 8, 1)
    first = [tuple(a[i]["tokens"]) for i in range(a.epoch_rows)]
    second = [tuple(a[a.epoch_rows + i]["tokens"]) for i in range(a.epoch_rows)]
    other = [tuple(b[i]["tokens"]) for i in range(b.epoch_rows)]
    assert set(first) != set(second)
    assert first != other
    again = ConcatRows(memory, 8, 0)
    assert [tuple(again[i]["tokens"]) for i in reversed(range(len(first)))] == first[::-1]


def test_one_huge_document_is_mixed_and_never_joined_to_itself():
    rows = ConcatRows(Memory([1000]), 10, 0)
    starts = [int(rows[i]["tokens"][0]) for i in range(100)]
    assert np.mean(np.abs(np.diff(starts)) == 10) < 0.1
    for i in range(100):
        row = rows[i]
        wrong = row["weights"] * (row["targets"] != row["tokens"] + 1)
        assert not wrong.any()


# ------------------------------------------------------------------------------------------ streams


def along(rows: StreamRows, stream: int, first: int, count: int) -> dict[str, np.ndarray]:
    """Steps of one stream laid end to end."""
    parts = [rows[(first + step) * rows.streams + stream] for step in range(count)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


stream_counts = st.integers(1, 5)


@quick
@given(sizes=lengths, length=st.integers(2, 9), streams=stream_counts)
def test_validation_streams_predict_every_token_once_in_order(sizes, length, streams):
    memory = Memory(sizes)
    rows = StreamRows(memory, length, streams, None, pad=-1)
    assert len(rows) % streams == 0
    laid = [along(rows, b, 0, len(rows) // streams) for b in range(streams)]
    joined = {n: np.concatenate([a[n][a["segments"] > 0] for a in laid]) for n in laid[0]}
    tokens = np.concatenate(memory.documents)
    np.testing.assert_array_equal(joined["tokens"], tokens[:-1])
    np.testing.assert_array_equal(joined["targets"], tokens[1:])
    documents = np.repeat(np.arange(len(sizes)), sizes)
    np.testing.assert_array_equal(joined["weights"], documents[:-1] == documents[1:])
    np.testing.assert_array_equal(joined["segments"], documents[:-1] + 1)
    np.testing.assert_array_equal(joined["positions"], np.concatenate([np.arange(n) for n in sizes])[:-1])
    for a in laid:
        padding = a["segments"] == 0
        assert not a["weights"][padding].any()
        assert (a["tokens"][padding] == -1).all()
        assert (np.diff(padding.astype(int)) >= 0).all()  # at the end


@quick
@given(sizes=lengths, length=st.integers(2, 9), streams=stream_counts, seed=st.integers(0, 9))
def test_training_streams_go_on_from_row_to_row_over_epochs(sizes, length, streams, seed):
    total = sum(sizes)
    if total // streams < length:
        with pytest.raises(UserError, match="fewer than one row"):
            StreamRows(Memory(sizes), length, streams, seed)
        return
    rows = StreamRows(Memory(sizes), length, streams, seed)
    steps = rows.epoch_rows // streams
    document = np.repeat(np.arange(len(sizes)), sizes)  # of each token, which is its own number
    begins = np.cumsum([0, *sizes])[:-1]
    for b in range(streams):
        a = along(rows, b, 0, 3 * steps)
        follows = np.diff(a["segments"]) == 0
        for epoch_end in range(steps * length, 3 * steps * length, steps * length):
            assert not follows[epoch_end - 1]  # an epoch ends, and so does what may be remembered
        np.testing.assert_array_equal(a["tokens"][1:][follows], a["tokens"][:-1][follows] + 1)
        assert (document[a["tokens"][1:]][follows] == document[a["tokens"][:-1]][follows]).all()
        # What is learned is the next token of the same document, and that is also the next input.
        learned = a["weights"] > 0
        np.testing.assert_array_equal(a["targets"][learned], a["tokens"][learned] + 1)
        inside = np.delete(np.arange(3 * steps * length - 1), np.arange(1, 3) * steps * length - 1)
        np.testing.assert_array_equal(a["targets"][inside], a["tokens"][inside + 1])
        np.testing.assert_array_equal(learned[inside], follows[inside])
        np.testing.assert_array_equal(a["positions"], a["tokens"] - begins[document[a["tokens"]]])
        stretches = a["segments"][np.flatnonzero(np.diff(a["segments"], prepend=-1))]
        assert len(set(stretches.tolist())) == len(stretches)  # a number never comes back
        assert a["segments"].min() >= 1


@quick
@given(sizes=lengths, length=st.integers(2, 9), streams=stream_counts, seed=st.integers(0, 9))
def test_an_epoch_of_streams_reads_no_token_twice(sizes, length, streams, seed):
    if sum(sizes) // streams < length:
        return
    rows = StreamRows(Memory(sizes), length, streams, seed)
    for epoch in range(2):
        ids = range(epoch * rows.epoch_rows, (epoch + 1) * rows.epoch_rows)
        counts = Counter(t for i in ids for t in rows[i]["tokens"].tolist())
        assert set(counts.values()) == {1}
        assert sum(sizes) - len(counts) < streams * length


def test_streams_differ_by_epoch_and_seed_and_say_so():
    memory = Memory([20, 30, 25, 40])
    a, b = StreamRows(memory, 8, 2, 0), StreamRows(memory, 8, 2, 1)
    assert a[0]["tokens"].tolist() != b[0]["tokens"].tolist()
    assert a[0]["tokens"].tolist() != a[a.epoch_rows]["tokens"].tolist()
    others = (b, StreamRows(memory, 8, 3, 0), StreamRows(memory, 9, 2, 0), ConcatRows(memory, 8, 0))
    assert len({rows.fingerprint for rows in (a, *others)}) == 5


def test_numbers_of_documents_stay_in_range_after_billions():
    rows = StreamRows(Memory([5, 6]), 4, 1, 0)
    far = 2**31 // 4  # epochs of four numbers each
    numbers = [rows[epoch * rows.epoch_rows]["segments"] for epoch in (far - 1, far, far + 1)]
    assert all(n.min() >= 1 for n in numbers)


# ---------------------------------------------------------------------------------------- first fit


@quick
@given(sizes=st.lists(st.integers(1, 20), max_size=60), bins=st.integers(1, 8))
def test_first_fit_loses_nothing_and_overfills_nothing(sizes, bins):
    rows = first_fit(sizes, 20, bins)
    assert sorted(i for row in rows for i in row) == list(range(len(sizes)))
    assert all(0 < sum(sizes[i] for i in row) <= 20 for row in rows)


def test_first_fit_wastes_no_more_than_grains():
    rng = np.random.default_rng(0)
    sizes = np.minimum(rng.lognormal(5, 0.9, 3000).astype(int) + 2, 512).tolist()
    elements = [{"x": np.ones(n, np.int32)} for n in sizes]
    parent = grain.MapDataset.source(elements).to_iter_dataset()
    packed = grain.experimental.FirstFitPackIterDataset(
        parent, length_struct={"x": 512}, num_packing_bins=64, shuffle_bins=False
    )
    grains, ours = sum(1 for _ in packed), len(first_fit(sizes, 512, 64))
    assert ours <= grains
    assert sum(sizes) / (ours * 512) > 0.95


def make_examples(sizes: list[int]) -> list[Example]:
    """Each token a number of its own; every third token is given, the others are trained."""
    ids = iter(range(1, 10**6))
    tokens = [[next(ids) for _ in range(n)] for n in sizes]
    return [Example(t, [0.0, *(float(x % 3 > 0) for x in t[1:])]) for t in tokens]


@quick
@given(
    sizes=st.lists(st.integers(2, 17), min_size=1, max_size=40),
    bins=st.integers(1, 6),
    seed=st.one_of(st.none(), st.integers(0, 5)),
)
def test_packed_examples_keep_every_target_with_its_weight_and_nothing_else(sizes, bins, seed):
    examples = make_examples(sizes)
    rows = PackedExamples([Item.of(e) for e in examples], 16, bins, seed)
    expected = Counter(
        (e.tokens[i], e.tokens[i + 1], e.weights[i + 1], i)
        for e in examples
        for i in range(len(e.tokens) - 1)
    )
    start = 0
    for epoch in range(1 if seed is None else 3):
        count = len(rows._plan(epoch))
        seen: Counter = Counter()
        for row in map(rows.__getitem__, range(start, start + count)):
            used = row["segments"] > 0
            names = ("tokens", "targets", "weights", "positions")
            seen.update(zip(*(row[n][used].tolist() for n in names), strict=True))
            for name in ("tokens", "targets", "weights", "positions"):
                assert not row[name][~used].any()
            for s in range(1, row["segments"].max() + 1):  # a segment is one whole example
                here = np.flatnonzero(row["segments"] == s)
                assert (np.diff(here) == 1).all()
                assert row["positions"][here].tolist() == list(range(len(here)))
        assert seen == expected
        start += count


def test_packed_epochs_are_reached_in_any_order():
    examples = make_examples([2 + i % 15 for i in range(50)])
    items = [Item.of(e) for e in examples]
    rows, again = PackedExamples(items, 16, 4, 0), PackedExamples(items, 16, 4, 0)
    forward = [rows[i]["tokens"].tolist() for i in range(120)]
    assert again[119]["tokens"].tolist() == forward[119]
    assert again[3]["tokens"].tolist() == forward[3]
    assert forward[:25] != forward[25:50]
