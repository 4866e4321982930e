"""Llama 2 and 3, Mistral and Mixtral."""

from __future__ import annotations

from typing import Any

from jaxgpt.config import GPT, MoE
from jaxgpt.convert import decoder
from jaxgpt.convert.decoder import BLOCK, DEFAULTS
from jaxgpt.convert.family import Fields, Place


def _read_llama(f: Fields) -> GPT:
    bias = f.get("attention_bias", False)
    f.note(
        f.get("mlp_bias", False) == bias, "mlp_bias", f.get("mlp_bias"), f"attention_bias, {bias}, in both"
    )
    return decoder.read(f, bias=bias)


def _write_llama(model: GPT) -> dict[str, Any]:
    return decoder.write(model, attention_bias=model.bias, mlp_bias=model.bias)


def _write_mistral(model: GPT) -> dict[str, Any]:
    return decoder.write(model, sliding_window=decoder.window(model))


def _read_mixtral(f: Fields) -> GPT:
    return decoder.read(f, moe=read_experts(f, "num_local_experts"))


def _write_mixtral(model: GPT) -> dict[str, Any]:
    own = {"intermediate_size": expert_width(model)} | write_experts(model, "num_local_experts")
    return _write_mistral(model) | own


def read_experts(f: Fields, count: str, **own: Any) -> MoE:
    """What the mixtures of experts say alike, `count` naming the field of how many."""
    per_token, balance = f["num_experts_per_tok"], float(f["router_aux_loss_coef"])
    return MoE(experts=f[count], per_token=per_token, balance=balance, **own)


def write_experts(model: GPT, count: str) -> dict[str, Any]:
    """The inverse of `read_experts`."""
    moe = model.moe or MoE()
    return {
        count: moe.experts,
        "num_experts_per_tok": moe.per_token,
        "router_aux_loss_coef": moe.balance,
    }


def expert_width(model: GPT) -> int:
    """Hidden width of an expert."""
    return (model.moe.width if model.moe else None) or model.hidden


_MISTRAL = DEFAULTS | {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "sliding_window": 4096,
}
_MIXTRAL = _MISTRAL | {
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "sliding_window": None,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "router_aux_loss_coef": 0.001,
}
_EXPERTS = decoder.LLAMA | {
    "blocks.mlp.router": Place(BLOCK + "block_sparse_moe.gate"),
    "blocks.mlp.gate": Place(BLOCK + "block_sparse_moe.experts.{expert}.w1"),
    "blocks.mlp.down": Place(BLOCK + "block_sparse_moe.experts.{expert}.w2"),
    "blocks.mlp.up": Place(BLOCK + "block_sparse_moe.experts.{expert}.w3"),
}

LLAMA = decoder.family("llama", "Llama", read=_read_llama, write=_write_llama)
MISTRAL = decoder.family("mistral", "Mistral", defaults=_MISTRAL, read=decoder.read, write=_write_mistral)
MIXTRAL = decoder.family(
    "mixtral", "Mixtral", defaults=_MIXTRAL, read=_read_mixtral, write=_write_mixtral, places=_EXPERTS
)
