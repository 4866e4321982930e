"""Folders as people have them: shards and their index, names that training changed, wrong sizes, NaN."""

from __future__ import annotations

import errno
import json
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from families import golden, load_folder, write_folder
from safetensors.numpy import load_file, save_file
from tiny import assert_same

from jaxgpt.convert import commands, files, weights
from jaxgpt.convert.registry import read_config
from jaxgpt.errors import UserError

NORM = "model.norm.weight"


def whole(folder: Path, name: str = "llama", shards: int = 1, **config) -> Path:
    """A golden family's folder, some fields of its config changed."""
    stored = golden(name)
    return write_folder(folder, stored["config"] | config, stored["tensors"], shards)


def renamed(folder: Path, name: str, rename, leave_out: tuple[str, ...] = (), **config) -> Path:
    """The same with other names of its tensors."""
    stored = golden(name)
    tensors = {rename(key): value for key, value in stored["tensors"].items() if key not in leave_out}
    return write_folder(folder, stored["config"] | config, tensors)


@pytest.fixture(scope="module")
def params(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Of the golden Llama."""
    return load_folder(whole(tmp_path_factory.mktemp("llama"))).params


def refused(folder: Path) -> str:
    """The sentence that a folder is refused with."""
    with pytest.raises(UserError) as caught:
        load_folder(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def index(folder: Path) -> dict:
    return json.loads((folder / files.INDEX).read_text())["weight_map"]


def write_index(folder: Path, where: dict) -> None:
    (folder / files.INDEX).write_text(json.dumps({"weight_map": where}))


# ------------------------------------------------------------------------------------- the index


def test_the_index_decides_which_file_a_tensor_comes_from(
    params: dict, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = whole(tmp_path, shards=3)
    for name in set(index(folder).values()) - {index(folder)[NORM]}:  # before and after the file it is in
        save_file(load_file(folder / name) | {NORM: np.full(32, 7, np.float16)}, folder / name)
    assert_same(load_folder(folder).params, params)
    assert f"{NORM} in " in caplog.text and files.INDEX in caplog.text


def test_a_tensor_in_another_file_than_the_index_says_is_missed(tmp_path: Path) -> None:
    folder = whole(tmp_path, shards=2)
    where = index(folder)
    where[NORM] = next(name for name in where.values() if name != where[NORM])
    write_index(folder, where)
    assert f"names {NORM}, which its files do not hold" in refused(folder)


def test_a_name_twice_in_the_index_is_refused(tmp_path: Path) -> None:
    folder = whole(tmp_path, shards=2)
    text = json.dumps(index(folder))[:-1] + f', "{NORM}": "model-0.safetensors"}}'
    (folder / files.INDEX).write_text(f'{{"weight_map": {text}}}')
    assert f"'{NORM}' stands in it twice" in refused(folder)


def test_one_file_beside_an_index(params: dict, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = whole(whole(tmp_path, shards=2))
    words = refused(folder)  # both are whole: which of them is the model?
    assert files.ONE in words and "model-0.safetensors" in words
    (folder / "model-0.safetensors").unlink()
    assert files.ONE in refused(folder)
    (folder / "model-1.safetensors").unlink()
    assert_same(load_folder(folder).params, params)
    assert "model-0.safetensors, which are not there: model.safetensors is read" in caplog.text
    write_index(folder, dict.fromkeys(golden("llama")["tensors"], files.ONE))
    assert_same(load_folder(folder).params, params)
    write_index(folder, {f"other.{name}": files.ONE for name in golden("llama")["tensors"]})
    assert "names other." in refused(folder) and files.INDEX in refused(folder)


@pytest.mark.parametrize(
    "name", ["../x/model-0.safetensors", "", "a\0b", "a\nb", "x" * 300, "\ud800"], ids=ascii
)
def test_an_index_names_files_of_its_folder_alone(name: str, tmp_path: Path) -> None:
    whole(tmp_path / "x", shards=2)
    folder = whole(tmp_path / "hf", shards=2)
    for path in (name, str(tmp_path / "x" / "model-0.safetensors")):
        write_index(folder, index(folder) | {NORM: path})
        assert files.INDEX in refused(folder)


def test_a_link_to_a_file_is_read_and_one_to_a_folder_is_not(params: dict, tmp_path: Path) -> None:
    whole(tmp_path / "blobs", shards=2)  # Hugging Face's cache has its files so
    folder = tmp_path / "snapshot"
    folder.mkdir()
    for path in (tmp_path / "blobs").iterdir():
        (folder / path.name).symlink_to(Path("..") / "blobs" / path.name)
    assert_same(load_folder(folder).params, params)
    (folder / "out").symlink_to(tmp_path / "blobs")
    (folder / files.INDEX).unlink()
    write_index(folder, {name: f"out/{file}" for name, file in index(tmp_path / "blobs").items()})
    assert "outside of" in refused(folder)


def test_shards_without_their_index_are_named(
    params: dict, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = whole(tmp_path, shards=2)
    (folder / files.INDEX).unlink()
    assert "needs its index" in refused(folder)
    whole(tmp_path)
    assert_same(load_folder(folder).params, params)
    assert "model.safetensors is read, and not model-*.safetensors" in caplog.text


# ------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("name", "prefix"),
    [("qwen3", "model."), ("gemma2", "model."), ("gpt2", "transformer."), ("bert", "bert.")],
)
def test_base_models_have_no_prefix(name: str, prefix: str, tmp_path: Path) -> None:
    folder = renamed(tmp_path / "base", name, lambda key: key.removeprefix(prefix))
    assert not any(key.startswith(prefix) for key in files.headers(folder))
    assert_same(load_folder(folder).params, load_folder(whole(tmp_path / "whole", name)).params)


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: f"_orig_mod.{key}",
        lambda key: f"module.{key}",
        lambda key: f"module._orig_mod.{key}",
        lambda key: key.replace("layers.0.", "layers.0._orig_mod."),
        lambda key: key.replace("layers.0.", "layers.0._checkpoint_wrapped_module."),
        lambda key: f"_orig_mod.{key.removeprefix('model.')}",
    ],
)
def test_names_that_training_changed_are_understood_and_left_behind(
    rename, params: dict, tmp_path: Path
) -> None:
    folder = renamed(tmp_path, "llama", rename)
    family, model, made = load_folder(folder)
    assert_same(made, params)
    remembered = {weights.unwrapped(name): "F16" for name in files.headers(folder)}
    assert not any("_orig_mod" in name or "module" in name for name in remembered)
    names = {entry.name for entry in weights.entries(family, model, made, remembered, "")}
    assert names == remembered.keys()


def test_one_tensor_under_two_names_is_refused(tmp_path: Path) -> None:
    tensors = golden("llama")["tensors"]
    extra = {"norm.weight": tensors[NORM] + 1}
    folder = write_folder(tmp_path, golden("llama")["config"], tensors | extra)
    assert f"{NORM} and norm.weight are the same tensor" in refused(folder)


def test_a_head_alone_is_the_tied_embedding(tmp_path: Path) -> None:
    expected = load_folder(whole(tmp_path / "whole", "qwen3")).params
    names = {"model.embed_tokens.weight": "lm_head.weight"}
    folder = renamed(tmp_path / "head", "qwen3", lambda key: names.get(key, key))
    assert_same(load_folder(folder).params, expected)
    both = golden("qwen3")["tensors"]["model.embed_tokens.weight"]
    folder = write_folder(
        tmp_path / "both", golden("qwen3")["config"], golden("qwen3")["tensors"] | {"lm_head.weight": both}
    )
    assert_same(load_folder(folder).params, expected)


def test_what_ties_the_embedding_where_config_json_is_silent(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = {k: v for k, v in golden("llama")["config"].items() if k != "tie_word_embeddings"}
    tensors = golden("llama")["tensors"]
    assert not load_folder(write_folder(tmp_path / "head", config, tensors)).model.tied
    rest = {key: value for key, value in tensors.items() if key != "lm_head.weight"}
    for given in (config, config | {"tie_word_embeddings": None}):
        assert load_folder(write_folder(tmp_path / "none", given, rest)).model.tied
        assert "no lm_head.weight" in caplog.text
    words = refused(write_folder(tmp_path / "said", config | {"tie_word_embeddings": False}, rest))
    assert "lm_head.weight is missing" in words and "LlamaForCausalLM" in words


def test_buffers_are_known_and_left(tmp_path: Path) -> None:
    buffers = {
        "llama": ["model.layers.0.self_attn.rotary_emb.inv_freq", "rotary_emb.cos_cached"],
        "gpt2": ["h.0.attn.bias", "transformer.h.1.attn.masked_bias"],
        "bert": ["embeddings.position_ids", "bert.embeddings.token_type_ids", "pooler.dense.bias"],
    }
    for name, extra in buffers.items():
        stored = golden(name)
        tensors = stored["tensors"] | dict.fromkeys(extra, np.zeros((1, 1, 4, 4), np.float32))
        folder = write_folder(tmp_path / name, stored["config"], tensors)
        found = files.headers(folder)
        assert weights.check(*read_config(stored["config"], "here"), found, "here")[1] == sorted(extra)


def test_unknown_tensors_are_counted(tmp_path: Path) -> None:
    extra = {f"model.layers.0.lora_{i}.weight": np.zeros(1, np.float16) for i in range(50)}
    folder = write_folder(tmp_path, golden("llama")["config"], golden("llama")["tensors"] | extra)
    assert "50 are unknown: model.layers.0.lora_0.weight, " in refused(folder)
    assert " and 30 more" in refused(folder)


# ------------------------------------------------------------------------------------- sizes and values


ABSURD = [10**12, 10**9, 2**31 - 1, 4000, 10**400]


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("llama", "hidden_size"),
        ("llama", "num_hidden_layers"),
        ("llama", "intermediate_size"),
        ("llama", "head_dim"),
        ("llama", "num_attention_heads"),
        ("llama", "num_key_value_heads"),
        ("gpt2", "n_embd"),
        ("gpt2", "n_layer"),
        ("gpt2", "n_positions"),
        ("gpt2", "n_inner"),
        ("bert", "type_vocab_size"),
        ("mixtral", "num_local_experts"),
        ("qwen2_moe", "num_experts"),
        ("qwen2_moe", "shared_expert_intermediate_size"),
        ("gemma2", "num_hidden_layers"),
    ],
)
def test_absurd_sizes_are_compared_with_the_files_before_anything_is_made(
    name: str, field: str, tmp_path: Path
) -> None:
    for size in ABSURD:
        folder, start = whole(tmp_path, name, **{field: size}), time.perf_counter()
        assert len(refused(folder)) < 2000
        assert time.perf_counter() - start < 2


@pytest.mark.parametrize(
    "fields",
    [
        {"eos_token_id": "</s>"},
        {"eos_token_id": -2},
        {"eos_token_id": {"a": 1}},
        {"eos_token_id": [1, None]},
        {"torch_dtype": 3},
        {"rope_scaling": "linear"},
        {"rope_scaling": {"rope_type": "linear", "factor": "8"}},
        {"rope_scaling": {"rope_type": "linear", "factor": 10**400}},
        {"rope_parameters": [1]},
        {"rope_theta": None},
        {"num_hidden_layers": True},
        {"num_hidden_layers": 2.5},
        {"hidden_size": -32},
        {"head_dim": 0},
        {"tie_word_embeddings": "yes"},
        {"layer_types": 3},
        {"model_type": ["llama"]},
        {"hidden_act": {"a": "silu"}},
        {"attention_bias": json.loads("[" * 900 + "]" * 900)},
    ],
    ids=ascii,
)  # fmt: skip
def test_fields_of_a_wrong_type_are_named(fields: dict, tmp_path: Path) -> None:
    words = refused(whole(tmp_path, **fields))
    assert next(iter(fields)) in words or "nested too deeply" in words or "no field" in words
    assert len(words) < 600


def test_values_that_are_not_finite_are_named(tmp_path: Path) -> None:
    tensors = dict(golden("llama")["tensors"])
    for name, values in {NORM: [np.nan], "lm_head.weight": [np.inf, -np.inf, np.nan]}.items():
        tensors[name] = tensors[name].copy()
        tensors[name].flat[: len(values)] = values
    words = refused(write_folder(tmp_path, golden("llama")["config"], tensors))
    assert "2 tensors hold values that are NaN or infinite" in words
    assert f"{NORM} (1 of 32)" in words and "lm_head.weight (3 of 2,048)" in words


def test_what_is_not_finite_is_not_exported(tmp_path: Path) -> None:
    family, model, params = load_folder(whole(tmp_path / "hf"))
    params = jax.tree.map(lambda leaf: leaf, params)
    params["norm"]["scale"] = params["norm"]["scale"].at[0].set(np.nan)
    entries = weights.entries(family, model, params, {}, "")
    with pytest.raises(UserError, match=rf"{NORM} holds values that are NaN or infinite"):
        files.write_model(tmp_path, entries, 10**9)


def test_names_remembered_of_another_model_are_refused_and_lost_ones_written(tmp_path: Path) -> None:
    family, model, params = load_folder(whole(tmp_path))
    with pytest.raises(UserError, match=r"this model has no other\.weight, which tensors\.json names"):
        list(weights.entries(family, model, params, {"other.weight": "F16"}, ""))
    made = list(weights.entries(family, model, params, {NORM: "BF16"}, ""))
    assert {entry.name for entry in made} == golden("llama")["tensors"].keys()
    assert {entry.dtype for entry in made} == {"BF16"}


# ------------------------------------------------------------------------------------- full disks


def test_a_disk_that_is_too_small_is_found_before_the_work(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"takes 1000000000.00 GB and .* GB free"),
        commands.whole(tmp_path / "run", 10**18),
    ):
        pytest.fail("the work was begun")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_becomes_full_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"run cannot be written \(No space left on device\).*free some"),
        commands.whole(tmp_path / "run", 1),
    ):
        Path("/dev/full").write_text("x" * 10_000)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match="theirs"), commands.whole(tmp_path / "run", 1):
        raise OSError(errno.EIO, "theirs", "/elsewhere/model.safetensors")
