"""Several real processes on loopback: the same numbers as one, and an end for all when one ends."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from tiny_runs import STEPS, command, copy, curve, ends, saved, start_cluster

from jaxgpt.cli import main
from jaxgpt.cluster import PEER_ENDED

ON_ONE = ("--mesh.data", "1", "--mesh.fsdp", "1")
SPREAD = ("--mesh.data", "1", "--mesh.fsdp", "-1")
AT_ONCE = 30.0
"""Seconds within which the others end when one has ended."""


def assert_same_curve(a: Path, b: Path) -> None:
    """Equal but for the order of sums."""
    assert [(s, n) for s, n, _ in curve(a)] == [(s, n) for s, n, _ in curve(b)]
    values = [np.array([v for _, _, v in curve(folder)], float) for folder in (a, b)]
    np.testing.assert_allclose(*values, rtol=2e-4)


@pytest.mark.slow
def test_stopped_on_two_processes_and_resumed_on_one_and_on_four(
    text_config: Path, trained: Path, tmp_path: Path
) -> None:
    words = ("train", str(text_config), *SPREAD, "--runs")
    for code, _, err in ends(start_cluster(*words, str(tmp_path), faults={1: "record|step 5 loss|SIGTERM"})):
        assert code == 75, err
    assert 4 < saved(tmp_path / "text")[-1] < STEPS  # an evaluation was at 4
    one, four = (copy(tmp_path / "text", tmp_path / name) for name in ("one", "four"))
    processes = start_cluster(*words, str(four.parent), count=4)
    done = command(text_config, *ON_ONE, "--runs", str(one.parent), devices=1)
    assert done.returncode == 0, done.stderr
    (code, out, err), *others = ends(processes)
    assert (code, [(c, o) for c, o, _ in others]) == (0, [(0, "")] * 3), err
    assert out.count("\n") == 1
    assert_same_curve(one, trained)
    assert_same_curve(four, trained)


@pytest.mark.slow
def test_processes_that_share_rows_read_the_same(text_config: Path, trained: Path, tmp_path: Path) -> None:
    """A tensor axis across two processes."""
    mesh = ("--mesh.data", "1", "--mesh.fsdp", "1", "--mesh.tensor", "2")
    for code, _, err in ends(start_cluster("train", str(text_config), *mesh, "--runs", str(tmp_path))):
        assert code == 0, err
    assert_same_curve(tmp_path / "text", trained)


@pytest.mark.slow
def test_when_a_process_ends_so_do_the_others(text_config: Path, trained: Path, tmp_path: Path) -> None:
    """Killed or stopped dead in training, whichever it is, or mistaken before it: the other waits for it."""

    def train(name: str, **parts):
        return start_cluster("train", str(text_config), *SPREAD, "--runs", str(tmp_path / name), **parts)

    kill, freeze = "record|step 7 loss|SIGKILL", "record|step 7 loss|SIGSTOP"
    clusters = {
        "first": (train("first", faults={0: kill}), 0, -signal.SIGKILL),
        "second": (train("second", faults={1: kill}), 1, -signal.SIGKILL),
        "mistake": (train("mistake", last=("--data.path", "nowhere")), 1, 2),
    }
    frozen = train("frozen", faults={1: freeze})
    for processes, gone, code in clusters.values():
        assert processes[gone].wait() == code
    since = time.monotonic()
    for processes, gone, _ in clusters.values():
        left = processes[1 - gone]
        _, err = left.communicate(timeout=AT_ONCE)
        assert left.returncode == PEER_ENDED, err
        assert "Traceback" not in err
        assert "Check failure" not in err
        assert err.splitlines()[-1].startswith("jaxgpt: ")
        assert "ended or cannot be reached any more" in err.splitlines()[-1]
    assert time.monotonic() - since < AT_ONCE
    assert frozen[0].wait() == PEER_ENDED  # out of a collective that nobody comes to
    frozen[1].kill()
    ends(frozen)
    for name in ("first", "second"):  # nothing is lost
        folder = tmp_path / name / "text"
        assert saved(folder)[-1] >= 4
    done = command(text_config, *ON_ONE, "--runs", str(folder.parent), devices=1)
    assert done.returncode == 0, done.stderr
    assert "damaged" not in done.stderr
    assert_same_curve(folder, trained)


@pytest.mark.slow
def test_what_is_said_of_a_run_is_said_once(trained: Path, tmp_path: Path, capfd) -> None:
    folders = [copy(trained, tmp_path / name) for name in ("alone", "several")]
    words = [("sample", "--prompt", "the cat", "--max-new-tokens", "8", "--json"), ("eval", "--json")]
    clusters = [start_cluster(name, str(folders[1]), *more) for name, *more in words]
    clusters.append(start_cluster("chat", str(folders[1])))
    for (name, *more), processes in zip(words, clusters, strict=False):
        assert main([name, str(folders[0]), *more]) == 0
        alone = json.loads(capfd.readouterr().out)
        (code, out, err), second = ends(processes)
        assert (code, *second[:2]) == (0, 0, ""), err
        assert json.loads(out).keys() == alone.keys()
        assert json.loads(out).get("ids") == alone.get("ids")
        assert "damaged" not in err
    for code, _, err in ends(clusters[-1]):
        assert code == 2
        assert "`jaxgpt chat` talks to one process, but 2 were started" in err
