"""The table of readers: complete, and each keeps the same promises about its rows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from jaxgpt.config import (
    GPT,
    GRPO,
    KTO,
    ORPO,
    CausalLM,
    Chat,
    Classification,
    Classifier,
    Labelled,
    Mix,
    Pairs,
    Prompts,
    Rated,
    Run,
    Tagged,
    Task,
    Text,
)
from jaxgpt.config.data import Data
from jaxgpt.data.packing import ENDLESS
from jaxgpt.data.readers import READERS, encode_split, rows_of, run_tokenizer
from jaxgpt.errors import UserError
from jaxgpt.tasks import Translation
from jaxgpt.text.tokenizer import ByteTokenizer

BYTES = ByteTokenizer()
TAGS = Classifier(backbone=GPT(causal=False), labels=("O", "B-X", "I-X"))
TEXTS = Classifier(backbone=GPT(causal=False), labels=("bad", "good"), pool="first")
KINDS = (Text, Chat, Prompts, Pairs, Rated, Tagged, Labelled, Mix, Task)
OBJECTIVES = {Prompts: GRPO(rewards=("rewards.py:f",)), Pairs: ORPO(), Rated: KTO()}
"""Of data that CausalLM() does not read."""


@pytest.fixture(scope="module")
def data(
    corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[type, tuple[Data, Classifier | None]]:
    """One of each kind, and the task that its labels need."""
    folder = tmp_path_factory.mktemp("kinds")
    talk = [json.dumps({"prompt": f"say {i}", "completion": "yes " * (1 + i % 5)}) for i in range(40)]
    (folder / "a.jsonl").write_text("\n".join(talk))
    sides = [{"prompt": f"say {i}", "chosen": "yes", "rejected": "no " * (1 + i % 5)} for i in range(40)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, sides)))
    rated = [json.loads(line) | {"label": i % 3 == 0} for i, line in enumerate(talk)]
    (folder / "rated.jsonl").write_text("\n".join(map(json.dumps, rated)))
    (folder / "a.conll").write_text("cat O\nParis B-X\n\nNew B-X\nYork I-X\n")
    (folder / "a.tsv").write_text("text\tlabel\nfine\tgood\nawful\tbad\n")
    files = {kind: (str(folder / name),) for kind, name in ((Tagged, "a.conll"), (Labelled, "a.tsv"))}
    shared = {kind: {"train": f, "validation": f, "tokenizer": "byte"} for kind, f in files.items()}
    plain = {"prompts": ("{text}",), "held_out": "{text}?", "tokenizer": "byte"}
    text, chat = Text(path=str(corpus)), Chat(train=(str(folder / "a.jsonl"),), tokenizer="byte")
    return {
        Text: (text, None),
        Task: (Translation(train=chat.train, source="prompt", into="completion", **plain), None),
        Chat: (chat, None),
        Prompts: (Prompts(train=(str(folder / "a.jsonl"),), tokenizer="byte"), None),
        Pairs: (Pairs(train=(str(folder / "pairs.jsonl"),), tokenizer="byte"), None),
        Rated: (Rated(train=(str(folder / "rated.jsonl"),), tokenizer="byte"), None),
        Mix: (Mix(sources=(text, chat), weights=(2.0, 1.0)), None),
        Tagged: (Tagged(**shared[Tagged]), TAGS),
        Labelled: (Labelled(**shared[Labelled]), TEXTS),
    }


def test_every_kind_of_data_has_a_reader() -> None:
    assert set(READERS) == set(get_args(Data)) == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_functions_of_seed_and_number(kind, data) -> None:
    config, task = data[kind]
    rows, again, other = (rows_of(config, BYTES, 64, seed, 2, task) for seed in (1, 1, 2))
    assert (len(rows), rows.length, rows.pad) == (ENDLESS, 64, BYTES.control["<|pad|>"])
    assert rows.fingerprint == again.fingerprint != other.fingerprint
    for number in (0, 7, 3):  # in any order
        for name, column in rows[number].items():
            assert column.shape == (64,)
            np.testing.assert_array_equal(column, again[number][name], name)
    held = rows_of(config, BYTES, 64, None, 2, task)
    assert len(held) == held.epoch_rows
    short = rows_of(replace(config, length=32), BYTES, 64, None, 2, task)
    assert short.length == 32


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokenizer_of_each_kind_is_found(kind, data) -> None:
    config, task = data[kind]
    objective = Classification() if task else OBJECTIVES.get(kind, CausalLM())
    base = {"init_from": "x"} if kind is Rated else {}
    run = Run(name="a", model=task or GPT(), data=config, objective=objective, **base)
    assert run_tokenizer(run).digest == BYTES.digest
    if hasattr(config, "tokenizer") and not base:
        with pytest.raises(UserError, match="tokenizer and init_from are empty"):
            run_tokenizer(replace(run, data=replace(config, tokenizer="")))


def test_labels_need_a_model_and_data_that_have_them(data) -> None:
    with pytest.raises(UserError, match="labels need a model that knows them"):
        rows_of(data[Tagged][0], BYTES, 64, 0, 2, None)
    with pytest.raises(UserError, match="Text data have no labels"):
        encode_split(data[Text][0], BYTES, 64, "train", TAGS)
    sentences, groups = encode_split(data[Tagged][0], BYTES, 64, "validation", TAGS)
    assert [s.words for s in sentences] == [("cat", "Paris"), ("New", "York")]
    assert [sum(map(len, (item.tokens for item in items))) for items in groups] == [11, 10]
