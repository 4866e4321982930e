"""Run folders that an older jaxgpt left at step 4 of 8 still work: goldens/make_old_run.py made them."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxgpt.cli import main
from jaxgpt.config import GPT, Bert, Classifier, TransformerXL, load
from jaxgpt.evals.loss import validation_loss
from jaxgpt.sample.generate import Generator
from jaxgpt.sample.settings import Sampling

GOLDENS = Path(__file__).parent / "goldens"
EXPECTED: dict[str, Any] = json.loads((GOLDENS / "old_run.json").read_text("utf-8"))
RUNS: dict[str, dict[str, Any]] = EXPECTED["runs"]
WRITERS = [name for name, run in RUNS.items() if "samples" in run]
CLOSE = 1e-5  # relative: other CPUs sum in another order


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """All runs and their data, as the working directory: the paths in their configs are relative."""
    path = tmp_path_factory.mktemp("old")
    with tarfile.open(GOLDENS / "old_run.tar.xz") as archive:
        # Python 3.11.2 has no filters.
        archive.extraction_filter = getattr(tarfile, "data_filter", lambda member, path: member)
        archive.extractall(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        yield path


def test_the_configs_say_what_they_said() -> None:
    experts, labels, memory = (load(name).model for name in ("experts", "labels", "memory"))
    assert isinstance(experts, GPT) and isinstance(memory, TransformerXL) and isinstance(labels, Classifier)
    assert experts.moe and (experts.moe.experts, experts.windows, experts.groups) == (4, (8, 0), 1)
    assert (memory.cutoffs, memory.memory, memory.div) == ((128,), 16, 2)
    assert isinstance(labels.backbone, Bert) and labels.labels == ("O", "B-ANIMAL")
    assert load("experts").optim.name == "muon" and load("gpt").train.steps == 8


@pytest.mark.parametrize("name", RUNS)
def test_validation_is_what_it_was(name: str) -> None:
    measured = validation_loss(name, which="4", batch_size=8)
    found = {key: measured[key] for key in RUNS[name]["validation"]}  # figures of experts came later
    assert found == pytest.approx(RUNS[name]["validation"], rel=CLOSE)


@pytest.mark.parametrize("name", WRITERS)
def test_greedy_samples_are_what_they_were(name: str) -> None:
    generator = Generator.load(name, which="4")
    prompts = [generator.tokenizer.encode(text) for text in EXPECTED["prompts"]]
    expected = RUNS[name]["samples"]
    new = len(expected[0]["ids"])
    made = generator.generate(prompts, Sampling(temperature=0.0), max_new_tokens=new, stop=())
    assert [row.ids for row in made] == [row["ids"] for row in expected]
    for row, known in zip(made, expected, strict=True):
        assert row.logprobs == pytest.approx(known["logprobs"], rel=CLOSE)


def test_the_exported_tensors_are_the_same_bits() -> None:
    """Their names, types and shapes too."""
    assert main(["export", "gpt", "hf", "--checkpoint", "4"]) == 0
    digest = hashlib.sha256()
    for key, tensor in sorted(load_file("hf/model.safetensors").items()):
        digest.update(f"{key} {tensor.dtype} {tensor.shape}".encode())
        digest.update(np.ascontiguousarray(tensor).tobytes())
    assert digest.hexdigest() == RUNS["gpt"]["exported"]


@pytest.mark.parametrize("name", RUNS)
def test_resuming_goes_on_as_it_would_have(name: str) -> None:
    """On eight devices where it was one: parameters, optimizer, counters, memory and the data's position."""
    assert main(["train", name]) == 0
    records = map(json.loads, (Path(name) / "metrics.jsonl").read_text("utf-8").splitlines())
    losses = {str(r["step"]): r["loss"] for r in records if r["step"] > 4 and "loss" in r}
    assert losses == pytest.approx(RUNS[name]["losses"], rel=CLOSE)
