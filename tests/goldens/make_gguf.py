"""Golden numbers of GGUF files that `jaxgpt export` wrote, from two independent readers of them.

    python tests/convert/gguf_models.py FOLDER                     # in jaxgpt's environment
    pip install "torch==2.13.0" "transformers==5.24.0" accelerate "gguf==0.19.0" "xllamacpp==2026.10.11549"
    python tests/goldens/make_gguf.py FOLDER                       # in one with these

Writes gguf.npz beside this script: of each file a digest of what is in it, the ids of a text, float32 logits
and the greedy continuation of it by transformers (dequantized), and llama.cpp's continuation (xllamacpp).
transformers reads no rotary scaling of Llama 3.1, no biases of Llama's and no adapter from GGUF: those files
have llama.cpp's alone. tests/convert/test_gguf.py compares.
"""

from __future__ import annotations

import hashlib
import json
import sys
import urllib.request
from pathlib import Path

import gguf
import numpy as np
import torch
import transformers as hf
import xllamacpp

PINNED = {"torch": (torch, "2.13.0"), "transformers": (hf, "5.24.0")}
TEXT, NEW = "hello the cat sat", 12
LORA = "-lora"
NOT_BY_TRANSFORMERS = ("llama3-f16", "llama_biases-f16", LORA)


def digest(path: Path) -> str:
    """Of all metadata and tensors in a file; tests/convert/test_gguf.py makes the same."""
    reader, found = gguf.GGUFReader(path), hashlib.sha256()
    for name, field in sorted(reader.fields.items()):
        if not name.startswith("GGUF."):
            found.update(repr((name, field.contents())).encode())
    for tensor in sorted(reader.tensors, key=lambda tensor: tensor.name):
        found.update(repr((tensor.name, tensor.shape.tolist(), tensor.tensor_type.name)).encode())
        found.update(tensor.data.tobytes())
    return found.hexdigest()


def by_transformers(path: Path) -> dict[str, np.ndarray]:
    """Ids of the text, logits of the whole, and its continuation."""
    words = hf.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = hf.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    model.eval()
    ids = words(TEXT, return_tensors="pt").input_ids
    with torch.no_grad():
        made = model.generate(ids, do_sample=False, max_new_tokens=NEW, eos_token_id=-1)
        logits = model(made).logits
    return {
        "ids": ids[0].numpy(),
        "continuation": made[0, ids.shape[1] :].numpy(),
        "logits": logits[0].numpy(),
    }


def by_llama_cpp(path: Path) -> dict[str, np.ndarray]:
    """The continuation of the text."""
    params = xllamacpp.CommonParams()
    if path.stem.endswith(LORA):
        lora = xllamacpp.CommonAdapterLoraInfo()
        lora.path, lora.scale = str(path), 1.0
        params.lora_adapters, path = [lora], path.with_stem(path.stem.removesuffix(LORA))
    params.model.path, params.n_ctx, params.n_parallel, params.warmup = str(path), 64, 1, False
    asked = {"prompt": TEXT, "n_predict": NEW, "temperature": 0, "return_tokens": True, "ignore_eos": True}
    server = xllamacpp.Server(params)
    request = urllib.request.Request(f"{server.listening_address}/completion", json.dumps(asked).encode())
    with urllib.request.urlopen(request) as answer:
        made = json.loads(answer.read())
    return {"llama_cpp": np.array(made["tokens"])}


def main(folder: Path) -> None:
    """Make the numbers."""
    for name, (module, version) in PINNED.items():
        assert module.__version__.split("+")[0] == version, f"{name} is not {version}"
    stored: dict[str, np.ndarray] = {"text": np.array(TEXT)}
    for path in sorted(folder.glob("*.gguf")):
        made = by_llama_cpp(path)
        if not path.stem.endswith(NOT_BY_TRANSFORMERS):
            made |= by_transformers(path)
        made["digest"] = np.array(digest(path))
        stored |= {f"{path.stem}/{name}": value for name, value in made.items()}
        print(path.stem, made.get("ids"), made.get("continuation"), made["llama_cpp"])
    np.savez_compressed(Path(__file__).with_name("gguf.npz"), **stored)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
