"""Exported programs: jax alone runs them, in a process that cannot import jaxgpt, to the same greedy ids."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from families import native_run
from tiny import MODERN

from jaxgpt.cli import main
from jaxgpt.config import Sampling
from jaxgpt.convert.commands import export
from jaxgpt.errors import UserError
from jaxgpt.sample.generate import Generator
from jaxgpt.sample.load import load_trained
from jaxgpt.text.tokenizer import ByteTokenizer

MODEL = replace(MODERN, vocab_size=ByteTokenizer().vocab_size + 3, context=32)
BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, *rest):
        assert not name.startswith("jaxgpt"), name
sys.meta_path.insert(0, Blocked())
sys.argv = sys.argv[1:]
import runpy
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def alone(folder: Path, *args: str) -> list[int]:
    """What generate.py prints in a process without this package."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "XLA_FLAGS")}
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, str(folder / "generate.py"), *args],
        capture_output=True, text=True, cwd=folder, env=env | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()]


def test_it_writes_the_same_ids_without_this_package(tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    native_run(run, MODEL)
    assert main(["export", str(run), str(out), "--format", "stablehlo"]) == 0
    trained = load_trained(run)
    generator = Generator(MODEL, trained.run.compute, trained.params, trained.tokenizer)
    prompt = [trained.tokenizer.control["<|bos|>"], *trained.tokenizer.encode("a cat")]
    (wanted,) = generator.generate([prompt], Sampling(temperature=0.0), max_new_tokens=12)
    assert alone(out, *map(str, prompt), "--count", "12") == list(wanted.ids)
    about = json.loads((out / "about.json").read_text())
    assert about["context"] == 32
    assert set(about["stop"]) == set(trained.tokenizer.stop_ids)
    assert "python generate.py" in (out / "README.md").read_text()
    assert (out / "tokenizer.json").is_file()


def test_bfloat16_and_what_is_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    native_run(run, MODEL)
    export(str(run), str(tmp_path / "out"), form="stablehlo", dtype="bfloat16")
    assert "bfloat16" in json.loads((tmp_path / "out" / "about.json").read_text())["dtypes"]
    assert alone(tmp_path / "out", "97", "98", "--count", "3")
    for asked, why in (({"dtype": "float16"}, "float32 or bfloat16"), ({"peft": True}, "--peft writes")):
        with pytest.raises(UserError, match=why):
            export(str(run), str(tmp_path / "no"), form="stablehlo", **asked)
