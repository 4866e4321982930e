"""Tiny runs of the families that GGUF knows, and the files that are made of them.

    python tests/convert/gguf_models.py FOLDER

writes the files, of which tests/goldens/make_gguf.py makes golden numbers.
"""

from __future__ import annotations

import json
import sys
from contextlib import closing
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

sys.path.append(str(Path(__file__).parents[1]))
import tiny_hf
from tiny import FLOAT32, sharp_params

from jaxgpt.checkpoint import Checkpoints
from jaxgpt.config import GPT, Chat, Run, to_json
from jaxgpt.config.gpt import RopeScaling
from jaxgpt.convert.commands import export, import_
from jaxgpt.text.hf_tokenizer import HFTokenizer
from jaxgpt.train.state import State

FORM = GPT(
    context=64, layers=2, width=32, heads=4, kv_heads=2, mlp_width=64, position="rope", norm="rmsnorm",
    mlp="swiglu", bias=False, tied=False,
)  # fmt: skip
QWEN2 = replace(FORM, qkv_bias=True, tied=True, rope_theta=1e6)
QWEN3 = replace(FORM, heads=2, kv_heads=1, head_width=128, qk_norm=True)  # transformers knows no other width
GEMMA = replace(
    FORM, heads=2, kv_heads=1, head_width=256, attention_scalar=256.0, mlp="geglu", norm_at="both",
    zero_centered_norm=True, embed_scale=True, tied=True, windows=(5, 0),
)  # fmt: skip

ADAPTED = (("self_attn.q_proj", 32, 32), ("self_attn.k_proj", 32, 16), ("mlp.down_proj", 64, 32))


class Tiny(NamedTuple):
    """A model, its tokenizer, and the type of its file."""

    model: GPT
    words: str
    dtype: str


MODELS = {
    "llama-f16": Tiny(FORM, "mistral", "float16"),
    "llama-q8_0": Tiny(FORM, "mistral", "q8_0"),
    "llama_biases-f16": Tiny(replace(FORM, bias=True), "mistral", "float16"),
    "llama3-f16": Tiny(replace(FORM, rope_scaling=RopeScaling(original_context=16)), "mistral", "float16"),
    "qwen2-f16": Tiny(QWEN2, "chatml", "float16"),
    "qwen2-q8_0": Tiny(QWEN2, "chatml", "q8_0"),
    "qwen3-f16": Tiny(
        replace(FORM, heads=2, kv_heads=1, head_width=128, qk_norm=True), "thinking", "float16"
    ),
    "gemma2-f16": Tiny(replace(GEMMA, attention_softcap=50.0, logit_softcap=30.0), "gemma", "float16"),
    "gemma3-f16": Tiny(
        replace(GEMMA, layers=6, windows=(5,) * 5 + (0,), qk_norm=True, rope_theta=1e6, rope_local_theta=1e4),
        "gemma",
        "float16",
    ),
}


@cache
def words(name: str) -> HFTokenizer:
    """A tiny tokenizer."""
    files = tiny_hf.TOKENIZERS[name]
    if name == "gemma":  # Gemma's puts no space before a text
        spec = json.loads(files["tokenizer.json"])
        spec["pre_tokenizer"]["prepend_scheme"] = "never"
        spec["decoder"]["decoders"].pop()
        files = files | {"tokenizer.json": json.dumps(spec).encode()}
    return HFTokenizer(files)


def write_run(folder: Path, name: str) -> Path:
    """The run of a model, once: random parameters, and three rows more than its tokenizer has ids."""
    tokenizer = words(MODELS[name].words)
    model = replace(MODELS[name].model, vocab_size=tokenizer.vocab_size + 3)
    run = Run(
        name=folder.name,
        model=model,
        runs=str(folder.parent),
        compute=FLOAT32,
        data=Chat(train=("data.jsonl",)),
    )
    if folder.exists():
        return folder
    tokenizer.save(folder / "tokenizer")
    (folder / "config.json").write_text(json.dumps({"run": to_json(run)}))
    zero = jnp.zeros((), jnp.int32)
    with closing(Checkpoints(folder)) as checkpoints:
        checkpoints.save(State(zero, zero, sharp_params(model), ()), {})
    return folder


def write_lora(folder: Path, base: Path, rank: int = 4) -> Path:
    """A tuned run over that of `llama`, of which every product changes the text."""
    random, peft = np.random.default_rng(3), folder.with_name("peft")
    peft.mkdir(parents=True)
    tensors = {}
    for layer, (module, inputs, outputs) in product(range(2), ADAPTED):
        at = f"base_model.model.model.layers.{layer}.{module}"
        tensors[f"{at}.lora_A.weight"] = np.float32(random.standard_normal((rank, inputs)))
        tensors[f"{at}.lora_B.weight"] = np.float32(0.1 * random.standard_normal((outputs, rank)))
    save_file(tensors, peft / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 6, "target_modules": [m for m, *_ in ADAPTED]}
    (peft / "adapter_config.json").write_text(json.dumps(config))
    import_(str(peft), str(folder), base=str(base))
    return folder


def main(folder: Path) -> None:
    """Write all files."""
    for name, made in MODELS.items():
        run = write_run(folder / "runs" / name.split("-")[0], name)
        export(str(run), str(folder / f"{name}.gguf"), form="gguf", dtype=made.dtype)
    tuned = write_lora(folder / "runs" / "lora", folder / "runs" / "llama")
    export(str(tuned), str(folder / "llama-f16-lora.gguf"), form="gguf", peft=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
