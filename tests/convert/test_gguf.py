"""GGUF: what is written is what two independent readers read, and what is read computes what they compute."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import gguf as library
import gguf_models
import jax
import numpy as np
import pytest
from families import GOLDENS, native_run
from tiny import GPT2, ONE, mesh, model_of, plain

from jaxgpt.checkpoint import load_params
from jaxgpt.cli import main
from jaxgpt.config import GPT, load_run
from jaxgpt.convert import gguf, gguf_words, tokenizers
from jaxgpt.convert.commands import export, import_
from jaxgpt.convert.family import canonical
from jaxgpt.convert.load import Found, read_model
from jaxgpt.errors import UserError
from jaxgpt.sharding import make_mesh
from jaxgpt.text.hf_tokenizer import HFTokenizer
from jaxgpt.text.tokenizer import ByteTokenizer
from jaxgpt.text.train import train_sentencepiece

STORED = dict(np.load(GOLDENS / "gguf.npz"))
FILES = sorted({name.split("/")[0] for name in STORED if "/" in name})
TEXT = str(STORED["text"])


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all the files of which there are golden numbers, and their runs."""
    folder = tmp_path_factory.mktemp("gguf")
    gguf_models.main(folder)
    return folder


def digest(path: Path) -> str:
    """As tests/goldens/make_gguf.py makes it."""
    reader, found = library.GGUFReader(path), hashlib.sha256()
    for name, field in sorted(reader.fields.items()):
        if not name.startswith("GGUF."):
            found.update(repr((name, field.contents())).encode())
    for tensor in sorted(reader.tensors, key=lambda tensor: tensor.name):
        found.update(repr((tensor.name, tensor.shape.tolist(), tensor.tensor_type.name)).encode())
        found.update(tensor.data.tobytes())
    return found.hexdigest()


def read(path: Path) -> Found:
    return read_model(path, "", path.with_suffix(""))


@cache
def computing(model: GPT) -> Any:
    """A model's logits, of rows of 16 tokens."""
    module = model_of(model)

    def compute(params: dict, tokens_BT: jax.Array) -> jax.Array:
        made = module(params)
        return made.logits(made.hidden(plain(tokens_BT)).x_BTD)

    return jax.jit(compute)


def logits(model: Any, params: dict, ids: list[int]) -> np.ndarray:
    row = np.zeros((1, 16), np.int32)
    row[0, : len(ids)] = ids
    return np.asarray(computing(model)(params, row)[0, : len(ids)])


def assert_greedy(model: Any, params: dict, ids: list[int], after: list[int]) -> None:
    """That each id is the most probable one after those before it."""
    made = logits(model, params, [*ids, *after]).argmax(-1)
    assert made[len(ids) - 1 : -1].tolist() == after


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_the_one_that_the_golden_numbers_are_of(name: str, files: Path) -> None:
    assert digest(files / f"{name}.gguf") == str(STORED[f"{name}/digest"])


@pytest.mark.parametrize("name", [name for name in FILES if not name.endswith("lora")])
def test_what_is_read_writes_what_others_write(name: str, files: Path) -> None:
    """What transformers and llama.cpp write; the latter rounds activations of int8 products, too."""
    found = read(files / f"{name}.gguf")
    ids, params = found.tokenizer.encode(TEXT), found.load(mesh(ONE))
    if f"{name}/ids" in STORED:
        assert ids == STORED[f"{name}/ids"].tolist()
        whole = [*ids, *STORED[f"{name}/continuation"].tolist()]
        made = logits(found.run.model, params, whole)
        np.testing.assert_allclose(made, STORED[f"{name}/logits"], atol=2e-4)
        assert made.argmax(-1)[len(ids) - 1 : -1].tolist() == whole[len(ids) :]
    same = 7 if name == "qwen2-q8_0" else 12  # its eighth is a near tie
    assert_greedy(found.run.model, params, ids, STORED[f"{name}/llama_cpp"].tolist()[:same])


def test_an_adapter_is_read_by_llama_cpp(files: Path) -> None:
    run = load_run(files / "runs" / "lora")
    params, _ = load_params(files / "runs" / "lora", run, make_mesh({"data": 1}))
    ids = gguf_models.words("mistral").encode(TEXT)
    assert_greedy(run.model, params, ids, STORED["llama-f16-lora/llama_cpp"].tolist())
    assert STORED["llama-f16-lora/llama_cpp"].tolist() != STORED["llama-f16/llama_cpp"].tolist()


@pytest.mark.parametrize("name", ["llama3-f16", "qwen3-f16", "gemma3-f16"])
def test_there_and_back(name: str, files: Path, tmp_path: Path) -> None:
    """The config, the tokenizer and its template are those of the run; in float32 the parameters too."""
    source = files / "runs" / name.split("-")[0]
    assert (
        main(["export", str(source), str(tmp_path / "it.gguf"), "--format", "gguf", "--dtype", "float32"])
        == 0
    )
    assert main(["import", str(tmp_path / "it.gguf"), str(tmp_path / "back")]) == 0
    run, held = load_run(tmp_path / "back"), load_run(source)
    assert canonical(run.model) == canonical(held.model)
    assert run.templated
    ours, theirs = (
        load_params(p, r, make_mesh({"data": 1}))[0] for p, r in ((source, held), (tmp_path / "back", run))
    )
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    words, again = gguf_models.words(gguf_models.MODELS[name].words), read(tmp_path / "it.gguf").tokenizer
    assert isinstance(again, HFTokenizer)
    assert again.template is not None and words.template is not None
    assert again.template.source == words.template.source
    assert set(words.stop_ids) <= set(again.stop_ids)
    assert again.special == words.special
    messages = [{"role": "user", "content": "hello the cat"}]
    assert again.template.prompt(messages) == words.template.prompt(messages)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_types_that_are_read(kind: str, files: Path, tmp_path: Path) -> None:
    """Matrices of a type are what the library's own inverse makes of them."""
    source = library.GGUFReader(files / "qwen2-f16.gguf")
    writer = library.GGUFWriter(tmp_path / "it.gguf", "qwen2")
    for name, field in source.fields.items():
        if not name.startswith(("GGUF.", "general.architecture")):
            sub = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], sub)
    expected = {}
    for tensor in source.tensors:
        array = library.dequantize(tensor.data, tensor.tensor_type)
        chosen = library.GGMLQuantizationType[kind if array.ndim > 1 else "F32"]
        made = library.quantize(array, chosen)
        writer.add_tensor(tensor.name, made, raw_dtype=chosen)
        expected[tensor.name] = library.dequantize(made, chosen).reshape(array.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = read(tmp_path / "it.gguf")
    params = found.load(mesh(ONE))
    np.testing.assert_array_equal(params["embed"]["weight"], expected["token_embd.weight"])
    down_FD = params["blocks"]["mlp"]["down"]["weight"][1]
    np.testing.assert_array_equal(down_FD, expected["blk.1.ffn_down.weight"].T)
    assert found.run.compute.dtype == ("bfloat16" if kind == "BF16" else "float32")


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_a_tokenizer_of_our_own_gives_the_same_ids(kind: str, tmp_path: Path) -> None:
    words: Any = ByteTokenizer()
    if kind == "bpe":
        texts = [f"{text} {i}" for i in range(40) for text in (*tokenizers.SAMPLE, "the cat sat on the mat")]
        words = train_sentencepiece(texts, 380, "bpe", threads=1)
    words.save(tmp_path / "ours")
    tokenizers.write(tmp_path, words, tmp_path / "ours", dialogues=True)
    as_hf = HFTokenizer.from_folder(tmp_path)
    metadata = gguf_words.write_words(as_hf, words.vocab_size, tokenizers.SAMPLE, bos=True)
    back = HFTokenizer(gguf_words.read_words(metadata))
    for text in ("never seen: Ω≈ç√∫˜µ\n\n\n   x", "the mat sat", " two  spaces "):
        assert back.encode(text) == words.encode(text)
    assert back.adds_bos
    assert words.control["<|end|>"] in back.stop_ids


def test_the_end_of_a_text_may_be_its_unknown_token_too() -> None:
    """As in GPT-2's own files: bytes never lack a token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    names = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|endoftext|>"]
    made = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(names[-1:])
    config = dict.fromkeys(("unk_token", "bos_token", "eos_token"), names[-1])
    files = {"tokenizer.json": made.to_str().encode(), "tokenizer_config.json": json.dumps(config).encode()}
    metadata = gguf_words.write_words(HFTokenizer(files), 257, tokenizers.SAMPLE, bos=False)
    back = HFTokenizer(gguf_words.read_words(metadata))
    assert set(back.stop_ids) == {256} and back.vocab_size == 257
    assert back.encode(TEXT) == made.encode(TEXT).ids


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (GPT2, "that is written as GGUF: the nearest, llama, has no place for position 'learned'"),
        (replace(gguf_models.FORM, windows=(8,)), "windows"),
        (replace(gguf_models.GEMMA, attention_scalar=8.0, attention_softcap=5.0), "attention_scalar"),
    ],
)
def test_a_model_that_a_file_cannot_hold_is_refused(model: GPT, why: str, tmp_path: Path) -> None:
    native_run(tmp_path / "run", replace(model, vocab_size=300))
    with pytest.raises(UserError, match=why):
        export(str(tmp_path / "run"), str(tmp_path / "it.gguf"), form="gguf")
    assert not (tmp_path / "it.gguf").exists()


def test_files_that_cannot_be_read_are_refused(files: Path, tmp_path: Path) -> None:
    data = (files / "llama-f16.gguf").read_bytes()
    for name, changed, why in (
        ("cut", data[: len(data) // 3], "cannot be read as GGUF"),
        ("none", b"GGUF", "cannot be read as GGUF"),
        (
            "family",
            data.replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0bloom", 1),
            "general.architecture",
        ),
        ("merges", data.replace(b"tokenizer.ggml.tokens", b"tokenizer.ggml.tokenz"), "is damaged"),
    ):
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(changed)
        with pytest.raises(UserError, match=why):
            import_(str(path), str(tmp_path / "run"))
        assert not (tmp_path / "run").exists()


def test_what_the_command_refuses(files: Path, tmp_path: Path) -> None:
    run = str(files / "runs" / "llama")
    for asked, why in (
        ({"folder": str(tmp_path / "it.bin")}, "let it end in .gguf"),
        ({"folder": str(files / "llama-f16.gguf")}, "exists"),
        ({"dtype": "bfloat16"}, "GGUF files are written in"),
        ({"peft": True}, "LoRA alone"),
    ):
        with pytest.raises(UserError, match=why):
            export(**({"run": run, "folder": str(tmp_path / "it.gguf"), "form": "gguf"} | asked))
    with pytest.raises(UserError, match="add --format gguf"):
        export(run, str(tmp_path / "out"), dtype="q8_0")


def test_pairs_that_are_rotated_become_neighbours() -> None:
    rows = np.arange(8)[:, None]
    assert gguf.interleave(rows, 2, back=False)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    np.testing.assert_array_equal(gguf.interleave(gguf.interleave(rows, 1, back=False), 1, back=True), rows)
