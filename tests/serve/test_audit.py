"""Whatever is done to an audit log shows, and a log goes on after a crash, a restart and a rotation."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgpt.cli import main
from jaxgpt.errors import UserError
from jaxgpt.serve.audit import AuditLog, Head, Tampered, verify


def write(path: Path, count: int, start: int = 0) -> Head:
    log = AuditLog(path)
    for i in range(start, start + count):
        log.append({"request": f"r{i}", "text": "naïve \u2028 猫"})
    log.close()
    return log.head


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit.jsonl"


def lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def test_a_log_that_nobody_touched_is_whole(path: Path) -> None:
    head = write(path, 5)
    assert verify([path]) == (Head(0, "0" * 64), head)
    assert [json.loads(line)["number"] for line in lines(path)] == [1, 2, 3, 4, 5]
    assert write(path, 2, 5).number == 7  # a restart
    assert verify([path], head).head.number == 7


CHANGES: dict[str, tuple[Callable[[list[bytes]], list[bytes]], str]] = {
    "changed": (lambda k: [*k[:2], k[2].replace(b"r2", b"rX"), *k[3:]], r":3 is not as it was written"),
    "its link changed": (
        lambda k: [*k[:2], re.sub(rb'"previous": "..', b'"previous": "ab', k[2]), *k[3:]],
        r":3 is not as it was written",
    ),
    "the first changed": (lambda k: [k[0].replace(b"r0", b"rX"), *k[1:]], r":1 is not as it was written"),
    "the last changed": (lambda k: [*k[:-1], k[-1].replace(b"r5", b"rX")], r":6 is not as it was written"),
    "removed": (lambda k: [*k[:2], *k[3:]], r":3 is number 4 where 3 is due"),
    "the first removed": (lambda k: k[1:], ""),  # told as a log that begins later
    "moved": (lambda k: [*k[:2], k[3], k[2], *k[4:]], r":3 is number 4 where 3 is due"),
    "added": (lambda k: [*k[:2], k[1], *k[2:]], r":3 is number 2 where 3 is due"),
    "cut": (lambda k: k[:-1], "ends at number 5, but 6 lines were written"),
    "emptied": (lambda k: [], "ends at number 0, but 6 lines were written"),
    "cut short": (lambda k: [*k[:-1], k[-1][:-5]], ":6 is cut short"),
    "no JSON": (lambda k: [*k[:1], b"hello\n", *k[2:]], ":2 is no line of an audit log"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_first_line_that_was_tampered_with_is_named(path: Path, change: str) -> None:
    make, said = CHANGES[change]
    write(path, 6)
    path.write_bytes(b"".join(make(lines(path))))
    if not said:
        assert verify([path]).first.number == 1
        return
    with pytest.raises(Tampered, match=re.escape(str(path)) + ".*" + said):
        verify([path])


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(0, 255))
def test_any_byte_that_is_changed_shows(tmp_path_factory: pytest.TempPathFactory, at: int, to: int) -> None:
    path = tmp_path_factory.mktemp("log") / "audit.jsonl"
    write(path, 3)
    held = bytearray(path.read_bytes())
    same = held[at % len(held)] == to
    held[at % len(held)] = to
    path.write_bytes(held)
    if same:
        verify([path])
        return
    with pytest.raises(Tampered):
        verify([path])


def test_a_forged_log_shows_by_a_hash_that_was_noted_elsewhere(path: Path) -> None:
    noted = write(path, 4)
    for file in (path, path.with_name("audit.jsonl.head")):
        file.unlink()
    write(path, 3)
    verify([path])  # whole, as far as it says itself
    with pytest.raises(Tampered, match="but 4 lines were written"):
        verify([path], noted)
    write(path, 3, 3)
    with pytest.raises(Tampered, match=":4 is not as it was written"):
        verify([path], noted)


@pytest.mark.parametrize("way", ["moved", "copied and emptied"])
@pytest.mark.parametrize("running", [True, False])
def test_rotation_continues_the_chain(path: Path, way: str, running: bool) -> None:
    old = path.with_name("audit.jsonl.1")
    log = AuditLog(path)
    for i in range(3):
        log.append({"request": i})
    if not running:
        log.close()
    if way == "moved":
        path.rename(old)
    else:
        shutil.copy(path, old)
        os.truncate(path, 0)
    if not running:
        log = AuditLog(path)
    log.append({"request": 3})
    log.close()
    assert verify([old, path]).head == log.head
    assert len(lines(old)) == 3 and len(lines(path)) == 1
    assert verify([path]).first.number == 3
    with pytest.raises(Tampered, match="1 is number 4 where 3 is due"):
        old.write_bytes(b"".join(lines(old)[:-1]))
        verify([old, path])


def test_a_line_that_a_crash_cut_short_is_dropped(path: Path) -> None:
    write(path, 2)
    with open(path, "ab") as file:
        file.write(b'{"number": 3, "ti')
    assert write(path, 1, 2).number == 3
    verify([path])


def test_a_log_that_lost_lines_is_not_gone_on_with(path: Path) -> None:
    write(path, 3)
    path.write_bytes(b"".join(lines(path)[:2]))
    with pytest.raises(UserError, match=r"ends at number 2, but .*audit\.jsonl\.head says 3:"):
        AuditLog(path)


def test_one_process_writes(path: Path) -> None:
    log = AuditLog(path)
    with pytest.raises(UserError, match="in use by process"):
        AuditLog(path)
    log.close()
    AuditLog(path).close()


def test_threads_write_whole_lines(path: Path) -> None:
    log = AuditLog(path)

    def run() -> None:
        for _ in range(20):
            log.append({"x": "y" * 500})

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.close()
    assert verify([path]).head.number == 80


def test_a_process_that_is_killed_leaves_what_it_was_told_is_written(path: Path) -> None:
    code = (
        "import sys, pathlib\nfrom jaxgpt.serve.audit import AuditLog\n"
        "log = AuditLog(pathlib.Path(sys.argv[1]))\n"
        "while True:\n    log.append({'x': 'y'})\n    print(log.head.number, flush=True)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout
    told = [int(child.stdout.readline()) for _ in range(20)][-1]
    child.kill()
    child.wait()
    child.stdout.close()
    assert write(path, 1).number > told
    verify([path])


def test_a_full_disk_leaves_the_log_whole(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = AuditLog(path)
    log.append({"x": 1})
    whole = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda file, data: whole(file, data[:9]))
        with pytest.raises(OSError, match="No space"):
            log.append({"x": 2})
    log.append({"x": 3})
    log.close()
    assert verify([path]).head.number == 2


def test_the_command(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    head = write(path, 3)
    assert main(["serve", "audit", "verify", str(path), "--head", str(head)]) == 0
    assert capsys.readouterr().out == f"3 lines are as they were written; the last is {head}\n"
    path.write_bytes(b"".join(lines(path)[1:]))
    assert main(["serve", "audit", "verify", str(path)]) == 0
    assert "the 1 before them are in older files" in capsys.readouterr().out
    path.write_bytes(path.read_bytes().replace(b"r1", b"rX"))
    assert main(["serve", "audit", "verify", str(path)]) == 6
    assert f"{path}:1 is not as it was written" in capsys.readouterr().err
    assert main(["serve", "audit", "verify", str(path), "--head", "x"]) == 2
