"""A mix of sources: their weights' shares, each source's rows in order, and the same from any row on."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt.config import Text
from jaxgpt.data.loader import TrainIterator, ValidationBatches
from jaxgpt.data.mixing import MixedRows, floor_sum
from jaxgpt.data.packing import ENDLESS, Item, PackedExamples, Row
from jaxgpt.data.readers import rows_of
from jaxgpt.errors import UserError
from jaxgpt.text.tokenizer import ByteTokenizer

BYTES = ByteTokenizer()
quick = settings(deadline=None, max_examples=60)
WEIGHTS = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=5)
SEEDS = st.integers(0, 2**63 - 1)


class Numbered:
    """Endless rows, or `count` of them; each holds the source's number and its own."""

    length, pad, masked, epoch_rows = 2, 0, False, 10

    def __init__(self, number: int, count: int = ENDLESS) -> None:
        self.number, self.count, self.fingerprint = number, count, f"numbered-{number}-{count}"

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Row:
        assert 0 <= index < self.count
        return {"tokens": np.array([self.number, index], np.int32)}


def numbered(weights: Sequence[float], seed: int | None) -> MixedRows:
    return MixedRows([Numbered(i) for i in range(len(weights))], weights, seed)


@quick
@given(WEIGHTS, SEEDS, st.integers(1, 3000))
def test_shares_are_the_weights_and_each_source_goes_on_in_order(weights, seed, count) -> None:
    mix = numbered(weights, seed)
    given_so_far = [0] * len(weights)
    for n in range(count):
        source, row = mix[n]["tokens"]
        assert row == given_so_far[source]  # none dropped, none twice, none early
        given_so_far[source] += 1
    for share, rows in zip(np.array(weights) / sum(weights), given_so_far, strict=True):
        assert abs(rows - share * count) <= 2 + np.log2(count)


@quick
@given(WEIGHTS, SEEDS, st.integers(0, ENDLESS - 2))
def test_a_row_far_ahead_follows_the_one_before_it(weights, seed, n) -> None:
    """The closed form counts on without a gap: the sources together give exactly one row a step."""
    mix = numbered(weights, seed)
    source, row = mix.place(n)
    counts = [mix._beyond(a, n) - mix._beyond(b, n) for a, b in zip(mix._edges, mix._edges[1:], strict=False)]
    assert sum(counts) == n and counts[source] == row
    after, next_row = mix.place(n + 1)
    assert next_row == counts[after] + (after == source)


@given(st.integers(0, 60), st.integers(1, 50), st.integers(0, 200), st.integers(0, 200))
def test_floor_sum_is_the_sum_of_the_floors(n, m, a, b) -> None:
    assert floor_sum(n, m, a, b) == sum((a * i + b) // m for i in range(n))


@pytest.fixture(scope="module")
def mix(corpus) -> MixedRows:
    """Text cut into rows and examples packed into them, whose epochs end apart."""
    text = rows_of(Text(path=str(corpus)), BYTES, 64, 3, 4)
    items = [Item([5 + i] * (1 + i % 7), [6 + i] * (1 + i % 7), [1.0] * (1 + i % 7)) for i in range(90)]
    return MixedRows([text, PackedExamples(items, 64, 8, 3, text.pad)], [0.7, 0.3], 3)


def take(stream: TrainIterator) -> np.ndarray:
    """The next batch's arrays, stacked."""
    batch = next(stream)
    columns = (batch.tokens_BT, batch.targets_BT, batch.weights_BT, batch.segments_BT, batch.positions_BT)
    return np.stack([np.asarray(column, np.float64) for column in columns])


def test_resuming_at_any_row_goes_on_as_if_nothing_had_happened(mix) -> None:
    stream, states, whole = TrainIterator(mix, 4, None, 0), [], []
    for _ in range(60):
        states.append(json.loads(json.dumps(stream.get_state())))
        whole.append(take(stream))
    for cut in (0, 1, 17, 59):
        fresh = TrainIterator(pickle.loads(pickle.dumps(mix)), 4, None, 0)
        fresh.set_state(states[cut])
        np.testing.assert_array_equal(take(fresh), whole[cut])
        two = [
            TrainIterator(mix, 4, part, 0) for part in ((0, 1), (2, 3))
        ]  # and in another number of processes
        for part in two:
            part.set_state(states[cut])
        np.testing.assert_array_equal(np.concatenate([take(part) for part in two], axis=1), whole[cut])
        for part in (fresh, *two):
            part.close()
    stream.close()


def test_a_state_of_another_mix_is_refused(mix) -> None:
    other = MixedRows(mix.sources, [0.6, 0.4], mix.seed)
    with pytest.raises(UserError, match="stopped in the data mix-"):
        TrainIterator(other, 4, None, 0).set_state(TrainIterator(mix, 4, None, 0).get_state())


def test_validation_of_a_mix_is_every_row_of_every_source_once() -> None:
    mix = MixedRows([Numbered(0, 3), Numbered(1, 1), Numbered(2, 5)], [1, 1, 1], None)
    expected = [(0, 0), (0, 1), (0, 2), (1, 0), *((2, i) for i in range(5))]
    assert [tuple(mix[n]["tokens"].tolist()) for n in range(len(mix))] == expected


def test_sources_with_columns_of_their_own_fill_each_others(corpus) -> None:
    class Scored(Numbered):
        def __getitem__(self, index: int) -> Row:
            return super().__getitem__(index) | {"reward": np.float32(index + 1)}

    rows = [MixedRows([Numbered(0), Scored(1)], [1, 1], 0)[n] for n in range(20)]
    assert all(row["reward"] == (row["tokens"][1] + 1 if row["tokens"][0] else 0) for row in rows)


def test_extra_columns_reach_the_batch_and_are_zero_on_padding() -> None:
    class Pairs(Numbered):
        def __getitem__(self, index: int) -> Row:
            row = {name: np.ones(2, np.int32) for name in ("tokens", "targets", "segments", "positions")}
            row |= {"weights": np.ones(2, np.float32), "side": np.int32(1 + index % 2)}
            return row | {"reference": np.full(2, -1.5, np.float32)}

    batches = list(ValidationBatches(Pairs(0, 3), 2))
    assert [batch.extra["side"].tolist() for batch in batches] == [[1, 2], [1, 0]]
    np.testing.assert_array_equal(batches[1].extra["reference"], [[-1.5, -1.5], [0, 0]])
    assert not batches[1].segments_BT[1].any()


def test_what_cannot_be_mixed_is_named(corpus) -> None:
    class Long(Numbered):
        length = 3

    streams = rows_of(Text(path=str(corpus), contiguous=True), BYTES, 64, 0, 2)
    for sources, weights, words in (
        ([], [], "0 sources have the weights"),
        ([Numbered(0)], [0.0], r"1 sources have the weights \[0.0\]"),
        ([Numbered(0), Numbered(1)], [1.0], "2 sources have the weights"),
        ([Numbered(0), Long(1)], [1, 1], r"sources of one mix have the length \[2, 3\]"),
        ([streams], [1.0], "cannot be mixed"),
    ):
        with pytest.raises(UserError, match=words):
            MixedRows(sources, weights, 0)
