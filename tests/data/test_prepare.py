"""`jaxgpt data prepare` against what it was given, killed half-way, and given nonsense."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxgpt.data import documents as documents_of
from jaxgpt.data import jobs, sources
from jaxgpt.data.corpus import Corpus
from jaxgpt.data.prepare import prepare
from jaxgpt.errors import UserError
from jaxgpt.text.load import load_tokenizer


def write_lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), "utf-8")
    return path


def documents(folder: Path, split: str) -> list[str]:
    """The texts of a prepared folder, read back through its own tokenizer."""
    corpus, tokenizer = Corpus(folder, split), load_tokenizer(folder / "tokenizer")
    texts = []
    for i, length in enumerate(corpus.lengths_D.tolist()):
        ids = corpus.read(i, 0, length)
        assert (ids[0], ids[-1]) == (tokenizer.control["<|bos|>"], tokenizer.control["<|eos|>"])
        assert not set(ids[1:-1].tolist()) & set(tokenizer.control.values())
        texts.append(tokenizer.decode(ids.tolist()))
    return texts


def both(folder: Path) -> list[str]:
    return documents(folder, "train") + documents(folder, "validation")


def digests(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


TEXTS = [f"Number {i}: " + "naïve 你好 😀\t\n" * (i % 50) for i in range(300)]


def test_every_format_gives_back_every_document(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tok")
    write_lines(tmp_path / "a.jsonl", TEXTS[:100])
    data = write_lines(tmp_path / "b", TEXTS[100:200]).read_bytes()
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(data))
    (tmp_path / "c.txt").write_bytes(b"\xef\xbb\xbf" + TEXTS[200].encode())
    expected = TEXTS[:201]
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        pass
    else:
        table = pyarrow.table({"text": TEXTS[201:]})
        pyarrow.parquet.write_table(table, tmp_path / "d.parquet", row_group_size=30)
        expected = TEXTS
    names = [str(tmp_path / "*.jsonl*"), str(tmp_path / "c.txt"), str(tmp_path)]
    prepare(names, tmp_path / "out", tokenizer=str(tmp_path / "tok"), validation=0.2, workers=1)
    assert sorted(both(tmp_path / "out")) == sorted(expected)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    for split in ("train", "validation"):
        part, held = manifest["splits"][split], documents(tmp_path / "out", split)
        assert part["documents"] == len(held)
        assert part["bytes"] == sum(len(t.encode()) for t in held)
        assert part["tokens"] == Corpus(tmp_path / "out", split).lengths_D.sum()
    assert manifest["tokenizer"]["digest"] == tokenizer.digest
    assert len(manifest["sources"]) == len(list(tmp_path.glob("*.*")))


def test_byte_ranges_cover_every_line_once_and_number_bad_ones(tmp_path):
    lines = [json.dumps({"text": "x" * (i % 40)}) for i in range(200)]
    lines[57], lines[130] = "{broken", ""
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines))  # no newline at the end
    whole = sources.Report()
    expected = list(documents_of.read_span(documents_of.cut(str(path), 10**9)[0], "text", whole))
    for size in (1, 7, 64, 1000):
        report = sources.Report()
        spans = documents_of.cut(str(path), size)
        assert [t for s in spans for t in documents_of.read_span(s, "text", report)] == expected
        assert report == whole
    assert whole.bad == 1
    assert whole.examples[0].startswith(f"{path}:58: not JSON")


def test_a_large_text_file_is_cut_at_line_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(documents_of, "DOCUMENT_BYTES", 1000)
    text = "你好 世界 hello\n" * 300 + "é" * 3001
    (tmp_path / "a.txt").write_text(text, "utf-8")
    parts = list(documents_of.read_documents([str(tmp_path / "a.txt")]))
    assert "".join(parts) == text
    assert len(parts) > 5
    assert all(len(p.encode()) <= 1000 for p in parts)
    assert parts[0].endswith("hello\n")


def test_long_documents_are_records_of_bounded_size(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "RECORD_TOKENS", 100)
    monkeypatch.setattr(jobs, "_PIECE", 333)
    tokenizer.save(tmp_path / "tok")
    text = "ab\ncd你 efg\n" * 500 + "x" * 1000
    (tmp_path / "a.txt").write_text(text, "utf-8")
    prepare([str(tmp_path / "a.txt")], tmp_path / "out", tokenizer=str(tmp_path / "tok"),
            validation=0.1, split="tail", workers=1)  # fmt: skip
    train, held = documents(tmp_path / "out", "train"), documents(tmp_path / "out", "validation")
    assert train[0] + held[0] == text
    assert len(train[0]) == int(len(text) * 0.9)  # nanoGPT's rule for tinyshakespeare
    corpus = Corpus(tmp_path / "out", "train")
    ids = corpus.read(0, 0, int(corpus.lengths_D[0]))
    for start, stop in ((0, 1), (99, 101), (100, 200), (250, 777)):
        np.testing.assert_array_equal(corpus.read(0, start, stop), ids[start:stop])


def test_copies_of_a_document_stay_on_one_side(tmp_path):
    write_lines(tmp_path / "a.jsonl", TEXTS[:60] * 3)
    prepare([str(tmp_path / "a.jsonl")], tmp_path / "out", validation=0.3, workers=1)
    train, held = documents(tmp_path / "out", "train"), documents(tmp_path / "out", "validation")
    assert not set(train) & set(held)
    assert len(train) + len(held) == 180


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """Files that make some 150 jobs when JOB_BYTES is small."""
    for k in range(3):
        write_lines(tmp_path / f"{k}.jsonl", [f"{k} {i} " + "word " * 200 for i in range(600)])
    return tmp_path


SMALL_JOBS = (12_000, 12_000)


def command(folder: Path, out: Path, workers: int) -> list[str]:
    code = (
        "from pathlib import Path\nfrom jaxgpt.data import jobs, prepare as p\n"
        "jobs._WORTH_A_PROCESS = 1\n"
        f"p.JOB_BYTES = {SMALL_JOBS}\n"
        f"if __name__ == '__main__': p.prepare([{str(folder)!r}+'/*.jsonl'], Path({str(out)!r}),"
        f" validation=0.1, workers={workers})\n"
    )
    script = folder / f"run{workers}.py"
    script.write_text(code)
    return [sys.executable, str(script)]


def test_killed_and_resumed_is_byte_identical(many):
    root = str(Path(__file__).resolve().parents[2])
    env = {**os.environ, "PYTHONPATH": root}
    subprocess.run(command(many, many / "whole", 1), check=True, env=env, capture_output=True)
    finished = 0
    for workers in (2, 1):
        process = subprocess.Popen(command(many, many / "cut", workers), env=env, stderr=subprocess.DEVNULL)
        work, before = many / "cut" / ".work", finished
        deadline = time.monotonic() + 60
        while finished < before + 3 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
            finished = len(list(work.glob("job-?????"))) if work.exists() else 0
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (many / "cut" / "manifest.json").exists(), "it ended before it was killed"
        finished = len(list(work.glob("job-?????")))
        assert finished >= before + 3
    subprocess.run(command(many, many / "cut", 1), check=True, env=env, capture_output=True)
    assert digests(many / "cut") == digests(many / "whole")
    assert not work.exists()


def test_a_crash_while_shards_are_moved_is_mended(many, monkeypatch):
    monkeypatch.setattr("jaxgpt.data.prepare.JOB_BYTES", SMALL_JOBS)
    arguments = ([str(many / "*.jsonl")], many / "out")
    real, calls = os.replace, []

    def fail_late(src, dst):
        calls.append(src)
        if str(dst).endswith("00020.arrayrecord"):
            raise OSError(28, "No space left on device")
        return real(src, dst)

    monkeypatch.setattr(os, "replace", fail_late)
    with pytest.raises(UserError, match=r"No space left.*same command"):
        prepare(*arguments, validation=0.1, workers=1)
    monkeypatch.setattr(os, "replace", real)
    monkeypatch.setattr(jobs, "run_job", None)  # nothing is tokenized again
    prepare(*arguments, validation=0.1, workers=1)
    assert len(both(many / "out")) == 1800


def test_a_finished_folder_is_left_alone_and_another_is_refused(tmp_path, capsys):
    write_lines(tmp_path / "a.jsonl", TEXTS)
    arguments = ([str(tmp_path / "a.jsonl")], tmp_path / "out")
    prepare(*arguments, validation=0.2, workers=1)
    before = digests(tmp_path / "out")
    prepare(*arguments, validation=0.2, workers=1)
    assert "already prepared" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"other settings \(validation\); .*--overwrite"):
        prepare(*arguments, validation=0.3, workers=1)
    assert digests(tmp_path / "out") == before
    prepare(*arguments, validation=0.3, workers=1, overwrite=True)
    assert len(documents(tmp_path / "out", "validation")) > 60
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match=r"not empty .*thesis\.tex"):
        prepare([str(tmp_path / "a.jsonl")], tmp_path / "other", overwrite=True, workers=1)


def test_overwriting_mends_a_damaged_folder(tmp_path, capsys):
    write_lines(tmp_path / "a.jsonl", TEXTS)
    arguments = ([str(tmp_path / "a.jsonl")], tmp_path / "out")
    prepare(*arguments, validation=0.2, workers=1)
    whole = digests(tmp_path / "out")
    (tmp_path / "out" / "train" / "lengths.npy").unlink()
    with pytest.raises(UserError, match=r"lengths\.npy is missing; run `jaxgpt data prepare --overwrite`"):
        Corpus(tmp_path / "out", "train")
    prepare(*arguments, validation=0.2, workers=1, overwrite=True)
    assert digests(tmp_path / "out") == whole


def test_unfinished_work_stands_in_no_ones_way(tmp_path, caplog):
    """What was mended after a failure is other sources or settings; nothing whole is there to lose."""
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"content": text}) for text in TEXTS))
    with pytest.raises(UserError, match="no field 'text'"):
        prepare([str(tmp_path / "a.jsonl")], tmp_path / "out", validation=0.2, workers=1)
    prepare([str(tmp_path / "a.jsonl")], tmp_path / "out", validation=0.2, workers=1, field="content")
    assert "unfinished work" in caplog.text and "(field)" in caplog.text
    assert (tmp_path / "out" / "manifest.json").is_file()


def test_bad_lines_are_counted_and_too_many_fail(tmp_path, caplog):
    lines = [json.dumps({"text": t}) for t in TEXTS]
    lines[4:7] = ['{"txet": "x"}', '{"text": 7}', '["text"]']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    arguments = ([str(tmp_path / "a.jsonl")], tmp_path / "out")
    with pytest.raises(UserError, match=r"3 of 300 lines are bad.*a\.jsonl:5.*--max-bad"):
        prepare(*arguments, validation=0.2, max_bad=0.009, workers=1)
    assert "a.jsonl:5: no field 'text'; did you mean 'txet'?" in caplog.text
    prepare(*arguments, validation=0.2, max_bad=0.01, workers=1)
    for line in (5, 6, 7):
        assert f"a.jsonl:{line}: " in caplog.text
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["bad"] == 3
    assert len(both(tmp_path / "out")) == 297


def test_what_cannot_be_read_is_named(tmp_path):
    out = tmp_path / "out"
    cases = {
        "empty.txt": (b"", "empty.txt is empty"),
        "latin.txt": ("naïve".encode("latin-1"), r"latin.txt is not UTF-8 \(byte 0xef at offset 2"),
        "torn.jsonl.gz": (gzip.compress(b'{"text": "a"}\n' * 99)[:-9], "torn.jsonl.gz is damaged"),
        "no.parquet": (b"PAR1 not really", "no.parquet (is not a Parquet file|needs pyarrow)"),
        "a.csv": (b"a,b\n", "a.csv is of a kind"),
        "blank.jsonl": (b"\n\n", "hold no text"),
    }
    for name, (data, message) in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=message):
            prepare([str(tmp_path / name)], out / name, workers=1)
    with pytest.raises(UserError, match="does not exist"):
        prepare([str(tmp_path / "nothing.txt")], out / "x", workers=1)
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match="holds no file ending in"):
        prepare([str(tmp_path / "bare")], out / "x", workers=1)


def test_one_document_suggests_the_tail_split(tmp_path):
    (tmp_path / "a.txt").write_text("all the world is a stage " * 50)
    with pytest.raises(UserError, match=r"split.*--split tail"):
        prepare([str(tmp_path / "a.txt")], tmp_path / "out", workers=1)
    prepare([str(tmp_path / "a.txt")], tmp_path / "out", split="tail", workers=1)
    assert "".join(both(tmp_path / "out")) == "all the world is a stage " * 50


def test_two_at_once_are_refused(tmp_path):
    write_lines(tmp_path / "a.jsonl", TEXTS)
    held = jobs.locked(tmp_path / "out" / ".work")
    with held, pytest.raises(UserError, match="being prepared by another process"):
        prepare([str(tmp_path / "a.jsonl")], tmp_path / "out", workers=1)
