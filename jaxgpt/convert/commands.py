"""`jaxgpt import FOLDER RUN` and `jaxgpt export RUN FOLDER`.

jax is imported only once a command runs, so that `--help` answers at once.
"""

from __future__ import annotations

import contextlib
import logging
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from jaxgpt.config import (
    GPT,
    ONE_DEVICE,
    Full,
    MaskedLM,
    Mesh,
    PrefixTuning,
    Run,
    code,
    load,
    load_run,
    to_json,
)
from jaxgpt.convert.folders import progress, refuse_filled, whole
from jaxgpt.errors import require
from jaxgpt.files import read_json, require_writable, write_json
from jaxgpt.sample.settings import Verify

log = logging.getLogger(__name__)

HF = "hf"
"""In a run's folder: where the imported config.json and generation_config.json are kept."""
TENSORS = "tensors.json"
"""Beside them: name and type of each tensor that was imported."""
_REWRITTEN = ("rope_parameters", "sliding_window_pattern", "_sliding_window_pattern")
"""Fields of config.json whose contents we write under other names."""
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}

DType = Literal["F32", "F16", "BF16"]
"""Of a weight, as safetensors names it."""

ModelFolder = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
RunFolder = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]


def import_(
    folder: ModelFolder, run: RunFolder, *, tokenizer: str = "", base: str = "", mesh: Mesh = ONE_DEVICE
) -> None:
    """Import a Hugging Face or GGUF model as a run, to sample, chat, evaluate, or train from with init_from.

    The parameters become float32; their original type and config.json are kept for `export`. A folder of
    peft's (adapter_config.json) becomes a tuned run over the run that --base names.

    Args:
      folder: folder of the model: config.json, safetensors files and the tokenizer's; or a GGUF file.
      run: folder to create.
      tokenizer: folder of another tokenizer, or `byte`; empty for the model's own.
      base: run folder of the model that an adapter of peft's belongs to.
      mesh: devices to spread the parameters over while they are converted.

    Raises:
      UserError: a family or a field that has no counterpart here, tensors that do not fit it or are not
        finite, a damaged file, or a folder that cannot be written.
    """
    from jaxgpt.convert import files, weights
    from jaxgpt.convert.load import read_model
    from jaxgpt.convert.peft import is_adapter
    from jaxgpt.sample.load import sampling_mesh

    source, target = Path(folder), Path(run)
    refuse_filled(target, "a run")
    if is_adapter(source) or base:
        _import_adapter(source, target, base, tokenizer)
        return
    model = read_model(source, tokenizer, target)
    placed, family, found = sampling_mesh(model.run, mesh), model.family, model.found
    same = source.is_dir() and model.config == files.read_json(source / files.CONFIG)
    size = sum(math.prod(found[name].shape) for name in model.used) * 4  # in float32
    with whole(target, size) as work, progress(model.size) as step:
        model.tokenizer.save(work / "tokenizer")
        _remember(source, work / HF, model.config, same)
        names = {n: weights.unwrapped(n) if same else weights.usual(family, n) for n in model.used}
        write_json(work / HF / TENSORS, {names[name]: found[name].dtype for name in model.used})
        save_params(work, model.run, model.load(placed, step))
    print(f"{target}: {family.model_type} of {folder}; try `jaxgpt {_verb(model.run)} {target}`")


def _import_adapter(source: Path, target: Path, base: str, tokenizer: str) -> None:
    """A folder of peft's as a tuned run."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from jaxgpt.checkpoint import load_params
    from jaxgpt.checkpoint.whole import note_base, params_digest, whole_model
    from jaxgpt.convert.peft import CONFIG, is_adapter, read_adapter
    from jaxgpt.convert.registry import family_of
    from jaxgpt.sample.load import sampling_mesh
    from jaxgpt.target import Target
    from jaxgpt.train.hooks import MADE_FROM
    from jaxgpt.tune import make_tuning

    require(
        is_adapter(source),
        f"--base is {base!r} but {source} has no {CONFIG}, as an adapter of peft has; drop it.",
    )
    require(bool(base), f"{source} is an adapter of peft; name the run of its model with --base.")
    require(not tokenizer, f"--tokenizer is {tokenizer!r} but an adapter has that of its base; drop it.")
    held, name = load_run(base), target.resolve().name
    placed = sampling_mesh(held, ONE_DEVICE)
    adapter = read_adapter(source, family_of(held.model), held.model)
    places: dict[str, Any] = {"name": name, "runs": str(target.resolve().parent), "init_from": base}
    if getattr(adapter.tune, "tokens", 0):  # rows are shorter by the virtual tokens
        places["data"] = replace(held.data, length=None)
    made = replace(held, tune=adapter.tune, **places)
    # The layout that training would have: every array is there, in the order of the abstract state.
    abstract = nnx.to_pure_dict(make_tuning(made.tune, made.model, made.compute, Target.of(placed)).learned)
    params = jax.tree.map(lambda like, array: jnp.asarray(array, like.dtype), abstract, adapter.learned)
    whole_params, step = load_params(base, held, placed)
    whole_model(made, whole_params)  # refuses a base with virtual tokens or adapters of its own
    with whole(target, sum(x.nbytes for x in jax.tree.leaves(params))) as work:
        shutil.copytree(Path(base) / "tokenizer", work / "tokenizer")
        note_base(work, {"run": base, "step": step, "digest": params_digest(whole_params)}, copy=False)
        write_json(work / MADE_FROM, {"peft": str(source), "base": base, "step": step})
        save_params(work, made, params, step)  # the base's step: it says how texts begin
    print(f"{target}: {type(adapter.tune).__name__} over {base}; try `jaxgpt {_verb(made)} {target}`")


def _verb(run: Run) -> str:
    if isinstance(run.objective, MaskedLM):
        return "info"
    return "chat" if run.templated else "sample"


def _remember(source: Path, folder: Path, config: dict[str, Any], same: bool) -> None:
    """Keep config.json and generation_config.json, byte for byte where they are of this model alone."""
    from jaxgpt.convert.files import CONFIG, GENERATION

    folder.mkdir()
    if same:
        (folder / CONFIG).write_bytes((source / CONFIG).read_bytes())
    else:
        write_json(folder / CONFIG, config)
    if (source / GENERATION).is_file():
        (folder / GENERATION).write_bytes((source / GENERATION).read_bytes())


def save_params(folder: Path, run: Run, params: dict[str, Any], step: int = 0) -> None:
    """config.json and a checkpoint of the parameters, without an optimizer's state."""
    import jax.numpy as jnp

    from jaxgpt.checkpoint import Checkpoints
    from jaxgpt.train.provenance import environment
    from jaxgpt.train.state import State

    write_json(folder / "config.json", {"run": code.portable(to_json(run)), "environment": environment()})
    with contextlib.closing(Checkpoints(folder)) as checkpoints:
        checkpoints.save(State(jnp.int32(step), jnp.int32(0), params, ()), {})


# ------------------------------------------------------------------------------------------- export


def export(
    run: RunFolder,
    folder: ModelFolder,
    *,
    checkpoint: str = "best",
    verify: Verify = True,
    form: Annotated[Literal["hf", "gguf", "stablehlo"], tyro.conf.arg(name="format")] = "hf",
    peft: bool = False,
    dtype: Literal["", "float32", "bfloat16", "float16", "q8_0"] = "",
    max_shard_size: str = "5GB",
    mesh: Mesh = ONE_DEVICE,
) -> None:
    """Write a run as a Hugging Face model, which transformers loads without code of its own, or otherwise.

    Args:
      run: folder of the run.
      folder: folder to create; of GGUF, the file.
      checkpoint: `best` on validation data, `newest`, or a step number.
      form: `hf` for a folder of Hugging Face's, `gguf` for a file of llama.cpp's (Llama, Mistral, Qwen 2
        and 3, Gemma 2 and 3), `stablehlo` for programs that jax runs without this package.
      peft: of a tuned run, write the adapter alone, as a folder that peft's `PeftModel.from_pretrained` loads
        over the base, or as a GGUF adapter; unspecified means the whole model, merged.
      dtype: type of the tensors; unspecified means as imported, or float32; of GGUF float16. `q8_0` is of
        GGUF: 8 bits and a scale for each 32 weights.
      max_shard_size: maximum size of a file, such as 5GB or 500MB.
      mesh: devices to spread the model over.

    Raises:
      UserError: a model that belongs to no family of Hugging Face.
    """
    if form == "gguf":
        from jaxgpt.convert.gguf_export import export_gguf

        export_gguf(Path(run), Path(folder), checkpoint, verify, mesh, dtype, peft=peft)
        return
    if form == "stablehlo":
        from jaxgpt.convert.stablehlo import export_stablehlo

        require(
            not peft, "--peft writes adapters alone, which are no programs; drop it or --format stablehlo."
        )
        export_stablehlo(Path(run), Path(folder), checkpoint, verify, mesh, dtype)
        return
    from jaxgpt.convert import files, tokenizers, weights
    from jaxgpt.convert.registry import family_of, read_config
    from jaxgpt.sample.load import load_trained
    from jaxgpt.tune.few_bits import whole_params

    source, target = Path(run), Path(folder)
    held, most = load_run(source), _bytes(max_shard_size)
    require(dtype != "q8_0", "--dtype is 'q8_0', a type of GGUF's; add --format gguf, or drop it.")
    refuse_filled(target, "a model")
    if peft:
        require(not dtype, f"--dtype is {dtype!r} but adapters are written in float32; drop it.")
        _export_adapter(source, target, held, checkpoint, verify)
        return
    origin = _origin(source, held)
    family, dtypes = family_of(held.model), {}
    model: Any = held.model
    if origin is not None:
        family = read_config(files.read_json(origin / files.CONFIG), str(origin / files.CONFIG))[0]
        dtypes = read_json(origin / TENSORS, dict[str, DType], "restore it or import the model again")
    require_writable(target.parent)
    trained = load_trained(source, which=checkpoint, mesh=mesh, verify=verify)
    require(
        "added" not in trained.params,
        f"{source} is tuned by {type(held.tune).__name__}, which adds something beside the weights that "
        "transformers' models have no place for; write it with --peft.",
    )
    words = trained.tokenizer
    params = whole_params(trained.params)
    entries = list(weights.entries(family, model, params, dtypes, files.NAMES.get(dtype, "")))
    size = sum(entry.size for entry in entries)
    with whole(target, size) as work, progress(size) as done:
        tuned = origin is None or origin.parent.resolve() != source.resolve()
        _write_configs(work, origin, family, model, dtype, words, tuned=tuned)
        files.write_model(work, entries, most, done)
        tokenizers.write(work, words, source / "tokenizer", dialogues=held.templated)
    print(f"{target}: {family.model_type}, {len(entries)} tensors")


def _export_adapter(source: Path, target: Path, held: Run, checkpoint: str, verify: bool) -> None:
    """A tuned run's adapter as a folder of peft's."""
    import jax

    from jaxgpt.checkpoint.store import load_saved
    from jaxgpt.convert.peft import write_adapter
    from jaxgpt.convert.registry import family_of
    from jaxgpt.sample.load import sampling_mesh
    from jaxgpt.target import Target
    from jaxgpt.tune import make_tuning

    require(
        not isinstance(held.tune, Full),
        f"--peft writes the adapter of a tuned run, and {source} trains all parameters; drop it.",
    )
    require(
        held.task is None,
        f"{source} has a head over labels, which is not written in peft's format; `jaxgpt merge` puts it and "
        "its base into one run.",
    )
    placed = sampling_mesh(held, ONE_DEVICE)
    saved, step = load_saved(source, held, placed, checkpoint, verify=verify)
    if (
        isinstance(held.tune, PrefixTuning) and held.tune.projection
    ):  # the MLP is dropped: what it makes is kept
        tuning = make_tuning(held.tune, held.model, held.compute, Target.of(placed))
        keys, values = tuning.enter(saved, {}, None)["added"].prefix
        saved = {"added": {"keys": keys, "values": values}}
    learned = jax.device_get(saved)
    with whole(target, sum(x.nbytes for x in jax.tree.leaves(learned))) as work:
        count = write_adapter(work, held.tune, learned, family_of(held.model), held.model)
    print(f"{target}: {type(held.tune).__name__} of {source}, step {step}, {count} tensors for peft")


def _origin(folder: Path, run: Run) -> Path | None:
    """What was remembered of the model that a run is, or began as."""
    seen: set[Path] = set()
    while folder.resolve() not in seen:
        seen.add(folder.resolve())
        if (folder / HF / TENSORS).is_file():
            return folder / HF
        if not run.init_from or not (Path(run.init_from) / "config.json").is_file():
            return None
        folder = Path(run.init_from)
        run = load(folder)
    return None


def _write_configs(
    work: Path, origin: Path | None, family: Any, model: Any, dtype: str, words: Any, *, tuned: bool
) -> None:
    """config.json and generation_config.json: those imported where they still hold, else new ones.

    Args:
      tuned: whether the run is no longer the model that was imported, so that its ends of a text are what its
        own tokenizer and template say.
    """
    from jaxgpt.convert.family import canonical
    from jaxgpt.convert.files import CONFIG, GENERATION, read_json
    from jaxgpt.convert.registry import read_config
    from jaxgpt.convert.tokenizers import own_generation, with_ends

    held = None if origin is None else origin / CONFIG
    if held is None:
        ids = {f"{name}_token_id": words.control[f"<|{name}|>"] for name in ("bos", "pad")}
        head = {"architectures": [family.architecture], "model_type": family.model_type} | ids
        config = head | family.write(model) | {"torch_dtype": dtype or "float32"}
    else:
        ids, config = {}, read_json(held)
        if canonical(read_config(config, CONFIG)[1]) != canonical(model):
            kept = {name: value for name, value in config.items() if name not in _REWRITTEN}
            config = kept | family.write(model)
        if dtype:
            config = {n: value for n, value in config.items() if n != "dtype"} | {"torch_dtype": dtype}
    _write_config(work / CONFIG, with_ends(config, words) if tuned else config, held)
    told = None if origin is None or not (origin / GENERATION).is_file() else origin / GENERATION
    if told or (tuned and isinstance(model, GPT)):
        generation = read_json(told) if told else ids | own_generation(words)
        _write_config(work / GENERATION, with_ends(generation, words) if tuned else generation, told)


def _write_config(path: Path, config: dict[str, Any], held: Path | None) -> None:
    """Write a config, byte for byte as it is held where it says the same."""
    from jaxgpt.convert.files import read_json

    if held is not None and read_json(held) == config:
        path.write_bytes(held.read_bytes())
    else:
        write_json(path, config)


def _bytes(text: str) -> int:
    """`5GB` as a number of bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]?)B", text.strip(), re.IGNORECASE)
    require(found is not None, f"--max-shard-size is {text!r}; write it like 5GB or 500MB.")
    assert found is not None
    size = int(float(found[1]) * _UNITS[found[2].upper()])
    require(size > 0, f"--max-shard-size is {text!r}; it must be above 0.")
    return size
