"""Filters of `jaxgpt data prepare`: near-duplicates planted are found, whatever the number of workers."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from jaxgpt.config.filters import Filters
from jaxgpt.data import prepare as module
from jaxgpt.data.corpus import Corpus
from jaxgpt.data.duplicates import find_duplicates, key_function
from jaxgpt.data.prepare import prepare
from jaxgpt.errors import UserError
from jaxgpt.files import read_json

WORDS = [f"w{i}" for i in range(400)]


def document(seed: int, length: int = 80) -> list[str]:
    return random.Random(seed).choices(WORDS, k=length)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 documents, of which the later ones hold an exact and three near copies of the first ones."""
    texts = [document(i) for i in range(36)]
    for i, changed in ((0, 0), (1, 1), (2, 2), (3, 3)):
        copy = list(texts[i])
        copy[40 : 40 + changed] = ["other"] * changed
        texts.append(copy)
    path = tmp_path_factory.mktemp("filters") / "a.jsonl"
    path.write_text("".join(json.dumps({"text": " ".join(words)}) + "\n" for words in texts))
    return path


def prepared(source: Path, out: Path, filters: Filters, **more) -> dict:
    prepare([str(source)], out, validation=0.1, split="tail", filters=filters, workers=1, **more)
    return read_json(out / "manifest.json", dict, "")


def test_planted_copies_are_dropped_and_counted(source, tmp_path):
    kinds = {"exact": 1, "near": 4}
    for kind, count in kinds.items():
        near = {"similarity": 0.7} if kind == "near" else {}
        manifest = prepared(source, tmp_path / kind, Filters(duplicates=kind, **near))
        assert manifest["filtered"]["duplicates"]["dropped"] == count
        assert manifest["splits"]["train"]["documents"] == 40 - count
        assert len(manifest["filtered"]["duplicates"]["examples"]) == min(count, 3)
    assert len(Corpus(tmp_path / "near", "train")) == 36


def test_different_documents_are_kept_and_the_first_copy_stays(tmp_path):
    texts = [" ".join(document(i)) for i in (0, 1, 0, 2)]
    config = Filters(duplicates="near")
    np.save(tmp_path / "a.npy", np.stack([key_function(config)(t) for t in texts[:2]]))
    np.save(tmp_path / "b.npy", np.stack([key_function(config)(t) for t in texts[2:]]))
    found = find_duplicates([tmp_path / "a.npy", tmp_path / "b.npy"], config)
    assert [part.tolist() for part in found] == [[False, False], [True, False]]


def test_the_same_bytes_for_any_number_of_jobs_under_way(source, tmp_path, monkeypatch):
    """One job or several, cut anywhere: the same documents stay."""
    filters = Filters(duplicates="near", similarity=0.7, min_chars=10)
    prepared(source, tmp_path / "one", filters)
    monkeypatch.setattr(module, "JOB_BYTES", (1000, 4000))
    prepared(source, tmp_path / "many", filters)
    corpora = [Corpus(tmp_path / name, "train") for name in ("one", "many")]
    one, many = ([c.read(i, 0, int(c.lengths_D[i])).tolist() for i in range(len(c))] for c in corpora)
    assert one == many
    manifests = [read_json(tmp_path / name / "manifest.json", dict, "") for name in ("one", "many")]
    assert len(manifests[1]["splits"]["train"]["shards"]) > 1
    assert manifests[0]["filtered"] == manifests[1]["filtered"]


def test_other_filters_are_other_settings(source, tmp_path, capsys):
    prepared(source, tmp_path / "a", Filters(min_chars=10))
    with pytest.raises(UserError, match="filters"):
        prepared(source, tmp_path / "a", Filters(min_chars=11))
    with pytest.raises(UserError, match="filters"):
        prepared(source, tmp_path / "a", Filters())
    assert "filter length: 0 of 40 dropped" in capsys.readouterr().err


def test_an_edited_list_of_words_is_another_setting(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": f"{w} one\n{w} two"}) + "\n" for w in "xyz")
    )
    words = tmp_path / "words.txt"
    words.write_text("x\n")
    filters, out = Filters(toxic_words=str(words)), tmp_path / "out"
    assert prepared(tmp_path / "a.jsonl", out, filters)["filtered"]["toxic lines"]["dropped"] == 1
    words.write_text("x\ny\n")
    with pytest.raises(UserError, match="filter_files"):
        prepared(tmp_path / "a.jsonl", out, filters)
    manifest = prepared(tmp_path / "a.jsonl", out, filters, overwrite=True)
    assert manifest["filtered"]["toxic lines"]["dropped"] == 2


def test_filters_that_drop_all_are_named(source, tmp_path):
    with pytest.raises(UserError, match=r"filters drop all documents \(length 40\)"):
        prepared(source, tmp_path / "a", Filters(min_chars=10**6))


def test_canaries_are_planted_how_often(source, tmp_path):
    with pytest.raises(UserError, match="--canary-repeats is empty"):
        prepared(source, tmp_path / "a", Filters(), canary=2, canary_repeats=())


@pytest.mark.parametrize("similarity", [0.1, 0.8, 1.0])
def test_near_duplicates_are_seldom_missed(tmp_path, similarity):
    """Pairs that agree in just that share of their permutations, or a little less."""
    chance, rows = np.random.default_rng(0), []
    least = int(np.ceil(similarity * 128))
    for agree in [least] * 100 + [least - 3] * 100:
        a, b = chance.integers(0, 2**32, (2, 128), dtype=np.uint64)
        same = chance.permutation(128)[:agree]
        b[same] = a[same]
        rows += [a, b]
    np.save(tmp_path / "a.npy", np.stack(rows))
    (found,) = find_duplicates([tmp_path / "a.npy"], Filters(duplicates="near", similarity=similarity))
    assert found[1:200:2].sum() >= 90 and not found[::2].any() and not found[201::2].any()
