"""GGUF, the format of llama.cpp: a model's sizes, the names of its tensors and how they lie, both ways.

A file's metadata is turned into the fields of a Hugging Face config.json and its tensors are given the names
that transformers has for them, so that the families of `jaxgpt.convert` serve here, too; their tokenizers are
in `gguf_words`. Format: github.com/ggml-org/ggml, docs/gguf.md; layouts: llama.cpp's convert_hf_to_gguf.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxgpt.config import GPT
from jaxgpt.convert.family import Fields
from jaxgpt.convert.files import DTYPES, Header
from jaxgpt.convert.gguf_words import read_words
from jaxgpt.convert.registry import FAMILIES
from jaxgpt.errors import UserError, library_errors, require, require_known
from jaxgpt.layers.position import frequencies

Metadata = dict[str, Any]
SUFFIX = ".gguf"


class Layout(NamedTuple):
    """What llama.cpp does with a family's tensors.

    Attributes:
      model_type: the family, as config.json names it.
      interleaved: whether rotary pairs of queries and keys are neighbours, not halves of a head.
      norm_offset: added to the scales of norms.
      windows: whether layers may have windows.
      scalar_of_width: the number of layers at which attention scores are divided by the root of width / heads
        and not of the head's width: llama.cpp knows Gemma's 27B by it.
    """

    model_type: str
    interleaved: bool = False
    norm_offset: float = 0.0
    windows: bool = False
    scalar_of_width: int = 0


LAYOUTS: Mapping[str, Layout] = {
    "llama": Layout("llama", interleaved=True),
    "qwen2": Layout("qwen2"),
    "qwen3": Layout("qwen3"),
    "gemma2": Layout("gemma2", norm_offset=1.0, windows=True, scalar_of_width=46),
    "gemma3": Layout("gemma3_text", norm_offset=1.0, windows=True, scalar_of_width=62),
}
"""By `general.architecture`."""
ARCHITECTURES: Mapping[str, str] = {v.model_type: k for k, v in LAYOUTS.items()} | {"mistral": "llama"}
"""The inverse."""
FIELDS = {
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "rope.freq_base": "rope_theta",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
"""Metadata, below the architecture's name, and the fields of config.json that say the same."""
BIASES = {"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_up.bias"}
FREQUENCIES, HEAD = "rope_freqs.weight", "output.weight"
ORIGINAL = "rope.scaling.original_context_length"
_READ = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1")


def library() -> Any:
    """The gguf package.

    Raises:
      UserError: it is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise UserError(
            "GGUF files need gguf, which is not installed; run `pip install 'jaxgpt[gguf]'`."
        ) from None
    return gguf


def is_gguf(path: Path) -> bool:
    """Whether a path is that of a GGUF file."""
    return path.suffix == SUFFIX and path.is_file()


# ------------------------------------------------------------------------------------------- import


class Held(NamedTuple):
    """A GGUF file, its tensors not yet read.

    Attributes:
      config: what config.json would say.
      found: the tensors by the names of Hugging Face.
      words: files of its tokenizer, as `HFTokenizer` takes them.
    """

    config: dict[str, Any]
    found: dict[str, Header]
    words: dict[str, bytes]


def read(path: Path) -> Held:
    """What a GGUF file holds.

    Raises:
      UserError: an architecture, a tokenizer or a type of weights that is not supported, a file of
        several parts, or a damaged one.
    """
    gguf, fix = library(), "download it again"
    with library_errors(f"{path} cannot be read as GGUF", fix):
        reader = gguf.GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {tensor.name: tensor for tensor in reader.tensors}
    require(
        metadata.get("split.count", 1) < 2, f"{path} is one part of several; join them with llama-gguf-split."
    )
    name = metadata.get("general.architecture")
    require_known(str(name), LAYOUTS, f"{path}: general.architecture is {name!r:.60}")
    with library_errors(f"{path} is damaged", fix):
        config = config_of(str(name), metadata, tensors)
        words = read_words(metadata)
    types = {tensor.tensor_type.name for tensor in tensors.values()}
    require(
        types <= {*_READ},
        f"{path} has weights of type {', '.join(sorted(types - {*_READ}))}; only {', '.join(_READ)} are "
        "read: take a file of one of these.",
    )
    return Held(config, _headers(path, str(name), config, tensors), words)


def config_of(name: str, metadata: Metadata, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config.json."""
    own = {k.removeprefix(f"{name}."): v for k, v in metadata.items() if k.startswith(f"{name}.")}
    config: dict[str, Any] = {"model_type": LAYOUTS[name].model_type}
    config["architectures"] = [FAMILIES[config["model_type"]].architecture]
    config |= {field: _short(own[key]) for key, field in FIELDS.items() if key in own}
    if not LAYOUTS[name].windows:
        config.pop("sliding_window", None)
    config["tie_word_embeddings"] = HEAD not in tensors
    if "vocab_size" not in config:
        config["vocab_size"] = len(metadata["tokenizer.ggml.tokens"])
    if "head_dim" not in config and "rope.dimension_count" in own:
        config["head_dim"] = own["rope.dimension_count"]
    config |= {field: tensor in tensors for field, tensor in BIASES.items()} if name == "llama" else {}
    if LAYOUTS[name].scalar_of_width:
        config["query_pre_attn_scalar"] = _scalar(name, config)
    form = own.get("rope.scaling.type", "none")
    if form != "none":
        config["rope_scaling"] = {"rope_type": form, "factor": own.get("rope.scaling.factor", 1.0)}
    if FREQUENCIES in tensors:
        config["rope_scaling"] = llama3(config, tensors[FREQUENCIES].data, own.get(ORIGINAL, 8192))
    return config


def _short(value: Any) -> Any:
    """A number of float32 as the shortest decimal that means it, as config.json has it."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _scalar(name: str, config: Mapping[str, Any]) -> int:
    """Gemma's `query_pre_attn_scalar`, which llama.cpp knows by the number of layers."""
    if config["num_hidden_layers"] == LAYOUTS[name].scalar_of_width:
        return config["hidden_size"] // config["num_attention_heads"]
    return config["head_dim"]


def llama3(config: Mapping[str, Any], stretch_K: np.ndarray, original: int) -> dict[str, Any]:
    """Llama 3.1's `rope_scaling`, of which a file keeps the result for each pair of features alone."""
    scaling = {
        "rope_type": "llama3",
        "factor": round(float(stretch_K.max()), 3),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": original,
    }
    family = FAMILIES["llama"]
    model = family.read(Fields(family.defaults, {**config, "rope_scaling": scaling}))
    assert isinstance(model, GPT)
    made_K = stretch(model)
    require(
        made_K.shape == stretch_K.shape and bool(np.allclose(made_K, stretch_K, rtol=1e-3)),
        f"{FREQUENCIES} is not what Llama 3.1's scaling gives over {original} tokens of context; only that "
        "one is supported",
    )
    return scaling


def stretch(model: GPT) -> np.ndarray:
    """By how much each rotary wavelength is longer than without scaling, float32 [K/2]."""
    plain = dataclasses.replace(model, rope_scaling=None)
    return (frequencies(plain, 0) / frequencies(model, 0)).astype(np.float32)


def _headers(
    path: Path, name: str, config: Mapping[str, Any], tensors: Mapping[str, Any]
) -> dict[str, Header]:
    """The tensors by their names in Hugging Face's files, read when their turn comes."""
    theirs = {own: hf for hf, own in names(name, config["num_hidden_layers"]).items()}
    held = {theirs.get(n, n): tensor for n, tensor in tensors.items() if n != FREQUENCIES}
    heads = rotary_heads(config)

    def get(hf: str) -> np.ndarray:
        tensor = held[hf]
        shape, kind = tuple(map(int, tensor.shape[::-1])), tensor.tensor_type
        array = library().dequantize(tensor.data, kind).reshape(shape)
        return turned(name, hf, array, heads, back=True).astype(DTYPES[_dtype(tensor)])

    opened = contextlib.nullcontext(_Opened(get))
    return {
        hf: Header(path, tuple(map(int, tensor.shape[::-1])), _dtype(tensor), lambda _: opened)
        for hf, tensor in held.items()
    }


class _Opened(NamedTuple):
    """What `files.each` asks of a file."""

    get_tensor: Callable[[str], np.ndarray]


def _dtype(tensor: Any) -> str:
    """The type that holds a tensor's values exactly."""
    return tensor.tensor_type.name if tensor.tensor_type.name in DTYPES else "F32"


# ------------------------------------------------------------------------------- names and layouts


def names(name: str, layers: int) -> dict[str, str]:
    """Hugging Face's name of each tensor that a model may have, and GGUF's."""
    gguf, family = library(), FAMILIES[LAYOUTS[name].model_type]
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    table, found = gguf.get_tensor_name_map(arch, layers), dict[str, str]()
    for place in dict.fromkeys(family.places.values()):
        for layer in range(layers if "{layer}" in place.name else 1):
            module = place.name.format(layer=layer)
            if own := table.get_name(module):
                found |= {f"{module}.{leaf}": f"{own}.{leaf}" for leaf in ("weight", "bias")}
    return found


def rotary_heads(config: Mapping[str, Any]) -> dict[str, int]:
    """Heads of the projections whose features are rotated."""
    heads = config["num_attention_heads"]
    return {"q_proj": heads, "k_proj": config.get("num_key_value_heads") or heads}


def turned(name: str, hf: str, array: np.ndarray, heads: Mapping[str, int], *, back: bool) -> np.ndarray:
    """A tensor as GGUF has it, of Hugging Face's, or `back`."""
    layout, module = LAYOUTS[name], hf.split(".")[-2]
    if layout.norm_offset and module.endswith("norm"):
        return array - layout.norm_offset if back else array + layout.norm_offset
    if not layout.interleaved or module not in heads:
        return array
    return interleave(array, heads[module], back=back)


def interleave(array: np.ndarray, heads: int, *, back: bool) -> np.ndarray:
    """Rows [heads * K, ...] of which each head's i-th and K/2 + i-th become neighbours, or `back`."""
    half = len(array) // heads // 2
    split = (heads, half, 2) if back else (heads, 2, half)
    return array.reshape(*split, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
