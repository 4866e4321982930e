"""Golden adapters of Hugging Face's peft, over the tiny models of `make_families.py`.

    pip install "torch==2.13.0" "transformers==5.24.0" "peft==0.21.2" "numpy<3"
    python tests/goldens/make_peft.py

Writes peft.npz beside this script. For each case, CASE/config is adapter_config.json (as text),
CASE/tensors/NAME the arrays of adapter_model.safetensors with random values (float16), and CASE/logits the
float32 logits of the base with the adapter for the base's golden tokens. tests/convert/test_peft.py compares.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import peft
import torch
import transformers as hf
from safetensors.numpy import load_file, save_file

HERE = Path(__file__).parent
LLAMA = ["q_proj", "v_proj", "gate_proj", "down_proj"]
LM = {"task_type": "CAUSAL_LM"}
CASES = {
    "llama/lora": peft.LoraConfig(r=3, lora_alpha=6, target_modules=LLAMA, **LM),
    "llama/rslora": peft.LoraConfig(r=4, lora_alpha=2, target_modules="all-linear", use_rslora=True, **LM),
    "llama/dora": peft.LoraConfig(r=3, lora_alpha=6, target_modules=LLAMA, use_dora=True, **LM),
    "llama/ia3": peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], **LM
    ),
    "llama/prompt": peft.PromptTuningConfig(num_virtual_tokens=5, **LM),
    "llama/prefix": peft.PrefixTuningConfig(num_virtual_tokens=5, **LM),
    "gpt2/lora": peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=["c_attn", "mlp.c_proj"], fan_in_fan_out=True, **LM
    ),
    "gpt2/dora": peft.LoraConfig(
        r=2, lora_alpha=6, target_modules=["c_attn"], fan_in_fan_out=True, use_dora=True, **LM
    ),
    "gpt2/prompt": peft.PromptTuningConfig(num_virtual_tokens=5, **LM),
    "gpt2/prefix": peft.PrefixTuningConfig(num_virtual_tokens=5, **LM),
}  # fmt: skip


def base_of(name: str, folder: Path) -> tuple[torch.nn.Module, torch.Tensor]:
    stored = dict(np.load(HERE / f"{name}.npz"))
    folder.mkdir()
    (folder / "config.json").write_text(str(stored["config"]))
    tensors = {
        k.removeprefix("tensors/"): v.astype(np.float32)
        for k, v in stored.items()
        if k.startswith("tensors/")
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model = hf.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    return model.eval(), torch.tensor(stored["tokens"]).long()


def main() -> None:
    record = {}
    for case, config in CASES.items():
        torch.manual_seed(1)
        with tempfile.TemporaryDirectory() as folder:
            model, tokens = base_of(case.split("/")[0], Path(folder, "base"))
            tuned = peft.get_peft_model(model, config).eval()
            with torch.no_grad():
                for name, parameter in tuned.named_parameters():
                    if parameter.requires_grad:
                        middle = parameter if "magnitude" in name else torch.ones(()) * ("ia3" in name)
                        parameter.copy_((middle + 0.2 * torch.randn_like(parameter)).half().float())
            tuned.save_pretrained(Path(folder, "adapter"))
            with torch.no_grad():
                logits = tuned(input_ids=tokens).logits[:, -tokens.shape[1] :]
            config_text = Path(folder, "adapter", "adapter_config.json").read_text()
            tensors = load_file(Path(folder, "adapter", "adapter_model.safetensors"))
        held = json.loads(config_text)
        held["base_model_name_or_path"] = None  # a folder of this machine
        record[f"{case}/config"] = np.array(json.dumps(held))
        record[f"{case}/logits"] = logits.numpy()
        record |= {f"{case}/tensors/{k}": v.astype(np.float16) for k, v in tensors.items()}
        print(case, {k: v.shape for k, v in list(tensors.items())[:4]}, f"{logits.std():.2f}")
    path = HERE / "peft.npz"
    np.savez_compressed(path, **record)
    print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
