"""`jaxgpt export RUN FILE.gguf --format gguf`: a run, or its LoRA adapter alone, as llama.cpp reads it."""

from __future__ import annotations

import functools
import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import numpy as np

from jaxgpt.checkpoint.store import load_saved
from jaxgpt.config import GPT, ONE_DEVICE, DoRA, LoRA, Mesh, Run, load_run
from jaxgpt.convert import gguf, tokenizers, weights
from jaxgpt.convert.family import Family, Fields, canonical
from jaxgpt.convert.files import Entry
from jaxgpt.convert.folders import whole
from jaxgpt.convert.gguf_words import write_words
from jaxgpt.convert.peft import PREFIX, lora_arrays
from jaxgpt.convert.registry import FAMILIES, family_of
from jaxgpt.errors import require
from jaxgpt.files import require_writable
from jaxgpt.sample.load import load_trained, sampling_mesh
from jaxgpt.sample.settings import Verify
from jaxgpt.text.hf_tokenizer import HFTokenizer
from jaxgpt.text.tokenizer import Tokenizer
from jaxgpt.tune.base import flatten
from jaxgpt.tune.few_bits import whole_params

_BLOCK = 32
"""Weights that share a scale in Q8_0."""
TYPES = {"": "F16", "float32": "F32", "float16": "F16", "q8_0": "Q8_0"}
"""`--dtype` and the type of matrices."""
_NUMBERS = {"F32": 0, "F16": 1, "Q8_0": 7}
"""Of types, in `general.file_type`."""
_HELD = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "Q8_0": np.dtype(np.uint8)}


class Content(NamedTuple):
    """What a file will hold: an architecture, metadata, and tensors that are made when their turn comes."""

    name: str
    metadata: dict[str, Any]
    tensors: list[Entry]

    @property
    def size(self) -> int:
        """Bytes of the tensors."""
        return sum(math.prod(_stored(t)) * _HELD[t.dtype].itemsize for t in self.tensors)


def export_gguf(
    source: Path, target: Path, checkpoint: str, verify: Verify, mesh: Mesh, dtype: str, *, peft: bool
) -> None:
    """A run, or with `peft` its adapter alone, as a GGUF file.

    Raises:
      UserError: a model, a tokenizer, a type or a way of tuning that GGUF has no place for.
    """
    require(target.suffix == gguf.SUFFIX, f"{target} is no name of a GGUF file; let it end in {gguf.SUFFIX}.")
    require(not target.exists(), f"{target} exists; name another file or remove it.")
    require(
        dtype in TYPES, f"--dtype is {dtype!r}; GGUF files are written in {', '.join(filter(None, TYPES))}."
    )
    require(
        not (peft and dtype), f"--dtype is {dtype!r} but GGUF's adapters are written in float32; drop it."
    )
    require_writable(target.parent)
    held = load_run(source)
    content = (
        lora(source, held, checkpoint, verify)
        if peft
        else whole_model(source, held, checkpoint, verify, mesh, TYPES[dtype])
    )
    with whole(target, content.size, file=True) as part:
        write_file(part, content)
    what = "a LoRA over " if peft else ""
    print(f"{target}: {what}{content.name}, {len(content.tensors)} tensors")


def whole_model(source: Path, held: Run, checkpoint: str, verify: Verify, mesh: Mesh, dtype: str) -> Content:
    """A run's model with its tokenizer, a tuned run merged.

    Args:
      source, held: the run's folder and config.
      checkpoint, verify, mesh: see `load_trained`.
      dtype: of matrices, `F32`, `F16` or `Q8_0`; vectors stay in float32, and matrices whose rows no block of
        Q8_0 divides in float16.

    Raises:
      UserError: a model or a tokenizer that GGUF has no place for.
    """
    family, model = _family_of(held.model), cast(GPT, held.model)
    name, metadata = architecture(family, model)
    trained = load_trained(source, which=checkpoint, mesh=mesh, verify=verify)
    require(
        "added" not in trained.params,
        f"{source} is tuned by {type(held.tune).__name__}, which adds something beside the weights that GGUF "
        "has no place for; tune it by LoRA or in full.",
    )
    words = _as_hf(trained.tokenizer, source / "tokenizer", dialogues=held.templated)
    metadata |= {"general.name": held.name} | write_words(
        words, metadata[f"{name}.vocab_size"], tokenizers.SAMPLE, bos=trained.bos
    )
    metadata |= {"general.file_type": _NUMBERS[dtype], "general.quantization_version": 2}
    entries = weights.entries(family, model, whole_params(trained.params), {}, "F32")
    return Content(name, metadata, list(_as_gguf(name, model, entries, dtype)))


def _as_hf(words: Tokenizer, saved: Path, *, dialogues: bool) -> HFTokenizer:
    """A tokenizer as Hugging Face's files have it."""
    if isinstance(words, HFTokenizer):
        return words
    with tempfile.TemporaryDirectory() as folder:
        tokenizers.write(Path(folder), words, saved, dialogues=dialogues)
        return HFTokenizer.from_folder(folder)


def lora(source: Path, held: Run, checkpoint: str, verify: Verify) -> Content:
    """A tuned run's LoRA alone, as llama.cpp's `--lora` takes it.

    Raises:
      UserError: another way of tuning.
    """
    tune = held.tune
    require(
        isinstance(tune, LoRA) and not isinstance(tune, DoRA),
        f"{source} is tuned by {type(tune).__name__}; GGUF's adapters are LoRA alone: leave out --peft and "
        "write the whole model.",
    )
    assert isinstance(tune, LoRA)
    family, model = _family_of(held.model), held.model
    name, _ = architecture(family, model)
    saved, _ = load_saved(source, held, sampling_mesh(held, ONE_DEVICE), checkpoint, verify=verify)
    _, arrays = lora_arrays(tune, flatten(jax.device_get(saved)), family, model)
    metadata = {
        "general.type": "adapter",
        "general.name": held.name,
        "adapter.type": "lora",
        "adapter.lora.alpha": float(tune.scale * tune.rank),
    }
    named = {key.removeprefix(PREFIX): array for key, array in arrays.items()}
    return Content(name, metadata, list(_lora_tensors(name, model, named)))


def _family_of(model: Any) -> Family:
    return family_of(model, gguf.ARCHITECTURES, "that is written as GGUF")


def architecture(family: Family, model: Any) -> tuple[str, dict[str, Any]]:
    """The architecture of a model, and the metadata that say its sizes.

    Raises:
      UserError: no architecture of GGUF's that is supported has a place for it.
    """
    name = gguf.ARCHITECTURES[family.model_type]
    config = Fields(family.defaults, family.write(model))
    sizes = {key: config.get(field) for key, field in gguf.FIELDS.items()}
    sizes |= {"attention.key_length": model.head, "attention.value_length": model.head}
    sizes |= {"rope.dimension_count": model.head, "attention.head_count_kv": model.groups}
    if not gguf.LAYOUTS[name].windows:
        del sizes["attention.sliding_window"]
    scaling = model.rope_scaling
    if scaling is not None and scaling.form == "linear":
        sizes |= {"rope.scaling.type": "linear", "rope.scaling.factor": scaling.factor}
    elif scaling is not None:
        sizes[gguf.ORIGINAL] = scaling.original_context
    metadata = {f"{name}.{key}": value for key, value in sizes.items() if value is not None}
    _check_lossless(name, model, metadata)
    return name, metadata


def _check_lossless(name: str, model: GPT, metadata: dict[str, Any]) -> None:
    """Refuse a model of which the file would say something else."""
    there = dict.fromkeys(gguf.BIASES.values()) if model.bias else {}
    there |= {} if model.tied else {gguf.HEAD: None}
    family = FAMILIES[gguf.LAYOUTS[name].model_type]
    config = gguf.config_of(name, metadata, there)
    if model.rope_scaling is not None and model.rope_scaling.form == "llama3":
        config["rope_scaling"] = gguf.llama3(config, gguf.stretch(model), model.rope_scaling.original_context)
    fields = Fields(family.defaults, config)
    ours, theirs = canonical(model), canonical(family.read(fields))
    lost = [field for field in ours if ours[field] != theirs[field]] + fields.problems
    require(
        not lost,
        f"GGUF's {name} has no place for this model's {', '.join(lost)}; `--format hf` writes all of it.",
    )


def _as_gguf(name: str, model: Any, tensors: Iterable[Entry], dtype: str) -> Iterator[Entry]:
    """A model's tensors of Hugging Face's names as GGUF has them."""
    names, heads = gguf.names(name, model.layers), {"q_proj": model.heads, "k_proj": model.groups}
    for entry in tensors:
        make = functools.partial(_turned, name, entry, heads)
        kind = "F32" if len(entry.shape) < 2 else dtype
        if kind == "Q8_0" and entry.shape[-1] % _BLOCK:
            kind = "F16"
        yield Entry(names[entry.name], kind, entry.shape, make)
    if model.rope_scaling is not None and model.rope_scaling.form == "llama3":
        stretch_K = gguf.stretch(model)
        yield Entry(gguf.FREQUENCIES, "F32", stretch_K.shape, lambda: stretch_K)


def _turned(name: str, entry: Entry, heads: Mapping[str, int]) -> np.ndarray:
    return gguf.turned(name, entry.name, entry.make(), heads, back=False)


def _lora_tensors(name: str, model: Any, arrays: Mapping[str, np.ndarray]) -> Iterator[Entry]:
    """MODULE.lora_A.weight [R, inputs] and MODULE.lora_B.weight [outputs, R] as GGUF has them."""
    names, heads = gguf.names(name, model.layers), {"q_proj": model.heads, "k_proj": model.groups}
    for key, array in arrays.items():
        module, part, leaf = key.rsplit(".", 2)
        if part == "lora_B":  # its rows are the module's outputs
            array = gguf.turned(name, f"{module}.{leaf}", array, heads, back=False)
        make = functools.partial(np.asarray, array)
        yield Entry(f"{names[f'{module}.{leaf}']}.{part.lower()}", "F32", array.shape, make)


def _stored(tensor: Entry) -> tuple[int, ...]:
    """The shape of what is written, of bytes where it is quantized."""
    library = gguf.library()
    if tensor.dtype != "Q8_0":
        return tensor.shape
    return library.quant_shape_to_byte_shape(tensor.shape, library.GGMLQuantizationType.Q8_0)


def write_file(path: Path, content: Content) -> None:
    """Write a GGUF file; one tensor is held at a time.

    Raises:
      UserError: values beyond the range of float16.
    """
    library = gguf.library()
    writer = library.GGUFWriter(path, content.name)
    add = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    for key, value in content.metadata.items():
        add[type(value)](key, value)
    for tensor in content.tensors:
        shape, held = _stored(tensor), _HELD[tensor.dtype]
        kind = library.GGMLQuantizationType[tensor.dtype]
        writer.add_tensor_info(tensor.name, shape, held, math.prod(shape) * held.itemsize, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in content.tensors:
        writer.write_tensor_data(_quantized(library, tensor))
    writer.close()


def _quantized(library: Any, tensor: Entry) -> np.ndarray:
    array = np.ascontiguousarray(tensor.make(), np.float32)
    most = float(np.abs(array).max(initial=0))
    require(
        tensor.dtype == "F32" or most <= float(np.finfo(np.float16).max),
        f"{tensor.name} has values up to {most:.3g}, beyond the range of float16; take --dtype float32.",
    )
    return library.quantize(array, library.GGMLQuantizationType[tensor.dtype])
