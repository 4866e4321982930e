"""Gemma 2, and the text model of Gemma 3."""

from __future__ import annotations

from typing import Any

from jaxgpt.config import GPT
from jaxgpt.convert import decoder
from jaxgpt.convert.decoder import BLOCK, DEFAULTS, FULL, SLIDING
from jaxgpt.convert.family import Fields, Place

_FORM = {"mlp": "geglu", "norm_at": "both", "zero_centered_norm": True, "embed_scale": True}


def _read(f: Fields, pattern: int, **own: Any) -> GPT:
    """One layer in `pattern` sees all where layer_types does not say which they are."""
    f.only("hidden_activation", "gelu_pytorch_tanh", None)
    f.only("attention_bias", False)
    if not f.get("layer_types"):
        f["layer_types"] = [SLIDING if (i + 1) % pattern else FULL for i in range(f["num_hidden_layers"])]
    return decoder.read(
        f,
        **_FORM,
        attention_scalar=float(f["query_pre_attn_scalar"]),
        attention_softcap=f["attn_logit_softcapping"],
        logit_softcap=f["final_logit_softcapping"],
        **own,
    )


def _write(model: GPT) -> dict[str, Any]:
    scalar = model.attention_scalar or model.head
    fields = decoder.write(
        model,
        hidden_activation="gelu_pytorch_tanh",
        # A whole number where it is one: transformers 5 takes no other.
        query_pre_attn_scalar=int(scalar) if scalar == int(scalar) else scalar,
        attn_logit_softcapping=model.attention_softcap,
        final_logit_softcapping=model.logit_softcap,
        sliding_window=decoder.window(model) or max(1, model.context - 1),
        layer_types=decoder.layer_types(model),
    )
    del fields["hidden_act"]
    return fields


def _read_gemma2(f: Fields) -> GPT:
    return _read(f, 2)


def _read_gemma3(f: Fields) -> GPT:
    """Its layers with a window have wavelengths of their own, never scaled."""
    rope = f.get("rope_parameters") or {}
    local = rope.get(SLIDING) or {}
    kind = local.get("rope_type", "default")
    f.note(kind == "default", f"rope_parameters.{SLIDING}.rope_type", kind, "'default'")
    f["rope_parameters"] = rope.get(FULL, rope)
    size, context = f["sliding_window"], f["max_position_embeddings"]
    f.note(bool(size) and size < context, "sliding_window", size, f"one below {context}, the context,")
    pattern = f.get("sliding_window_pattern") or f.get("_sliding_window_pattern") or 6
    theta = float(local.get("rope_theta", f["rope_local_base_freq"]))
    return _read(f, pattern, qk_norm=True, rope_local_theta=theta)


def _write_gemma3(model: GPT) -> dict[str, Any]:
    return _write(model) | {"rope_local_base_freq": model.rope_local_theta or model.rope_theta}


_GEMMA = DEFAULTS | {
    "vocab_size": 256_000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
_GEMMA3 = _GEMMA | {
    "vocab_size": 262_208,
    "max_position_embeddings": 131_072,
    "rope_theta": 1e6,
    "rope_local_base_freq": 10_000.0,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}
_PLACES = (
    decoder.COMMON
    | decoder.MLP
    | {
        "blocks.attention_out_norm": Place(BLOCK + "post_attention_layernorm"),
        "blocks.mlp_norm": Place(BLOCK + "pre_feedforward_layernorm"),
        "blocks.mlp_out_norm": Place(BLOCK + "post_feedforward_layernorm"),
    }
)

GEMMA2 = decoder.family("gemma2", "Gemma2", defaults=_GEMMA, read=_read_gemma2, write=_write, places=_PLACES)
GEMMA3 = decoder.family(
    "gemma3_text", "Gemma3", defaults=_GEMMA3, read=_read_gemma3, write=_write_gemma3, places=_PLACES
)
