"""Import: shards and meshes change nothing, mistakes are listed together, the host holds one tensor."""

from __future__ import annotations

import contextlib
import resource
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from families import Imported, golden, load_folder, native_run, write_folder
from tiny import ONE, assert_same, mesh

from jaxgpt.checkpoint import load_params
from jaxgpt.cli import main
from jaxgpt.config import GPT, CausalLM, Chat, Run, Text, load
from jaxgpt.convert import commands, files, weights
from jaxgpt.convert.registry import read_config
from jaxgpt.errors import UserError
from jaxgpt.sample.generate import Generator
from jaxgpt.sample.settings import Sampling
from jaxgpt.text.chat import prompt_ids
from jaxgpt.text.tokenizer import ByteTokenizer
from jaxgpt.train.changes import check_base
from jaxgpt.train.hooks import claimed

SIZE = ByteTokenizer().vocab_size + 1
MODERN = GPT(
    vocab_size=SIZE, context=32, layers=2, width=32, heads=4, kv_heads=2, mlp_width=48, position="rope",
    norm="rmsnorm", mlp="swiglu", bias=False, tied=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Imported:
    return load_folder(folder_of("mixtral", tmp_path_factory.mktemp("mixtral")))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder that the byte tokenizer fits, made by `jaxgpt export`."""
    folder = tmp_path_factory.mktemp("llama")
    native_run(folder / "run", MODERN)
    commands.export(str(folder / "run"), str(folder / "hf"), dtype="bfloat16")
    return folder / "hf"


def folder_of(name: str, folder: Path, shards: int = 1, **changed: np.ndarray | None) -> Path:
    """A golden family's folder, some tensors replaced, added, or left out where None."""
    stored = golden(name)
    tensors = stored["tensors"] | {key.replace("__", "."): value for key, value in changed.items()}
    tensors = {key: value for key, value in tensors.items() if value is not None}
    return write_folder(folder, stored["config"], tensors, shards)


def test_shards_change_nothing(mixtral: Imported, tmp_path: Path) -> None:
    assert_same(load_folder(folder_of("mixtral", tmp_path, shards=3)).params, mixtral.params)


@pytest.mark.parametrize(
    "sizes", [ONE | {"fsdp": 8}, ONE | {"fsdp": 2, "tensor": 2, "expert": 2}], ids=["fsdp", "mixed"]
)
def test_a_mesh_changes_the_layout_alone(mixtral: Imported, sizes: dict[str, int], tmp_path: Path) -> None:
    spread = load_folder(folder_of("mixtral", tmp_path), mesh(sizes)).params
    up = spread["blocks"]["mlp"]["up"]["weight"]
    assert up.addressable_shards[0].data.size == up.size // 8
    assert_same(spread, mixtral.params)


def test_parameters_are_float32_whatever_the_file_has(tmp_path: Path) -> None:
    stored = golden("llama")
    tensors = {k: v.astype(ml_dtypes.bfloat16) for k, v in stored["tensors"].items()}
    params = load_folder(write_folder(tmp_path, stored["config"], tensors)).params
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    expected = tensors["lm_head.weight"].astype(np.float32)
    np.testing.assert_array_equal(np.asarray(params["head"]["weight"]), expected)


def test_problems_are_listed_together(tmp_path: Path) -> None:
    changed = {
        "model__norm__weight": None,
        "model__layers__1__self_attn__q_proj__weight": np.zeros((3, 32), np.float16),
        "model__layers__0__self_attn__z_proj__weight": np.zeros(1, np.float16),
        "lm_head__weight": np.zeros((64, 32), np.int8),
    }
    with pytest.raises(UserError) as caught:
        load_folder(folder_of("llama", tmp_path, **changed))
    for words in (
        "model.norm.weight is missing",
        "model.layers.1.self_attn.q_proj.weight has shape [3, 32], not [32, 32]",
        "model.layers.0.self_attn.z_proj.weight is unknown",
        "lm_head.weight is of type I8",
    ):
        assert words in str(caught.value)


def test_a_repeated_embedding_must_be_the_same(tmp_path: Path) -> None:
    embed = golden("qwen3")["tensors"]["model.embed_tokens.weight"]
    same = load_folder(folder_of("qwen3", tmp_path / "same", lm_head__weight=embed)).params
    assert_same(same, load_folder(folder_of("qwen3", tmp_path / "none")).params)
    with pytest.raises(UserError, match=r"lm_head.weight from model.embed_tokens.weight"):
        load_folder(folder_of("qwen3", tmp_path / "other", lm_head__weight=embed + 1))


def test_tensors_without_use_are_named_and_left(tmp_path: Path) -> None:
    zeros = np.zeros((32, 32), np.float16)
    extra = {"bert__pooler__dense__weight": zeros, "cls__seq_relationship__bias": zeros[0, :2]}
    found = files.headers(folder_of("bert", tmp_path, **extra))
    used, unused = weights.check(*read_config(golden("bert")["config"], "here"), found, "here")
    assert unused == ["bert.pooler.dense.weight", "cls.seq_relationship.bias"]
    assert set(used) == set(golden("bert")["tensors"])


def test_a_folder_that_is_not_whole_says_what_it_lacks(tmp_path: Path) -> None:
    folder = folder_of("llama", tmp_path, shards=3)
    (folder / "model-1.safetensors").write_bytes(b"\x10")
    with pytest.raises(UserError, match=r"model-1.safetensors cannot be read"):
        files.headers(folder)
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(UserError, match=r"lacks model-1.safetensors"):
        files.headers(folder)
    (folder / files.INDEX).unlink()
    (folder / "pytorch_model.bin").touch()
    with pytest.raises(UserError, match=r"has no model.safetensors .*pytorch_model.bin is not read"):
        files.headers(folder)
    with pytest.raises(UserError, match=r"config.json does not exist"):
        files.read_json(tmp_path / "nowhere" / "config.json")


def test_the_host_holds_little_more_than_a_tensor(tmp_path: Path) -> None:
    config = golden("llama")["config"] | {"hidden_size": 128, "head_dim": 32, "intermediate_size": 512}
    config |= {"vocab_size": 1024, "num_hidden_layers": 4}
    family, model = read_config(config, "here")
    tensors = {
        name: np.zeros(targets[0].their_shape, np.float32)
        for name, targets in weights.tensors(family, model).items()
    }
    folder, on = write_folder(tmp_path, config, tensors, shards=4), mesh(ONE | {"fsdp": 8})
    shards = [path.stat().st_size for path in folder.glob("*.safetensors")]
    layer = sum(tensor.nbytes for name, tensor in tensors.items() if ".layers.0." in name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    del tensors
    load_folder(folder, on)  # compiled before it is measured
    tracemalloc.start()
    try:
        load_folder(folder, on)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 1.3 * max(shards) + layer < total
    assert peak < 1.3 * max(shards) + layer


# ------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def run(llama: Path) -> Path:
    """That folder as a run."""
    target = llama.parent / "imported"
    assert main(["import", str(llama), str(target), "--tokenizer", "byte"]) == 0
    return target


def test_an_import_is_a_run_to_sample_and_to_start_from(run: Path) -> None:
    held = load(run)
    assert (held.name, held.folder, held.model) == (run.name, run, MODERN)
    assert (held.data, held.objective, held.compute.dtype) == (Text(path="data/text"), CausalLM(), "bfloat16")
    completion = Generator.load(run).generate([[1, 2]], max_new_tokens=3)[0]
    assert len(completion.ids) == 3
    after = Run(name="after", model=held.model, init_from=str(run))
    check_base(after, ByteTokenizer())
    with pytest.raises(UserError, match=f"--init-from {run}"):
        claimed(held, ByteTokenizer()).__enter__()


def test_import_onto_eight_devices_writes_the_same_run(llama: Path, run: Path) -> None:
    target = llama.parent / "spread"
    assert main(["import", str(llama), str(target), "--tokenizer", "byte", "--mesh.fsdp", "8"]) == 0
    held, on = load(run), mesh(ONE)
    assert_same(load_params(target, held, on)[0], load_params(run, held, on)[0])


def test_nothing_is_left_of_an_import_that_fails(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    args = ["import", str(llama), str(tmp_path / "run"), "--tokenizer", "byte"]
    with monkeypatch.context() as patched:
        patched.setattr(weights, "load", fail)
        assert main(args) == 130
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").touch()
    assert main(args) == 2
    assert "not empty" in capfd.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["run", "mine"]


@contextlib.contextmanager
def limited(most: int) -> Iterator[None]:
    """No file can be written beyond so many bytes, as on a disk that becomes full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("most", [300, 30_000])
def test_an_import_that_cannot_be_written_leaves_nothing(
    most: int, llama: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    with limited(most):  # config.json is too large, or the checkpoint
        assert main(["import", str(llama), str(tmp_path / "run"), "--tokenizer", "byte"]) == 2
    words = capfd.readouterr().err
    assert f"jaxgpt: {tmp_path / 'run'} cannot be written" in words and words.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_cannot_be_written_leaves_nothing(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    with limited(9000):
        assert main(["export", str(run), str(tmp_path / "hf")]) == 2
    assert "hf cannot be written (File too large); nothing is left of it" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_with_more_ids_than_rows_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    folder = folder_of("llama", tmp_path / "hf")
    assert main(["import", str(folder), str(tmp_path / "run"), "--tokenizer", "byte"]) == 2
    assert "only 64 rows" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_embeddings_rows_are_the_vocabulary(tmp_path: Path) -> None:
    stored = golden("llama")
    folder = write_folder(tmp_path, stored["config"] | {"vocab_size": 60}, stored["tensors"])
    assert load_folder(folder).model.vocab_size == 64


def test_a_chat_model_goes_out_and_comes_in_with_its_tokenizer(tmp_path: Path) -> None:
    native_run(tmp_path / "run", MODERN, data=Chat(train=("dialogues.jsonl",)))
    commands.export(str(tmp_path / "run"), str(tmp_path / "hf"))
    commands.import_(str(tmp_path / "hf"), str(tmp_path / "back"))
    assert isinstance(load(tmp_path / "back").data, Chat)
    before, after = (Generator.load(tmp_path / name) for name in ("run", "back"))
    assert after.tokenizer.kind == "hf"
    turns = [{"role": "user", "content": "Hé <|end|>?"}]
    ids = prompt_ids(turns, before.tokenizer)
    assert prompt_ids(turns, after.tokenizer) == ids
    greedy = {"decoding": Sampling(temperature=0), "max_new_tokens": 8, "stop": []}
    made = [generator.generate([ids], **greedy)[0].ids for generator in (before, after)]
    assert made[0] == made[1]
    commands.export(str(tmp_path / "back"), str(tmp_path / "again"))
    names = {path.name for path in (tmp_path / "hf").iterdir()}
    assert names == {path.name for path in (tmp_path / "again").iterdir()}
    assert {"tokenizer.json", "chat_template.jinja", files.ONE, files.GENERATION} < names
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes(), name
