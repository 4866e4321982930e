"""What a model writes as it learns is on record, and changes nothing of what it learns."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import assert_same
from tiny_runs import TRAIN, interrupt_at, restore, text_run

from jaxgpt.sample.generate import Generator
from jaxgpt.sample.settings import Sampling
from jaxgpt.train import loop


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_samples_are_those_of_the_checkpoint_and_change_no_step(
    corpus: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = text_run(corpus, tmp_path, train=replace(TRAIN, samples=2))
    interrupt_at(monkeypatch, 5, signal.SIGTERM)
    assert loop.train(run, progress=False).reason == "SIGTERM"
    assert [line["step"] for line in lines(run.folder)] == [4, 4]
    loop.train(run, progress=False)
    assert_same(restore(run.folder)[0].params, restore(trained)[0].params)
    made = lines(run.folder)
    assert [line["step"] for line in made] == [4, 4, 8, 8, 12, 12]
    generator = Generator.load(run.folder, which="newest")
    for line in made[-2:]:
        prompt = generator.tokenizer.encode(line["prompt"])
        ids = [generator.tokenizer.control["<|bos|>"], *prompt]
        again = generator.generate([ids], Sampling(temperature=0), max_new_tokens=48)
        assert line["text"].startswith(again[0].text[:4])
    page = (run.folder / "report.html").read_text()
    assert "Samples during training" in page and "Environment" in page
