"""A run with a memory: carried, checkpointed and restored bitwise; evaluated and sampled from."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny import assert_same
from tiny_runs import COMPUTE, OPTIM, curve, interrupt_at, records, restore, saved

from jaxgpt.config import Mesh, Run, Text, Train, TransformerXL
from jaxgpt.data.show import examples
from jaxgpt.evals.loss import validation_loss
from jaxgpt.sample.generate import Generator
from jaxgpt.text.tokenizer import ByteTokenizer
from jaxgpt.train.loop import train

# Dropout, microbatches, parts of the memory on every device, a longer memory in evaluation; tables
# in clusters, so that lists of parameters are saved too.
MODEL = TransformerXL(
    vocab_size=264, context=48, segment=8, memory=8, eval_memory=12, layers=1, width=16, heads=2,
    mlp_width=16, dropout=0.1, cutoffs=(64, 128), div=2,
)  # fmt: skip
TRAIN = Train(steps=6, batch_size=8, accumulate=2, log_every=1, eval_every=3, save_every=3)
MESH = Mesh(data=2, fsdp=2, tensor=2)


def xl_run(corpus: Path, runs: Path) -> Run:
    data = Text(path=str(corpus), contiguous=True)
    return Run(
        name="xl",
        model=MODEL,
        data=data,
        optim=OPTIM,
        train=TRAIN,
        mesh=MESH,
        compute=COMPUTE,
        runs=str(runs),
    )


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run done in one go."""
    run = xl_run(corpus, tmp_path_factory.mktemp("runs"))
    assert train(run, progress=False).reason == "finished"
    return run


def test_a_run_that_was_cut_off_goes_on_bitwise_with_its_memory(
    whole: Run, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = xl_run(corpus, tmp_path)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3, signal.SIGTERM)
        assert train(run, progress=False).reason == "SIGTERM"
    cut = saved(run.folder)[-1]
    assert 3 <= cut < 6
    assert restore(run.folder)[0].memory.segments_BM.all()
    assert train(run, progress=False).reason == "finished"
    assert curve(run.folder) == curve(whole.folder)
    (state, host), (expected, host_too) = restore(run.folder), restore(whole.folder)
    assert host == host_too
    assert_same(state, expected)
    assert state.memory.segments_BM.shape == (8, 8)
    assert np.asarray(state.memory.x_BLMD).any()


def test_evaluation_carries_the_memory_and_is_the_same_on_one_device(whole: Run) -> None:
    last = records(whole.folder, "val_loss")[-1]
    found = validation_loss(whole.folder, which="newest", batch_size=8)
    assert found["loss"] == pytest.approx(last["val_loss"], rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(last["val_bits_per_byte"], rel=1e-5)
    # Rows that do not go on, with the documents' beginnings cut off, tell less.
    alone = validation_loss(whole.folder, replace(whole.data, contiguous=False), which="newest", batch_size=8)
    assert alone["targets"] == found["targets"]
    assert alone["loss"] != pytest.approx(found["loss"], rel=1e-6)


def test_a_run_is_sampled_from_beyond_its_segment(whole: Run) -> None:
    generator, tokenizer = Generator.load(whole.folder), ByteTokenizer()
    prompts = [tokenizer.encode("the cat sat on a mat"), tokenizer.encode("while")]
    made = generator.generate(prompts, max_new_tokens=20, stop=[])
    assert [len(m.ids) for m in made] == [20, 20]
    assert made[1].ids == generator.generate(prompts[1:], max_new_tokens=20, seeds=[1], stop=[])[0].ids


def test_its_rows_are_shown_with_documents_numbered_from_one(whole: Run) -> None:
    shown = list(examples(whole, ByteTokenizer(), 8))
    assert all(row["segments"][0] == 1 and len(row["tokens"]) >= 8 for row in shown)
