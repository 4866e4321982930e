"""The stream of batches: exact to resume, the same for any number of processes, complete."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from jaxgpt.batch import Batch
from jaxgpt.config import Chat, Text
from jaxgpt.data.corpus import Corpus
from jaxgpt.data.loader import MaskCheck, train_iterator, validation_batches
from jaxgpt.errors import UserError
from jaxgpt.text.tokenizer import ByteTokenizer

BYTES = ByteTokenizer()
FIELDS = [f.name for f in dataclasses.fields(Batch) if f.name.endswith("_BT") and f.name != "types_BT"]


def arrays(batch: Batch) -> np.ndarray:
    return np.stack([np.asarray(getattr(batch, name), np.float64) for name in FIELDS])


@pytest.fixture(scope="module")
def chat_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("chat") / "chat.jsonl"
    records = [
        {"prompt": f"Repeat {i}: " + "ab " * (i % 9), "completion": "ab " * (1 + i % 7)} for i in range(200)
    ]
    path.write_text("\n".join(map(json.dumps, records)))
    return path


@pytest.fixture(params=["text", "streams", "chat"])
def data(request, corpus, chat_file, tmp_path):
    if request.param != "chat":
        return Text(path=str(corpus), contiguous=request.param == "streams")
    BYTES.save(tmp_path / "tok")
    return Chat(train=(str(chat_file),), tokenizer=str(tmp_path / "tok"), bins=8)


def iterator(data, batch_size=4, seed=3, **kwargs):
    return train_iterator(data, BYTES, model_length=64, batch_size=batch_size, seed=seed, **kwargs)


def take(stream, n):
    return [arrays(next(stream)) for _ in range(n)]


def test_resuming_anywhere_gives_the_same_stream(data):
    stream = iterator(data)
    states, whole = [], []
    for _ in range(150):  # several epochs of both kinds
        states.append(json.loads(json.dumps(stream.get_state())))
        whole += take(stream, 1)
    for cut in (0, 1, 37, 149):
        fresh = iterator(data)
        fresh.set_state(states[cut])
        for expected, got in zip(whole[cut : cut + 5], take(fresh, len(whole[cut : cut + 5])), strict=True):
            np.testing.assert_array_equal(got, expected)
        stream.set_state(states[cut])  # and going back on the same iterator
        np.testing.assert_array_equal(take(stream, 1)[0], whole[cut])
    stream.close()


def test_worker_processes_give_the_same_stream(corpus):
    plain = iterator(Text(path=str(corpus)))
    workers = iterator(Text(path=str(corpus), workers=2))
    state = plain.get_state()
    plain.set_state(state | {"row": 20})
    workers.set_state(state | {"row": 20})
    np.testing.assert_array_equal(take(workers, 6), take(plain, 6))
    workers.close()


def test_any_number_of_processes_reads_the_same_global_batches(data):
    whole = take(iterator(data, batch_size=4), 40)
    for count in (2, 4):
        parts = [
            take(iterator(data, batch_size=4, part=range(i, i + 4 // count)), 40)
            for i in range(0, 4, 4 // count)
        ]
        for step in range(40):
            joined = np.concatenate([part[step] for part in parts], axis=1)
            np.testing.assert_array_equal(joined, whole[step])


def test_a_state_moves_between_numbers_of_processes(data):
    one = iterator(data, batch_size=4)
    take(one, 7)
    two = [iterator(data, batch_size=4, part=part) for part in ([0, 1], [2, 3])]
    for part in two:
        part.set_state(one.get_state())
    joined = np.concatenate([take(part, 1)[0] for part in two], axis=1)
    np.testing.assert_array_equal(joined, take(one, 1)[0])


def test_a_state_of_other_data_is_refused(data):
    state = iterator(data, seed=3).get_state()
    with pytest.raises(UserError, match=r"train\.seed"):
        iterator(data, seed=4).set_state(state)


def test_validation_predicts_every_token_once_in_any_layout(corpus):
    data, held = Text(path=str(corpus)), Corpus(corpus, "validation")
    expected = [held.read(i, 1, int(n)) for i, n in enumerate(held.lengths_D)]
    for count, size in ((1, 5), (2, 3), (4, 1)):
        layout = [
            validation_batches(
                data, BYTES, model_length=64, batch_size=size * count, part=range(i * size, (i + 1) * size)
            )
            for i in range(count)
        ]
        assert len({len(part) for part in layout}) == 1
        rows = []
        for step in zip(*layout, strict=True):
            for batch in step:
                assert batch.tokens_BT.shape == (size, 64)
                assert not batch.weights_BT[batch.segments_BT == 0].any()
                rows.append(batch.targets_BT[batch.weights_BT > 0])
        np.testing.assert_array_equal(np.concatenate(rows), np.concatenate(expected))
        again = [np.asarray(b.targets_BT) for b in layout[0]]
        assert len(again) == len(layout[0])


def test_streams_of_another_batch_size_are_refused(corpus):
    data = Text(path=str(corpus), contiguous=True)
    state = iterator(data).get_state()
    with pytest.raises(UserError, match=r"train\.batch_size"):
        iterator(data, batch_size=2).set_state(state)
    with pytest.raises(UserError, match="for each of 4000 streams"):
        iterator(data, batch_size=4000)


def test_validation_streams_are_the_same_for_any_number_of_processes(corpus):
    data = Text(path=str(corpus), contiguous=True)
    shape = {"model_length": 64, "batch_size": 4}
    whole = list(map(arrays, validation_batches(data, BYTES, **shape)))
    parts = [validation_batches(data, BYTES, **shape, part=part) for part in ([0, 1], [2, 3])]
    joined = [np.concatenate(both, axis=1) for both in zip(*(map(arrays, p) for p in parts), strict=True)]
    np.testing.assert_array_equal(joined, whole)
    held = Corpus(corpus, "validation")
    learned = sum((batch[2] > 0).sum() for batch in whole)
    assert learned == held.lengths_D.sum() - len(held)


def test_validation_dialogues_are_held_out_and_complete(chat_file):
    data = Chat(train=(str(chat_file),), validation_fraction=0.2, tokenizer="-", bins=4)

    def texts(batches):
        out = []
        for batch in batches:
            for row, segments in zip(batch.tokens_BT, batch.segments_BT, strict=True):
                out += [BYTES.decode(row[segments == s].tolist()) for s in range(1, segments.max() + 1)]
        return out

    held = texts(validation_batches(data, BYTES, model_length=64, batch_size=4))
    stream = iterator(data)
    seen = texts(next(stream) for _ in range(60))
    assert 20 <= len(held) == len(set(held)) <= 41
    assert not set(held) & set(seen)
    assert len(set(held) | set(seen)) == 200


def fake_batch(weights) -> Batch:
    weights = np.asarray(weights, np.float32)
    ints = {name: np.ones(weights.shape, np.int32) for name in FIELDS if name != "weights_BT"}
    return Batch(**ints, weights_BT=weights)


def feed(check: MaskCheck, weights) -> None:
    for _ in range(10):
        check(fake_batch(weights))


def test_a_mask_of_all_zeros_or_ones_stops_with_an_explanation():
    for weights, chat, message in (
        ([[0, 0]], True, "all zero"), ([[0, 0]], False, "all zero"), ([[1, 1]], True, "all one"),
    ):  # fmt: skip
        check = MaskCheck(chat)
        with pytest.raises(UserError, match=f"loss mask is {message}"):
            feed(check, weights)
    for weights, chat in (([[1, 1]], False), ([[0, 1]], True)):
        check = MaskCheck(chat)
        feed(check, weights)


def test_too_little_data_and_other_tokenizers_are_named(corpus, sentencepiece, tmp_path):
    with pytest.raises(UserError, match=r"fewer than one batch of 4000"):
        iterator(Text(path=str(corpus)), batch_size=4000)
    with pytest.raises(UserError, match="fewer than one row"):
        train_iterator(Text(path=str(corpus)), BYTES, model_length=10**6, batch_size=1, seed=0)
    with pytest.raises(UserError, match="another tokenizer"):
        train_iterator(Text(path=str(corpus)), sentencepiece, model_length=64, batch_size=1, seed=0)
    with pytest.raises(UserError, match="jaxgpt data prepare"):
        iterator(Text(path=str(tmp_path)))
