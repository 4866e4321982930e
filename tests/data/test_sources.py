"""Files as people name them: each once, what is no file called what it is, compressed ones read alike."""

from __future__ import annotations

import gzip
import importlib
import json
import os
import socket
import tempfile
from pathlib import Path

import pytest

from jaxgpt.data import documents as documents_of
from jaxgpt.data import lines
from jaxgpt.data.documents import read_documents
from jaxgpt.data.lines import field_of
from jaxgpt.data.sources import Report, expand
from jaxgpt.errors import UserError

LINE = '{"text": "a"}\n'


def test_what_is_no_file_is_called_what_it_is(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    (tmp_path / "lost.jsonl").symlink_to("nowhere.jsonl")
    (tmp_path / "a.jsonl").write_text(LINE)
    said = {
        tmp_path / "pipe.jsonl": "is a FIFO, not a file",
        tmp_path / "loop.jsonl": r"is a broken link \(to .*Too many levels",
        tmp_path / "lost.jsonl": r"is a broken link \(to nowhere\.jsonl",
        tmp_path / "no.jsonl": r"no\.jsonl does not exist",
        tmp_path / "no*.jsonl": r"no\*\.jsonl matches no file",
        tmp_path / "no" / "*.jsonl": "does not exist",
        tmp_path / "a.jsonl" / "b.jsonl": "cannot be looked at .*Not a directory",
        "a\0b.jsonl": "cannot be looked at",
        ("x" * 300) + ".jsonl": "cannot be looked at .*too long",
        "/dev/null": "is a device, not a file",
        "": "a source is empty",
    }
    for source, words in said.items():
        with pytest.raises(UserError, match=words) as caught:
            expand([source])
        assert "does not exist" not in str(caught.value) or "does not exist" in words
    with tempfile.TemporaryDirectory() as short, socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{short}/s.jsonl")  # a path of at most 108 bytes
        with pytest.raises(UserError, match="is a socket, not a file"):
            expand([f"{short}/s.jsonl"])
        with pytest.raises(UserError, match=r"holds no file ending in .*\(but 1 a socket, not a file\)"):
            expand([short])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_without_rights_is_called_so(tmp_path):
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / "a.jsonl").write_text(LINE)
    inner.chmod(0)
    try:
        for source in (tmp_path, inner, inner / "a.jsonl", inner / "*.jsonl"):
            with pytest.raises(UserError, match=r"cannot be (listed|looked at) \(Permission denied\)"):
                expand([source])
    finally:
        inner.chmod(0o700)


def test_other_endings_are_counted_in_one_warning(tmp_path, caplog):
    (tmp_path / "sub").mkdir()
    for name in ("a.jsonl", "b.md", "sub/c.md", "sub/d.csv.gz", "README", ".hidden.md", "e.ndjson"):
        (tmp_path / name).write_text(LINE)
    os.mkfifo(tmp_path / "pipe.txt")
    for _ in range(2):
        assert expand([tmp_path]) == [str(tmp_path / "a.jsonl"), str(tmp_path / "e.ndjson")]
    (told,) = [r.message for r in caplog.records]
    assert told.startswith("5 files are of other kinds")
    for words in ("2 .md", "1 .csv.gz", "1 without an ending", "1 a FIFO"):
        assert words in told


def test_a_file_named_twice_is_read_once_and_said(tmp_path, caplog, monkeypatch):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.jsonl").write_text(LINE)
    (tmp_path / "b.jsonl").symlink_to("a.jsonl")
    os.link(tmp_path / "a.jsonl", tmp_path / "sub" / "c.jsonl")
    (tmp_path / "sub" / "up").symlink_to(tmp_path)  # a circle
    assert expand([tmp_path / "a.jsonl"]) == [str(tmp_path / "a.jsonl")]
    assert not caplog.records
    monkeypatch.chdir(tmp_path)
    for twice in (["a.jsonl", "a.jsonl"], ["a.jsonl", "./a.jsonl"], ["a.jsonl", "b.jsonl"], ["*.jsonl"]):
        caplog.clear()
        assert len(expand(twice)) == 1
    assert len(expand([tmp_path])) == 1
    assert "named more than once" in caplog.text
    (tmp_path / "data[1].jsonl").write_text(LINE)  # a name that looks like a pattern
    assert expand(["data[1].jsonl"]) == ["data[1].jsonl"]


def test_links_to_folders_are_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.jsonl").write_text(LINE)
    (tmp_path / "named").mkdir()
    (tmp_path / "named" / "here").symlink_to(tmp_path / "real")
    assert expand([tmp_path / "named"]) == [str(tmp_path / "named" / "here" / "a.jsonl")]


def _zstd():
    for name in ("compression.zstd", "backports.zstd"):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    return None


def _packed(path: Path, data: bytes, ending: str) -> Path:
    if ending == ".zst":
        library = _zstd()
        if library is None:
            pytest.skip("no Zstandard library is installed")
        data = library.compress(data)
    path = path.with_name(path.name + ending)
    path.write_bytes(gzip.compress(data) if ending == ".gz" else data)
    return path


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_compressed_files_give_what_they_hold(ending, tmp_path, monkeypatch):
    monkeypatch.setattr(documents_of, "DOCUMENT_BYTES", 1000)
    text = "\ufeff你好 世界 hello\n" * 300 + "é" * 3001
    plain = tmp_path / "a.txt"
    plain.write_text(text, "utf-8")
    packed = _packed(tmp_path / "b.txt", plain.read_bytes(), ending)
    assert list(read_documents([str(packed)])) == list(read_documents([str(plain)]))
    packed = _packed(tmp_path / "c.ndjson", LINE.encode() * 5, ending)
    assert list(read_documents([str(packed)])) == ["a"] * 5
    for cut in (4, packed.stat().st_size - 5):
        (tmp_path / f"torn.jsonl{ending}").write_bytes(packed.read_bytes()[:cut])
        with pytest.raises(UserError, match="is damaged"):
            list(read_documents([str(tmp_path / f"torn.jsonl{ending}")]))


def test_a_missing_library_is_one_sentence(tmp_path):
    if _zstd() is not None:
        pytest.skip("a Zstandard library is installed")
    (tmp_path / "a.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd....")
    with pytest.raises(UserError, match=r"needs a Zstandard library.*jaxgpt\[zstd\]"):
        list(read_documents([str(tmp_path / "a.jsonl.zst")]))


def test_a_line_too_long_is_bad_and_the_next_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "LINE_BYTES", 1 << 10)
    path = tmp_path / "a.jsonl"
    path.write_text(LINE + json.dumps({"text": "x" * (3 << 20)}) + "\n" + LINE)
    report = Report()
    assert list(documents_of.read_span(documents_of.cut(str(path), 1 << 30)[0], "text", report)) == ["a", "a"]
    assert report.examples == [f"{path}:2: the line is longer than 0 MiB"]


def test_paths_of_fields():
    record = {"a": {"b": [{"c": "x"}, {"c": "y"}]}, "a.b": "whole", "n": None}
    assert field_of(record, "a.b") == "whole"  # a name comes before a path
    assert field_of(record, "a.b[1].c") == "y"
    for name, words in {
        "a.c": "no field 'a.c'; did you mean|no field 'a.c'; allowed: b",
        "a.b[7].c": "step 2 of it is list of 2",
        "n.x": "step 1 of it is null",
        "a.b.c": "step 2 of it is list",
        "[0]": "no field",
        "a..b": "no field 'a..b'",
    }.items():
        with pytest.raises(ValueError, match=words):
            field_of(record, name)


def test_parquet_columns_and_lines_may_be_nested(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    records = [{"meta": {"text": f"t{i}", "n": i}} for i in range(3)]
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for name in ("a.parquet", "b.jsonl"):
        assert list(read_documents([str(tmp_path / name)], field="meta.text")) == ["t0", "t1", "t2"]
    with pytest.raises(UserError, match=r"has no column 'text'; it has meta"):
        list(read_documents([str(tmp_path / "a.parquet")]))
