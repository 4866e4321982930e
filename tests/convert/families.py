"""The golden families as Hugging Face folders, imported once each, and a tokenizer of plain numbers."""

from __future__ import annotations

import json
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file
from tiny import FLOAT32, ONE, mesh, sharp_params

from jaxgpt.checkpoint import Checkpoints
from jaxgpt.config import GPT, Bert, Run, to_json
from jaxgpt.convert import files, weights
from jaxgpt.convert.family import Family
from jaxgpt.convert.registry import FAMILIES, read_config
from jaxgpt.text.tokenizer import ByteTokenizer
from jaxgpt.train.state import State

GOLDENS = Path(__file__).parents[1] / "goldens"
NAMES = sorted(FAMILIES)


class Numbers(ByteTokenizer):
    """Ids that are no text and none of which ends a row, as many as the golden models have."""

    def __init__(self) -> None:
        super().__init__()
        self.vocab_size, self.control = 64, {}


class Imported(NamedTuple):
    """A model as `jaxgpt import` makes it."""

    family: Family
    model: GPT | Bert
    params: dict


@cache
def golden(name: str) -> dict[str, Any]:
    """What transformers made: `config`, `tensors` by name, `tokens`, `logits` and the rest."""
    stored = dict(np.load(GOLDENS / f"{name}.npz"))
    tensors = {k.removeprefix("tensors/"): v for k, v in stored.items() if k.startswith("tensors/")}
    rest = {k: v for k, v in stored.items() if not k.startswith("tensors/")}
    return rest | {"tensors": tensors, "config": json.loads(str(stored["config"]))}


def write_folder(
    folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray], shards: int = 1
) -> Path:
    """A Hugging Face folder of one file, or of several with their index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / files.CONFIG).write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, folder / files.ONE, {"format": "pt"})
        return folder
    where = {}
    for i in range(shards):
        part = {name: tensors[name] for name in sorted(tensors)[i::shards]}
        save_file(part, folder / f"model-{i}.safetensors", {"format": "pt"})
        where |= dict.fromkeys(part, f"model-{i}.safetensors")
    (folder / files.INDEX).write_text(json.dumps({"weight_map": where}))
    return folder


def load_folder(folder: Path, on: jax.sharding.Mesh | None = None) -> Imported:
    """The model of a folder by the functions that the command calls."""
    config = files.read_json(folder / files.CONFIG)
    family, model = read_config(config, str(folder))
    found = files.headers(folder)
    model = weights.as_found(family, model, found, config)
    used, _ = weights.check(family, model, found, str(folder))
    return Imported(family, model, weights.load(family, model, found, used, on or mesh(ONE)))


def native_run(folder: Path, model: GPT | Bert, **parts: Any) -> dict:
    """A run's folder as training leaves it, with random parameters, which it returns."""
    run = Run(**{"name": folder.name, "model": model, "runs": str(folder.parent), "compute": FLOAT32} | parts)
    params = sharp_params(model)
    ByteTokenizer().save(folder / "tokenizer")
    (folder / "config.json").write_text(json.dumps({"run": to_json(run)}))
    zero = jnp.zeros((), jnp.int32)
    with closing(Checkpoints(folder)) as checkpoints:
        checkpoints.save(State(zero, zero, params, ()), {})
    return params
