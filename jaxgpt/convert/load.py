"""A Hugging Face folder or a GGUF file, checked and read: the config, the tokenizer and the parameters of a
run.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from jaxgpt.config import GPT, CausalLM, Chat, Compute, MaskedLM, Mesh, Run, Text
from jaxgpt.convert import files, gguf, weights
from jaxgpt.convert.family import Family
from jaxgpt.convert.registry import read_config, text_part
from jaxgpt.errors import require
from jaxgpt.sample.load import Trained, sampling_mesh
from jaxgpt.text.hf_tokenizer import HFTokenizer
from jaxgpt.text.load import load_tokenizer
from jaxgpt.text.tokenizer import ByteTokenizer, Tokenizer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """A model of a Hugging Face folder; its parameters are still in the files.

    Attributes:
      run: the config of a run of it.
      tokenizer: its own, or another one asked for.
      family: its `model_type`.
      config: config.json, of the text model alone.
      found: the tensors of the files by name.
      used: names of those that the parameters are made of.
    """

    run: Run
    tokenizer: Tokenizer
    family: Family
    config: dict[str, Any]
    found: dict[str, Any]
    used: Sequence[str]

    @property
    def size(self) -> int:
        """Bytes that are read."""
        return sum(self.found[name].size for name in self.used)

    def load(self, mesh: jax.sharding.Mesh, step: Callable[[int], None] = lambda _: None) -> dict[str, Any]:
        """The parameters in the training form, float32, on the mesh; `step` is told of bytes read."""
        model: Any = self.run.model
        return weights.load(self.family, model, self.found, self.used, mesh, step)


def read_model(source: Path, tokenizer: str, target: Path) -> Found:
    """The model of a folder, before its tensors are read.

    Args:
      source: the folder, or a GGUF file.
      tokenizer: folder of another tokenizer, or `byte`; empty for its own.
      target: folder of the run that it becomes.

    Raises:
      UserError: a family or field that has no counterpart here, tensors or a tokenizer that do not fit it,
        or a damaged file.
    """
    config, found, own = _held(source)
    family, model = read_config(config, str(source if gguf.is_gguf(source) else source / files.CONFIG))
    model = weights.as_found(family, model, found, config)
    used, unused = weights.check(family, model, found, str(source))
    name = tokenizer or str(source)
    words: Any = ByteTokenizer() if name == "byte" else (load_tokenizer if tokenizer else own)(name)
    if isinstance(words, HFTokenizer) and (count := words.vocab_size) > model.vocab_size:
        words = words.within(model.vocab_size)
        log.info("the embedding has no rows for %d added tokens: left out", count - words.vocab_size)
    require(
        words.vocab_size <= model.vocab_size,
        f"the tokenizer of {name} has {words.vocab_size} ids but the embedding only "
        f"{model.vocab_size} rows; name the model's own with --tokenizer.",
    )
    made = _run(target, model, words, {found[name].dtype for name in used if len(found[name].shape) > 1})
    if unused:
        log.info("not used: %s", files.shorten(unused))
    return Found(made, words, family, config, found, used)


def _held(source: Path) -> tuple[dict[str, Any], dict[str, files.Header], Callable[[str], Tokenizer]]:
    """config.json, the tensors, and what makes the tokenizer of the source's name."""
    if gguf.is_gguf(source):
        held = gguf.read(source)
        return held.config, held.found, functools.partial(HFTokenizer, held.words)
    config = text_part(files.read_json(source / files.CONFIG), str(source / files.CONFIG))
    return config, files.headers(source), load_tokenizer


def load_model(folder: Path, mesh: Mesh, tokenizer: str = "") -> Trained:
    """A Hugging Face folder as a run that is loaded; nothing is written."""
    name = re.sub(r"[^\w.-]+", "-", folder.resolve().name).strip("-.") or "model"
    model = read_model(folder, tokenizer, folder.resolve().with_name(name))
    placed = sampling_mesh(model.run, mesh)
    return Trained(folder, model.run, model.load(placed), model.tokenizer, placed, 0)


def _run(target: Path, model: Any, words: Any, dtypes: set[str]) -> Run:
    """The config of an imported run.

    Data stand in for those that were trained on: Chat where the tokenizer has a chat template, by
    which `sample` and `chat` know a model tuned on dialogues.
    """
    dialogues = words.template is not None and isinstance(model, GPT)
    half = dtypes <= {"BF16"}  # float16 has more digits: only float32 keeps them
    return Run(
        name=target.resolve().name,
        runs=str(target.resolve().parent),
        model=model,
        data=Chat(train=("data.jsonl",)) if dialogues else Text(path="data/text"),
        objective=CausalLM() if isinstance(model, GPT) else MaskedLM(),
        compute=Compute(dtype="bfloat16" if half else "float32"),
    )
