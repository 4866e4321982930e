"""Canaries are planted as listed; figures of safety, their limits, and the page."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_evals import MODEL, TEXT, save_run

from jaxgpt.config import Text
from jaxgpt.data.canaries import make_canaries, planted, read_canaries
from jaxgpt.data.corpus import Corpus
from jaxgpt.data.prepare import prepare
from jaxgpt.errors import UserError
from jaxgpt.evals.metrics import Interval
from jaxgpt.evals.safety import LIMITS, Safety, Unsafe, measure_safety, read_limits, write_page
from jaxgpt.sample.load import load_trained
from jaxgpt.text.tokenizer import ByteTokenizer


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of random parameters on text with canaries."""
    folder = tmp_path_factory.mktemp("safety")
    (folder / "a.txt").write_text(TEXT, "utf-8")
    prepare(
        [str(folder / "a.txt")],
        folder / "text",
        validation=0.3,
        split="tail",
        canary=3,
        canary_repeats=(1, 4),
    )
    return save_run(folder / "run", Text(path=str(folder / "text")), replace(MODEL, context=112))


def test_canaries_are_planted_as_often_as_listed(run):
    path = run.parent / "text"
    canaries, corpus = read_canaries(path), Corpus(path, "train")
    assert canaries["repeats"] == [1, 4, 1] and len(set(canaries["secrets"])) == 3
    texts = [
        ByteTokenizer().decode(corpus.read(i, 0, int(n)).tolist()) for i, n in enumerate(corpus.lengths_D)
    ]
    for secret, times in zip(canaries["secrets"], canaries["repeats"], strict=True):
        assert sum(secret in text for text in texts) == times
    assert len(texts) == 1 + 6 and len(planted(canaries)) == 6
    assert make_canaries(3, (1, 4)) == canaries
    validation = Corpus(path, "validation")
    assert len(validation) == 1  # none of them is held out


def test_what_a_random_model_does(run):
    found = measure_safety(load_trained(run), samples=1, documents=4)
    values = {name: figure.value for name, figure in found.figures.items()}
    assert values["memorised_training"] == values["canaries_extracted"] == 0
    assert 0 <= values["toxic_provoking"] <= 1 and "bias_gender_English" in values
    assert all(0 <= values[f"exposure_{times}"] <= math.log2(1001) for times in (1, 4))
    assert any("sentiment" in one for one in found.missing)
    path = run / "eval" / "safety.html"
    write_page(path, load_trained(run), found, LIMITS)
    assert "Figures and limits" in path.read_text() and "http" not in path.read_text().split("</style>")[1]


def test_limits_that_are_passed_and_not(tmp_path):
    found = Safety(
        {"toxic_neutral": Interval(0.2, 0.1, 0.3)}, {"toxic_neutral": "share of toxic completions"}
    )
    assert found.failures({"toxic_neutral": 0.2}) == []
    assert found.failures({"toxic_neutral": 0.1}) == ["share of toxic completions is 0.200, above 0.1"]
    figures = {
        "bias_gender_English": Interval(-2.0, -3, -1),
        "exposure_4": Interval(float("nan"), None, None),
    }
    signed = Safety(figures, dict.fromkeys(figures, "a figure"))
    assert (
        len(signed.failures({"bias_gender_English": 1.0, "exposure_4": 3.0})) == 2
    )  # size counts; NaN fails
    (tmp_path / "l.json").write_text(json.dumps({"toxic": 1.0}))
    with pytest.raises(UserError, match="limits \\['toxic'\\]"):
        read_limits(str(tmp_path / "l.json"))
    own = {"exposure_16": 5.0, "bias_gender_English_sentiment": 0.1, "bias_gender_English": 1.0}
    (tmp_path / "l.json").write_text(json.dumps(own))
    assert read_limits(str(tmp_path / "l.json")) == own
    assert read_limits("") == LIMITS and Unsafe("x").exit_code == 5
