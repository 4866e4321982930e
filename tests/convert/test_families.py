"""Every family computes what transformers computes, and its config and tensors survive the round trip."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import NAMES, Imported, Numbers, golden, load_folder, write_folder
from tiny import FLOAT32, assert_same, model_of, plain

from jaxgpt.batch import Batch
from jaxgpt.config import GPT, Bert, RopeScaling
from jaxgpt.convert import files, weights
from jaxgpt.convert.family import canonical, misfits
from jaxgpt.convert.registry import family_of, read_config, text_part
from jaxgpt.errors import UserError
from jaxgpt.sample.generate import Generator
from jaxgpt.sample.settings import Sampling

GENERATED = ("gpt2", "llama", "mixtral", "gemma3_text")
"""Families whose decoding differs: learned positions, grouped heads, experts, windows."""


@pytest.fixture(scope="module", params=NAMES)
def imported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """A family's name and its golden model, imported."""
    name, stored = request.param, golden(request.param)
    folder = write_folder(tmp_path_factory.mktemp(name), stored["config"], stored["tensors"])
    return name, load_folder(folder)


def test_logits_and_greedy_tokens_are_those_of_transformers(imported: tuple[str, Imported]) -> None:
    name, (_, model, params) = imported
    stored = golden(name)
    tokens, seen = stored["tokens"], np.ones(stored["tokens"].shape, bool)
    made = stored.get("greedy", np.zeros((len(tokens), 0), np.int32))
    if name == "bert":
        seen = stored["seen"].astype(bool)
        types = jnp.asarray(stored["types"])
        batch = replace(plain(jnp.asarray(tokens)), segments_BT=jnp.asarray(stored["seen"]), types_BT=types)
    else:  # the rows, and below them their first halves with what was made of these
        batch = plain(jnp.asarray(np.concatenate([tokens, np.hstack([tokens[:, : made.shape[1]], made])])))

    @jax.jit
    def logits(params: dict, batch: Batch) -> jax.Array:
        built = model_of(model)(params)
        return built.logits(built.hidden(batch).x_BTD)

    got = np.asarray(logits(params, batch))
    assert stored["logits"].std() > 0.5
    assert np.abs(got[: len(tokens)] - stored["logits"])[seen].max() < 1e-4
    start = tokens.shape[1] - made.shape[1] - 1
    np.testing.assert_array_equal(got[len(tokens) :, start:-1].argmax(-1), made[: len(got) - len(tokens)])


@pytest.mark.parametrize("imported", GENERATED, indirect=True)
def test_the_generator_makes_the_tokens_of_transformers(imported: tuple[str, Imported]) -> None:
    name, (_, model, params) = imported
    stored, generator = golden(name), Generator(model, FLOAT32, params, Numbers())
    prompts = stored["tokens"][:, : stored["greedy"].shape[1]].tolist()
    made = generator.generate(prompts, Sampling(temperature=0), max_new_tokens=len(prompts[0]))
    assert [completion.ids for completion in made] == stored["greedy"].tolist()


def test_tensors_survive_import_and_export_to_the_byte(
    imported: tuple[str, Imported], tmp_path: Path
) -> None:
    name, (family, model, params) = imported
    original = golden(name)["tensors"]
    files.write_model(
        tmp_path, weights.entries(family, model, params, dict.fromkeys(original, "F16"), ""), 10**9
    )
    back = dict(files.each(files.headers(tmp_path), original))
    assert back.keys() == original.keys()
    for key, tensor in original.items():
        assert (back[key].dtype, back[key].shape) == (tensor.dtype, tensor.shape), key
        assert back[key].tobytes() == tensor.tobytes(), key


def test_a_config_written_by_us_means_the_same_and_fits_its_family(imported: tuple[str, Imported]) -> None:
    name, (family, model, _) = imported
    assert misfits(family, model) == []
    assert family_of(model).model_type == name
    written = json.loads(json.dumps(family.write(model))) | {"model_type": name}
    assert canonical(read_config(written, "written")[1]) == canonical(model)


def test_configs_of_transformers_4_and_5_mean_the_same() -> None:
    for name in ("llama", "gemma3_text"):
        newer = golden(name)["config"]
        older = {key: value for key, value in newer.items() if key != "rope_parameters"}
        rope = newer["rope_parameters"]
        scaling = dict(rope.get("full_attention", rope))
        older |= {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling}
        if name == "gemma3_text":
            local = rope["sliding_attention"]["rope_theta"]
            older |= {"rope_local_base_freq": local, "sliding_window_pattern": 3, "layer_types": None}
        assert read_config(older, "4")[1] == read_config(newer, "5")[1]


QWEN2 = {"model_type": "qwen2", "num_hidden_layers": 4, "max_window_layers": 2}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "gpt2"}, GPT(vocab_size=50257, dropout=0.1)),
        ({"model_type": "bert"}, Bert()),
        (
            {"model_type": "mistral", "num_hidden_layers": 2, "sliding_window": None},
            {"windows": (), "kv_heads": 8, "context": 131_072, "tied": False},
        ),
        (QWEN2 | {"use_sliding_window": False}, {"windows": (), "qkv_bias": True, "bias": False}),
        (QWEN2 | {"use_sliding_window": True}, {"windows": (0, 0, 4096, 4096)}),
        (
            {"model_type": "gemma2"},
            {"windows": (4096, 0), "tied": True, "attention_softcap": 50.0, "head_width": 256},
        ),
        (
            {"model_type": "gemma3_text", "num_hidden_layers": 14},
            {"windows": (4096,) * 5 + (0,), "rope_theta": 1e6, "rope_local_theta": 1e4},
        ),
        (
            {
                "model_type": "llama",
                "max_position_embeddings": 8192,
                "rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4},
                "rope_theta": 5e5,
            },
            {"rope_scaling": RopeScaling(), "rope_theta": 5e5},
        ),
        ({"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 2}}, {"rope_theta": 1e4}),
    ],
)  # fmt: skip
def test_fields_left_out_have_the_familys_defaults(config: dict, expected: dict | GPT | Bert) -> None:
    model = read_config(config, "config.json")[1]
    if isinstance(expected, dict):
        assert {name: getattr(model, name) for name in expected} == expected
    else:
        assert canonical(model) == canonical(expected)


def test_the_text_part_of_gemma_3_is_a_family() -> None:
    inner = golden("gemma3_text")["config"]
    whole = {"model_type": "gemma3", "torch_dtype": "bfloat16", "text_config": inner, "vision_config": {}}
    part = text_part(whole)
    assert part["torch_dtype"] == "bfloat16"
    assert read_config(part, "whole") == read_config(inner, "inner")


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("llama", {"hidden_act": "relu"}, ["hidden_act is 'relu'"]),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, ["rope_type is 'yarn'"]),
        ("llama", {"attention_bias": True}, ["mlp_bias is False"]),
        ("llama", {"rope_parameters": {"rope_type": "linear"}}, ["no field 'factor'"]),
        ("llama", {"quantization_config": {"bits": 4}}, ["quantization_config"]),
        ("llama", {"num_hidden_layers": "two"}, ["num_hidden_layers", "'two'"]),
        ("llama", {"model_type": "lama"}, ["'lama'", "did you mean 'llama'"]),
        (
            "qwen3",
            {"attention_bias": True, "hidden_act": "gelu"},
            ["attention_bias is True", "hidden_act is 'gelu'"],
        ),
        ("qwen3_moe", {"mlp_only_layers": [0]}, ["mlp_only_layers is [0]"]),
        ("qwen2", {"layer_types": ["chunked_attention"] * 2}, ["layer_types is", "chunked"]),
        ("gemma3_text", {"use_bidirectional_attention": True}, ["use_bidirectional_attention is True"]),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, ["scale_attn_by_inverse_layer_idx is True"]),
        ("bert", {"position_embedding_type": "relative_key"}, ["position_embedding_type is 'relative_key'"]),
    ],
)  # fmt: skip
def test_what_has_no_counterpart_is_named(name: str, fields: dict, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        read_config(golden(name)["config"] | fields, "config.json")
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (GPT(position="alibi"), ["gpt2", "position 'alibi'"]),
        (GPT(mlp="swiglu"), ["mlp 'swiglu'"]),
        (GPT(causal=False), ["causal False"]),
        (GPT(position="rope", norm="rmsnorm", mlp="swiglu", bias=False, norm_at="post"), ["norm_at 'post'"]),
    ],
)
def test_a_model_of_no_family_is_refused_by_its_fields(model: GPT, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        family_of(model)
    for word in words:
        assert word in str(caught.value)


def test_native_models_find_the_plainest_family() -> None:
    modern = GPT(layers=2, position="rope", norm="rmsnorm", mlp="swiglu", bias=False)
    found = {
        "gpt2": GPT(),
        "llama": modern,
        "mistral": replace(modern, windows=(64,)),
        "qwen2": replace(modern, qkv_bias=True, windows=(0, 64)),
        "qwen3": replace(modern, qk_norm=True, windows=(64, 0)),
        "bert": Bert(),
    }
    assert {name: family_of(model).model_type for name, model in found.items()} == {n: n for n in found}


def test_names_of_older_files_are_understood(tmp_path: Path) -> None:
    older = {
        "gpt2": lambda name: name.removeprefix("transformer."),
        "bert": lambda name: name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"),
        "gemma3_text": lambda name: f"language_model.{name}",
    }  # fmt: skip
    for name, rename in older.items():
        stored = golden(name)
        today = load_folder(write_folder(tmp_path / name, stored["config"], stored["tensors"]))
        tensors = {rename(key): value for key, value in stored["tensors"].items()}
        assert tensors.keys() != stored["tensors"].keys()
        before = load_folder(write_folder(tmp_path / f"{name}-older", stored["config"], tensors))
        assert_same(before.params, today.params)
