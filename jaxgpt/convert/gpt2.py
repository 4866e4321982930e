"""GPT-2 (Radford et al. 2019): its matrices are kept as [inputs, outputs], q, k and v in one."""

from __future__ import annotations

from typing import Any

from jaxgpt.config import GPT
from jaxgpt.convert.family import Family, Fields, Place

_BLOCK = "transformer.h.{layer}."
_ACTIVATIONS: dict[str, Any] = {
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "gelu": "gelu_exact",
    "relu": "relu",
}
_DEFAULTS = {
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_inner": None,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "resid_pdrop": 0.1,
    "tie_word_embeddings": True,
}


def _read(f: Fields) -> GPT:
    f.only("activation_function", *_ACTIVATIONS)
    f.only("scale_attn_weights", True)
    f.only("scale_attn_by_inverse_layer_idx", False)
    f.only("add_cross_attention", False)
    return GPT(
        vocab_size=f["vocab_size"],
        context=f["n_positions"],
        layers=f["n_layer"],
        width=f["n_embd"],
        heads=f["n_head"],
        mlp_width=f["n_inner"],
        mlp=_ACTIVATIONS.get(f["activation_function"], "gelu"),
        norm_eps=f["layer_norm_epsilon"],
        dropout=float(f["resid_pdrop"]),
        tied=f["tie_word_embeddings"],
    )


def _write(model: GPT) -> dict[str, Any]:
    names = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
    return {
        "vocab_size": model.vocab_size,
        "n_positions": model.context,
        "n_embd": model.width,
        "n_layer": model.layers,
        "n_head": model.heads,
        "n_inner": None if model.hidden == 4 * model.width else model.hidden,
        "activation_function": names.get(model.mlp, "gelu_new"),
        "layer_norm_epsilon": model.norm_eps,
        "resid_pdrop": model.dropout,
        "embd_pdrop": model.dropout,
        "attn_pdrop": 0.0,
        "tie_word_embeddings": model.tied,
    }


GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    defaults=_DEFAULTS,
    read=_read,
    write=_write,
    places={
        "embed": Place("transformer.wte"),
        "position": Place("transformer.wpe"),
        "norm": Place("transformer.ln_f"),
        "head": Place("lm_head"),
        "blocks.attention_norm": Place(_BLOCK + "ln_1"),
        "blocks.attention.q": Place(_BLOCK + "attn.c_attn", 0, 3),
        "blocks.attention.k": Place(_BLOCK + "attn.c_attn", 1, 3),
        "blocks.attention.v": Place(_BLOCK + "attn.c_attn", 2, 3),
        "blocks.attention.out": Place(_BLOCK + "attn.c_proj"),
        "blocks.mlp_norm": Place(_BLOCK + "ln_2"),
        "blocks.mlp.up": Place(_BLOCK + "mlp.c_fc"),
        "blocks.mlp.down": Place(_BLOCK + "mlp.c_proj"),
    },
    transposed=False,
    renames=((r"^(?=(h\.\d|(wte|wpe|ln_f)\.))", "transformer."),),  # the published files have no prefix
    unused=r"\.attn\.(masked_)?bias$",  # the causal mask
    tied={"lm_head.weight": "transformer.wte.weight"},
)
