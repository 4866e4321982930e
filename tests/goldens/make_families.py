"""Golden numbers of every family that `jaxgpt.convert` knows, from Hugging Face transformers.

    pip install "torch==2.13.0" "transformers==5.24.0" "numpy<3"
    python tests/goldens/make_families.py

Writes one FAMILY.npz each beside this script: the config.json (as text) and the tensors that
`save_pretrained` writes for a tiny random model, tokens, float32 logits on a CPU, and the greedy
continuation of the first half of each row. Weights are drawn wider than at initialisation so that
attention is not flat, biases and norms away from 0 and 1 so that they count, and everything is
rounded to float16 first, as which it is stored. Windows are shorter than the rows, soft-caps low and
rotary scaling strong enough that leaving one out would show. tests/convert/ compares.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers as hf
from safetensors.numpy import load_file

PINNED = {"torch": (torch, "2.13.0"), "transformers": (hf, "5.24.0")}
VOCAB, ROWS, LENGTH, NEW, CONTEXT = 64, 2, 24, 12, 48
WINDOW = 5
ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
DECODER = {
    "vocab_size": VOCAB,
    "max_position_embeddings": CONTEXT,
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "rms_norm_eps": 1e-5,
    "rope_parameters": ROPE,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
WINDOWED = {"use_sliding_window": True, "sliding_window": WINDOW}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
GEMMA = {"head_dim": 12, "query_pre_attn_scalar": 20, "sliding_window": WINDOW}
BOTH = ["sliding_attention", "full_attention"]

FAMILIES = {
    "gpt2": hf.GPT2Config(
        vocab_size=VOCAB,
        n_positions=CONTEXT,
        n_layer=2,
        n_embd=32,
        n_head=4,
        bos_token_id=None,
        eos_token_id=None,
    ),
    "llama": hf.LlamaConfig(**DECODER | {"rope_parameters": LLAMA3}),
    "mistral": hf.MistralConfig(**DECODER, sliding_window=WINDOW),
    "mixtral": hf.MixtralConfig(**DECODER, num_local_experts=4, num_experts_per_tok=2),
    "qwen2": hf.Qwen2Config(**DECODER, **WINDOWED, max_window_layers=1),
    "qwen3": hf.Qwen3Config(**DECODER, head_dim=12, tie_word_embeddings=True),
    "qwen2_moe": hf.Qwen2MoeConfig(**DECODER, **EXPERTS, shared_expert_intermediate_size=40),
    "qwen3_moe": hf.Qwen3MoeConfig(**DECODER, **EXPERTS, head_dim=12, norm_topk_prob=True),
    "gemma2": hf.Gemma2Config(
        **DECODER, **GEMMA, attn_logit_softcapping=1.5, final_logit_softcapping=4.0, layer_types=BOTH
    ),
    "gemma3_text": hf.Gemma3TextConfig(
        **DECODER
        | {
            "num_hidden_layers": 3,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 50_000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
        **GEMMA,
        layer_types=["sliding_attention", *BOTH],
    ),
    "bert": hf.BertConfig(
        vocab_size=VOCAB,
        max_position_embeddings=CONTEXT,
        num_hidden_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        intermediate_size=48,
    ),
}


def main() -> None:
    for name, (module, version) in PINNED.items():
        if module.__version__.split("+")[0] != version:
            raise SystemExit(f"needs {name} {version}, not {module.__version__}")
    for name, config in FAMILIES.items():
        torch.manual_seed(0)
        config._attn_implementation = "eager"
        kind = hf.AutoModelForMaskedLM if name == "bert" else hf.AutoModelForCausalLM
        write(name, kind.from_config(config))


def write(name: str, model: torch.nn.Module) -> None:
    model.eval().float()
    with torch.no_grad():
        for parameter in model.parameters():
            middle = 1.0 if parameter.ndim == 1 and parameter.mean() == 1 else 0.0
            parameter.copy_((middle + 0.2 * torch.randn_like(parameter)).half().float())
    tokens = torch.randint(1, VOCAB, (ROWS, LENGTH))
    record = {"tokens": tokens, **(masked(model, tokens) if name == "bert" else causal(model, tokens))}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        config = json.loads(Path(folder, "config.json").read_text())
        tensors = load_file(Path(folder, "model.safetensors"))
    path = Path(__file__).with_name(f"{name}.npz")
    np.savez_compressed(
        path,
        config=np.array(json.dumps(config)),
        **{k: v.numpy().astype(np.float32 if k == "logits" else np.int32) for k, v in record.items()},
        **{f"tensors/{k}": v.astype(np.float16) for k, v in tensors.items()},
    )
    print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB, logits' std {record['logits'].std():.2f}")


@torch.no_grad()
def causal(model: torch.nn.Module, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits of whole rows, and what follows their first halves."""
    prompt = tokens[:, :NEW]
    made = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW, do_sample=False, pad_token_id=0
    )
    return {"logits": model(tokens).logits, "greedy": made[:, NEW:]}


@torch.no_grad()
def masked(model: torch.nn.Module, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits of a padded batch of two kinds of text."""
    seen = torch.ones_like(tokens)
    seen[1, LENGTH - 7 :] = 0
    types = (torch.arange(LENGTH) >= 9).long().expand(tokens.shape)
    logits = model(tokens, attention_mask=seen, token_type_ids=types).logits
    return {"logits": logits, "types": types, "seen": seen}


if __name__ == "__main__":
    main()
