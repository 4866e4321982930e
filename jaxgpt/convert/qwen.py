"""Qwen 2 and 3, dense and with experts."""

from __future__ import annotations

from typing import Any

from jaxgpt.config import GPT, MoE
from jaxgpt.convert import decoder
from jaxgpt.convert.decoder import BLOCK, DEFAULTS, FULL, SLIDING
from jaxgpt.convert.family import Fields, Place
from jaxgpt.convert.llama import expert_width, read_experts, write_experts


def _read(f: Fields, **own: Any) -> GPT:
    """Windows only where use_sliding_window asks for them, and then from max_window_layers on."""
    f.only("attention_bias", False)
    if not f.get("use_sliding_window"):
        f["sliding_window"] = None
    if f["sliding_window"] and not f.get("layer_types") and f.get("max_window_layers") is not None:
        first = f["max_window_layers"]
        f["layer_types"] = [SLIDING if i >= first else FULL for i in range(f["num_hidden_layers"])]
    return decoder.read(f, **own)


def _write(model: GPT) -> dict[str, Any]:
    types = decoder.layer_types(model)
    return decoder.write(
        model,
        use_sliding_window=SLIDING in types,
        sliding_window=decoder.window(model),
        max_window_layers=types.index(SLIDING) if SLIDING in types else model.layers,
        layer_types=types,
    )


def _read_qwen2(f: Fields, **own: Any) -> GPT:
    f["head_dim"] = None  # not among its fields
    return _read(f, **{"qkv_bias": True} | own)


def _write_qwen2(model: GPT) -> dict[str, Any]:
    fields = _write(model)
    del fields["head_dim"]
    return fields


def _read_qwen3(f: Fields) -> GPT:
    return _read(f, qk_norm=True)


def _experts(f: Fields) -> MoE:
    f.only("decoder_sparse_step", 1)
    f.only("mlp_only_layers", [], None)
    return read_experts(
        f,
        "num_local_experts" if f.get("num_local_experts") else "num_experts",  # as transformers 5 writes it
        width=f["moe_intermediate_size"],
        normalise=f["norm_topk_prob"],
        shared_width=f.get("shared_expert_intermediate_size", 0),
    )


def _write_experts(model: GPT) -> dict[str, Any]:
    return write_experts(model, "num_experts") | {
        "moe_intermediate_size": expert_width(model),
        "norm_topk_prob": (model.moe or MoE()).normalise,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _read_qwen2_moe(f: Fields) -> GPT:
    # Which layers have windows, its code decided differently from version to version.
    fine = not f.get("use_sliding_window") or bool(f.get("layer_types"))
    f.note(fine, "use_sliding_window", True, "False, or True beside layer_types,")
    return _read_qwen2(f, qkv_bias=f["qkv_bias"], moe=_experts(f))


def _write_qwen2_moe(model: GPT) -> dict[str, Any]:
    bias = model.bias if model.qkv_bias is None else model.qkv_bias
    shared = model.moe.shared_width if model.moe else 0
    own = {"qkv_bias": bias, "shared_expert_intermediate_size": shared}
    return _write_qwen2(model) | _write_experts(model) | own


def _read_qwen3_moe(f: Fields) -> GPT:
    f["layer_types"] = None  # not among its fields: a window is that of all layers
    return _read(f, qk_norm=True, moe=_experts(f))


def _write_qwen3_moe(model: GPT) -> dict[str, Any]:
    fields = _write(model) | _write_experts(model)
    return {k: v for k, v in fields.items() if k not in ("layer_types", "max_window_layers")}


_QWEN = DEFAULTS | {
    "vocab_size": 151_936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
}
_DENSE = _QWEN | {"max_window_layers": 28}
_MOE = _QWEN | {
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "router_aux_loss_coef": 0.001,
    "norm_topk_prob": False,
}
_QWEN2_MOE = _MOE | {
    "intermediate_size": 5632,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "qkv_bias": True,
}
_QWEN3_MOE = _MOE | {
    "intermediate_size": 6144,
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
}
_PROJECTIONS = ("gate", "up", "down")
_PLACES = (
    decoder.LLAMA
    | {f"blocks.mlp.{name}": Place(f"{BLOCK}mlp.experts.{{expert}}.{name}_proj") for name in _PROJECTIONS}
    | {f"blocks.mlp.shared.{name}": Place(f"{BLOCK}mlp.shared_expert.{name}_proj") for name in _PROJECTIONS}
    | {
        "blocks.mlp.router": Place(BLOCK + "mlp.gate"),
        "blocks.mlp.shared_gate": Place(BLOCK + "mlp.shared_expert_gate"),
    }
)

QWEN2 = decoder.family("qwen2", "Qwen2", defaults=_DENSE, read=_read_qwen2, write=_write_qwen2)
QWEN3 = decoder.family("qwen3", "Qwen3", defaults=_DENSE | {"head_dim": 128}, read=_read_qwen3, write=_write)
QWEN2_MOE = decoder.family(
    "qwen2_moe",
    "Qwen2Moe",
    defaults=_QWEN2_MOE,
    read=_read_qwen2_moe,
    write=_write_qwen2_moe,
    places=_PLACES,
)
QWEN3_MOE = decoder.family(
    "qwen3_moe",
    "Qwen3Moe",
    defaults=_QWEN3_MOE,
    read=_read_qwen3_moe,
    write=_write_qwen3_moe,
    places=_PLACES,
)
