"""Prepared folders, finished or not, damaged at random; and disks that are full."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from damage import damaged, damaged_copy, right_or_refused
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt.data import jobs
from jaxgpt.data.corpus import Corpus
from jaxgpt.data.prepare import prepare
from jaxgpt.data.train_tokenizer import train_tokenizer
from jaxgpt.errors import UserError

quick = settings(max_examples=120, deadline=None, derandomize=True, database=None)


def held(folder: Path) -> list[bytes]:
    """Every document of a prepared folder."""
    found = []
    for split in ("train", "validation"):
        corpus = Corpus(folder, split)
        found += [corpus.read(i, 0, int(n)).tobytes() for i, n in enumerate(corpus.lengths_D)]
    return found


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"number {i} " * (1 + i % 40)}) + "\n" for i in range(60)))
    return path


@pytest.fixture(scope="module")
def whole(source: Path) -> Path:
    prepare([str(source)], source.parent / "whole", validation=0.3, workers=1)
    shutil.rmtree(source.parent / "whole" / "tokenizer")  # others' business
    return source.parent / "whole"


@pytest.fixture(scope="module")
def parts(source: Path, whole: Path) -> Path:
    """One stopped after its only job, before its shards were moved."""
    folder = source.parent / "parts"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxgpt.data.prepare._assemble", _stop)
        with pytest.raises(UserError, match="stopped here"):
            prepare([str(source)], folder, validation=0.3, workers=1)
    return folder


def _stop(*_: object) -> None:
    raise OSError("stopped here")


@quick
@given(data=st.data())
def test_a_damaged_corpus_reads_right_or_is_refused(whole: Path, data: st.DataObject) -> None:
    expected = held(whole)
    with damaged_copy(whole, data.draw(damaged(whole, 1))) as folder, right_or_refused():
        assert held(folder) == expected


@settings(quick, max_examples=40)
@given(data=st.data())
def test_damaged_work_is_done_again_or_refused(
    source: Path, whole: Path, parts: Path, data: st.DataObject
) -> None:
    edits = data.draw(damaged(parts / ".work", 1))
    with damaged_copy(parts / ".work", edits) as work, right_or_refused():
        prepare([str(source)], work.parent, validation=0.3, workers=1)
        assert held(work.parent) == held(whole)


def test_a_damaged_manifest_says_how_to_replace_it(source: Path, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "out")
    (tmp_path / "out" / "manifest.json").write_text('["no manifest"]')
    with pytest.raises(UserError, match=r"manifest\.json is damaged .*--overwrite"):
        prepare([str(source)], tmp_path / "out", validation=0.3, workers=1)
    prepare([str(source)], tmp_path / "out", validation=0.3, workers=1, overwrite=True)
    assert held(tmp_path / "out") == held(whole)


def test_a_shard_lies_in_its_folder(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    manifest["splits"]["train"]["shards"][0]["file"] = "../../other.arrayrecord"
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"splits\.train\.shards\[0\]\.file"):
        Corpus(tmp_path / "out", "train")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_is_one_sentence(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer of shards writes to the device that is always full."""
    real = jobs._Split.__init__

    def full(self: jobs._Split, path: Path, dtype: object) -> None:
        path.symlink_to("/dev/full")
        real(self, path, dtype)  # type: ignore[arg-type]

    monkeypatch.setattr(jobs._Split, "__init__", full)
    with pytest.raises(UserError, match=r"writing .*out failed \(.*No space left.*same command"):
        prepare([str(source)], tmp_path / "out", validation=0.3, workers=1)


def test_a_folder_that_cannot_be_written_is_found_before_training(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"writing .*/file/tok failed \((Not a directory|File exists)\)"):
        train_tokenizer([str(source)], tmp_path / "file" / "tok", vocab_size=300)
