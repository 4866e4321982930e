"""Export: what was imported comes back to the byte, and a run of our own gets files that fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from families import load_folder, native_run, write_folder
from safetensors import safe_open
from tiny import ONE, assert_same, mesh

from jaxgpt.checkpoint import load_params
from jaxgpt.cli import main
from jaxgpt.config import GPT, Bert, Chat, MaskedLM, load, to_json
from jaxgpt.convert import commands, files, weights
from jaxgpt.convert.registry import family_of, read_config
from jaxgpt.errors import UserError
from jaxgpt.text.tokenizer import ByteTokenizer

SIZE = ByteTokenizer().vocab_size + 1
GPT2 = GPT(vocab_size=SIZE, context=32, layers=2, width=32, heads=4)
MOE = {
    "model_type": "qwen2_moe", "vocab_size": SIZE, "max_position_embeddings": 32, "num_hidden_layers": 2,
    "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "moe_intermediate_size": 16,
    "num_experts": 4, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 24, "bos_token_id": 7,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "a_field_we_do_not_know": [1, None],
}  # fmt: skip


def random_tensors(config: dict, seed: int = 0) -> dict[str, np.ndarray]:
    """Tensors of a config: bfloat16, but for one in float32."""
    random, table = np.random.default_rng(seed), weights.tensors(*read_config(config, "here"))
    tensors = {
        name: random.standard_normal(targets[0].their_shape).astype(ml_dtypes.bfloat16)
        for name, targets in table.items()
    }
    return tensors | {"model.norm.weight": tensors["model.norm.weight"].astype(np.float32)}


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of three shards, with a config.json in a style of its own."""
    folder = write_folder(tmp_path_factory.mktemp("hf"), MOE, random_tensors(MOE), shards=3)
    (folder / files.CONFIG).write_text(json.dumps(MOE, indent=7))
    (folder / files.GENERATION).write_text('{"temperature":  0.6}')
    return folder


@pytest.fixture(scope="module")
def run(hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It, imported."""
    target = tmp_path_factory.mktemp("runs") / "moe"
    commands.import_(str(hf), str(target), tokenizer="byte")
    return target


def same_files(folder: Path, other: Path) -> bool:
    """Whether two folders hold the same tensors: names, types, shapes and bytes."""
    (a, b) = (files.headers(folder), files.headers(other))
    assert {n: (h.dtype, h.shape) for n, h in a.items()} == {n: (h.dtype, h.shape) for n, h in b.items()}
    left, right = (dict(files.each(found, found)) for found in (a, b))
    return all(left[name].tobytes() == right[name].tobytes() for name in a)


def test_what_was_imported_comes_back_to_the_byte(hf: Path, run: Path, tmp_path: Path) -> None:
    assert main(["export", str(run), str(tmp_path / "out"), "--max-shard-size", "20KB"]) == 0
    out = tmp_path / "out"
    assert same_files(hf, out)
    for name in (files.CONFIG, files.GENERATION):
        assert (out / name).read_bytes() == (hf / name).read_bytes()
    shards = sorted(out.glob("model-*.safetensors"))
    assert len(shards) > 3
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    assert max(path.stat().st_size for path in shards) < 24_000
    index = json.loads((out / files.INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(h.size for h in files.headers(out).values())
    with safe_open(shards[0], "numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_tuned_run_keeps_the_form_of_the_model_it_began_as(hf: Path, run: Path, tmp_path: Path) -> None:
    held = load(run)
    tuned = replace(held.model, dropout=0.1)
    native_run(tmp_path / "tuned", tuned, init_from=str(run))
    commands.export(str(tmp_path / "tuned"), str(tmp_path / "out"))
    before, after = files.headers(hf), files.headers(tmp_path / "out")
    assert {n: (h.dtype, h.shape) for n, h in before.items()} == {
        n: (h.dtype, h.shape) for n, h in after.items()
    }
    control = ByteTokenizer().control  # what ends a text is the run's own, the rest the model's
    ends = {"eos_token_id": sorted([control["<|eos|>"], control["<|end|>"]])}
    assert json.loads((tmp_path / "out" / files.CONFIG).read_text()) == MOE | ends
    assert json.loads((tmp_path / "out" / files.GENERATION).read_text()) == {"temperature": 0.6} | ends
    assert not same_files(hf, tmp_path / "out")


def test_another_type_is_said_in_the_config(run: Path, tmp_path: Path) -> None:
    commands.export(str(run), str(tmp_path / "out"), dtype="float32")
    assert {header.dtype for header in files.headers(tmp_path / "out").values()} == {"F32"}
    config = json.loads((tmp_path / "out" / files.CONFIG).read_text())
    assert config == MOE | {"torch_dtype": "float32"}


def test_a_run_of_our_own_is_written_whole_and_comes_back(tmp_path: Path) -> None:
    data = Chat(train=("dialogues.jsonl",))
    params = native_run(tmp_path / "run", GPT2, data=data)
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    config = json.loads((tmp_path / "out" / files.CONFIG).read_text())
    control = ByteTokenizer().control
    assert config["architectures"] == ["GPT2LMHeadModel"]
    assert (config["model_type"], config["torch_dtype"]) == ("gpt2", "float32")
    assert (config["vocab_size"], config["n_positions"], config["tie_word_embeddings"]) == (SIZE, 32, True)
    assert config["eos_token_id"] == sorted([control["<|eos|>"], control["<|end|>"]])
    generation = json.loads((tmp_path / "out" / files.GENERATION).read_text())
    assert generation["bos_token_id"] == config["bos_token_id"] == control["<|bos|>"]
    found = files.headers(tmp_path / "out")
    assert found.keys() == weights.tensors(family_of(GPT2), GPT2).keys()
    assert found["transformer.h.1.attn.c_attn.weight"].shape == (32, 96)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} < names
    assert_same(load_folder(tmp_path / "out").params, params)


def test_bert_is_exported_for_masked_language_modelling(tmp_path: Path) -> None:
    model = Bert(vocab_size=SIZE, context=16, layers=1, width=16, heads=2)
    params = native_run(tmp_path / "run", model, objective=MaskedLM())
    commands.export(str(tmp_path / "run"), str(tmp_path / "out"))
    config = json.loads((tmp_path / "out" / files.CONFIG).read_text())
    assert config["architectures"] == ["BertForMaskedLM"]
    assert_same(load_folder(tmp_path / "out").params, params)


def test_export_spread_over_a_mesh_writes_the_same(run: Path, hf: Path, tmp_path: Path) -> None:
    args = ["export", str(run), str(tmp_path / "out"), "--mesh.fsdp", "4", "--mesh.expert", "2"]
    assert main(args) == 0
    assert same_files(hf, tmp_path / "out")


def test_mistakes_leave_nothing(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    native_run(tmp_path / "alibi", replace(GPT2, position="alibi"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    before = sorted(tmp_path.iterdir())
    for args, words in (
        ([str(tmp_path / "alibi"), str(tmp_path / "out")], "position 'alibi'"),
        ([str(run), str(tmp_path / "full")], "not empty"),
        ([str(run), str(tmp_path / "out"), "--max-shard-size", "much"], "--max-shard-size is 'much'"),
        ([str(run), str(tmp_path / "out"), "--checkpoint", "7"], "checkpoint '7'"),
        ([str(tmp_path / "none"), str(tmp_path / "out")], "does not exist"),
    ):
        assert main(["export", *args]) == 2
        assert words in capfd.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_values_beyond_float16_are_refused(tmp_path: Path) -> None:
    model = replace(GPT2, layers=1)
    params = load_params_of(native_run(tmp_path / "run", model))
    params["embed"]["weight"] = params["embed"]["weight"].at[0, 0].set(1e6)
    entries = weights.entries(family_of(model), model, params, {}, "F16")
    with pytest.raises(UserError, match=r"wte\.weight has values beyond the range of float16"):
        files.write_model(tmp_path, entries, 10**9)


def load_params_of(params: dict) -> dict:
    """A copy whose dicts can be changed: the tests share the arrays."""
    return jax.tree.map(lambda leaf: leaf, params)


def test_the_run_is_left_as_it_was(run: Path) -> None:
    held = load(run)
    assert to_json(load(run)) == to_json(held)
    assert load_params(run, held, mesh(ONE))[1] == 0
