"""Golden logits from an independent implementation: GPT-2 and Llama of Hugging Face transformers.

    pip install "torch==2.13.0" "transformers==5.23.0" "numpy<3"
    python tests/goldens/make_gpt2.py

Writes gpt2.npz and llama.npz beside this script: the weights of a tiny random model under their
own names, tokens and logits, all float32 on a CPU. Weights are drawn wider than at initialisation
so that attention is not flat, and biases and norms away from 0 and 1 so that they count.
tests/models/test_gpt.py maps the weights to ours and compares the logits.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

PINNED = {"torch": (torch, "2.13.0"), "transformers": (transformers, "5.23.0")}
VOCAB, LENGTH, LAYERS, WIDTH, HEADS = 64, 24, 2, 32, 4


def main() -> None:
    for name, (module, version) in PINNED.items():
        if module.__version__.split("+")[0] != version:
            raise SystemExit(f"needs {name} {version}, not {module.__version__}")
    torch.manual_seed(0)
    write(
        "gpt2",
        GPT2LMHeadModel(
            GPT2Config(vocab_size=VOCAB, n_positions=LENGTH, n_layer=LAYERS, n_embd=WIDTH, n_head=HEADS)
        ),
    )
    write(
        "llama",
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCAB,
                max_position_embeddings=LENGTH,
                num_hidden_layers=LAYERS,
                hidden_size=WIDTH,
                num_attention_heads=HEADS,
                num_key_value_heads=HEADS // 2,
                intermediate_size=2 * WIDTH,
                rms_norm_eps=1e-6,
                rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
                tie_word_embeddings=False,
            )
        ),
    )


def write(name: str, model: torch.nn.Module) -> None:
    model.eval().float()
    with torch.no_grad():
        for parameter in model.parameters():
            middle = 1.0 if parameter.ndim == 1 and parameter.mean() == 1 else 0.0
            parameter.copy_(middle + 0.15 * torch.randn_like(parameter))
        tokens = torch.randint(VOCAB, (2, LENGTH))
        logits = model(tokens).logits
    skipped = {"lm_head.weight"} if name == "gpt2" else set()  # tied
    weights = {k: v.numpy() for k, v in model.state_dict().items() if k not in skipped}
    path = Path(__file__).with_name(f"{name}.npz")
    np.savez_compressed(path, tokens=tokens.numpy().astype(np.int32), logits=logits.numpy(), **weights)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
