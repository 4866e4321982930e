"""Hidden states and attention maps of the golden models, from Hugging Face transformers.

    pip install "torch==2.13.0" "transformers==5.24.0" "numpy<3"
    python tests/goldens/make_inside.py

Reads FAMILY.npz beside this script (`make_families.py` wrote them) and writes inside.npz: for the first row
of tokens of each model `FAMILY/hidden` [L + 1, T, D] (transformers' `hidden_states`), `FAMILY/attention`
[L, H, T, T] and `FAMILY/logits` [T, V], computed in float32 on a CPU. tests/test_api.py compares.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers as hf
from safetensors.numpy import save_file

HERE = Path(__file__).parent
FAMILIES = ("gpt2", "llama", "mistral", "mixtral", "gemma2", "gemma3_text", "qwen3", "bert")


@torch.no_grad()
def main() -> None:
    made = {}
    for name in FAMILIES:
        stored = dict(np.load(HERE / f"{name}.npz"))
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "config.json").write_text(json.dumps(json.loads(str(stored["config"]))))
            tensors = {k.removeprefix("tensors/"): v for k, v in stored.items() if k.startswith("tensors/")}
            save_file(tensors, Path(folder, "model.safetensors"), {"format": "pt"})
            kind = hf.AutoModelForMaskedLM if name == "bert" else hf.AutoModelForCausalLM
            model = kind.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
        tokens = torch.from_numpy(stored["tokens"][:1]).long()
        if name != "bert":
            assert np.abs(model(tokens).logits[0].numpy() - stored["logits"][0]).max() < 1e-5
        found = model(tokens, output_hidden_states=True, output_attentions=True)
        made[f"{name}/hidden"] = torch.cat(found.hidden_states).numpy()
        made[f"{name}/attention"] = torch.cat(found.attentions).numpy()
        made[f"{name}/logits"] = found.logits[0].numpy()
    np.savez_compressed(HERE / "inside.npz", **made)
    print(f"inside.npz: {(HERE / 'inside.npz').stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
