"""A small trained tokenizer and a small prepared corpus, made once for the tests of this folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from story import story

from jaxgpt.data.prepare import prepare


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder prepared from 80 documents of very different lengths (some longer than a record)."""
    folder = tmp_path_factory.mktemp("corpus")
    sizes = [1 + (i * i * 13) % 60 for i in range(78)] + [1200, 2100]
    lines = [json.dumps({"text": story(i, n)}) for i, n in enumerate(sizes)]
    (folder / "a.jsonl").write_text("\n".join(lines) + "\n")
    prepare([str(folder / "a.jsonl")], folder / "out", validation=0.2, workers=1)
    return folder / "out"
