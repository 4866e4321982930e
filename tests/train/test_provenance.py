"""Where a run's numbers come from: a record for each start, the revision of our own repository."""

from __future__ import annotations

import json
import subprocess
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
from tiny_runs import text_run, write_config

from jaxgpt.cli import main
from jaxgpt.train import provenance


def git(folder: Path, *words: str) -> None:
    names = ("-c", "user.name=a", "-c", "user.email=a@b")
    subprocess.run(["git", "-C", str(folder), *names, *words], check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with a package in it, committed."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").write_text("x = 1\n")
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "one")
    return tmp_path


def test_the_revision_is_that_of_the_packages_own_repository(repository: Path) -> None:
    package = repository / "mine"
    clean = provenance.revision(package)
    assert clean and len(clean) == 12 and provenance._diff(package) == b""
    (package / "__init__.py").write_text("x = 2\n")
    assert provenance.revision(package) == f"{clean}-dirty"
    assert b"-x = 1\n+x = 2\n" in provenance._diff(package)
    installed = repository / ".venv" / "jaxgpt"  # inside somebody's repository, and none of its files
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("")
    assert provenance.revision(installed) is None and provenance._diff(installed) == b""


def test_no_repository_and_no_git_are_no_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "__init__.py").write_text("")
    assert provenance.revision(tmp_path) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.revision() is None


def test_each_start_leaves_a_record_and_a_run_can_be_run_again(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hush")
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_max_hlo_modules=1")
    config = write_config(text_run(corpus, tmp_path / "runs"), tmp_path)
    short = ["--train.steps", "3", "--optim.schedule", "constant"]
    monkeypatch.setattr("sys.argv", ["/somewhere/jaxgpt", "train", "a b.py", *short])
    folder = tmp_path / "runs" / "text"
    with redirect_stdout(StringIO()):
        assert main(["train", str(config), *short]) == 0
        assert main(["train", str(config), *short]) == 0  # it has ended: no start
        config.write_text(config.read_text() + "# longer\n")
        assert main(["train", str(config), "--train.steps", "5", "--optim.schedule", "constant"]) == 0
    place = folder / "provenance"
    records = [json.loads(path.read_text()) for path in sorted(place.glob("*.json"))]
    assert [path.name for path in sorted(place.glob("*.json"))] == ["1.json", "2.json"]
    assert records[0]["command"] == "jaxgpt train 'a b.py' --train.steps 3 --optim.schedule constant"
    assert records[0]["config"] == str(config) and records[0]["host"]
    assert records[0]["environment"]["XLA_FLAGS"] == "--xla_dump_max_hlo_modules=1"
    assert "hush" not in "".join(path.read_text() for path in place.iterdir())
    assert (place / "2.config.py").read_bytes() == config.read_bytes()
    assert (place / "1.config.py").read_text() + "# longer\n" == config.read_text()
    with redirect_stdout(StringIO()):
        assert main(["train", str(folder / "config.json"), "--name", "again"]) == 0
    assert json.loads((folder.with_name("again") / "config.json").read_text())["run"]["train"]["steps"] == 5


def test_a_long_diff_keeps_whole_files_and_names_the_others() -> None:
    sizes = {b"x": 10, b"y": 90, b"z": 5}
    parts = [b"diff --git a/%b b/%b\n" % (n, n) + b"+" * size + b"\n" for n, size in sizes.items()]
    kept, left = provenance.bounded(b"".join(parts), 80)
    assert kept == parts[0] + parts[2]
    assert left == ["diff --git a/y b/y"]
    assert provenance.bounded(b"".join(parts), 500) == (b"".join(parts), [])
