"""What Llama, Mistral, Qwen and Gemma share: fields of config.json, and names of tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxgpt.config import GPT, RopeScaling
from jaxgpt.convert.family import Family, Fields, Place

FULL, SLIDING = "full_attention", "sliding_attention"

DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
}
BLOCK = "model.layers.{layer}."
MLP = {f"blocks.mlp.{name}": Place(f"{BLOCK}mlp.{name}_proj") for name in ("gate", "up", "down")}
COMMON = {
    "embed": Place("model.embed_tokens"),
    "norm": Place("model.norm"),
    "head": Place("lm_head"),
    "blocks.attention_norm": Place(BLOCK + "input_layernorm"),
    "blocks.attention.q": Place(BLOCK + "self_attn.q_proj"),
    "blocks.attention.k": Place(BLOCK + "self_attn.k_proj"),
    "blocks.attention.v": Place(BLOCK + "self_attn.v_proj"),
    "blocks.attention.out": Place(BLOCK + "self_attn.o_proj"),
    "blocks.attention.q_norm": Place(BLOCK + "self_attn.q_norm"),
    "blocks.attention.k_norm": Place(BLOCK + "self_attn.k_norm"),
}
LLAMA = COMMON | MLP | {"blocks.mlp_norm": Place(BLOCK + "post_attention_layernorm")}


def family(model_type: str, name: str, **parts: Any) -> Family:
    """A family whose tensors have Llama's names unless `places` says otherwise."""
    own: dict[str, Any] = {"defaults": DEFAULTS, "places": LLAMA} | parts
    return Family(
        model_type=model_type,
        architecture=f"{name}ForCausalLM",
        **own,
        # The text model within one that also sees, as transformers 4 and 5 name it (Gemma 3).
        # Last, a base model saved alone has no prefix.
        renames=(
            (r"^language_model\.", ""),
            (r"^model\.language_model\.", "model."),
            (r"^(?=(embed_tokens|layers|norm|rotary_emb)\.)", "model."),
        ),
        unused=r"\.rotary_emb\.\w+$|^(model\.)?(vision_tower|multi_modal_projector)\.",
        tied={"lm_head.weight": "model.embed_tokens.weight"},
    )


def read(f: Fields, **own: Any) -> GPT:
    """The config of a decoder; what is the family's own by keyword."""
    f.only("use_bidirectional_attention", False, None)
    if "mlp" not in own:
        f.only("hidden_act", "silu")
    head = f.get("head_dim")
    fields: dict[str, Any] = {
        "vocab_size": f["vocab_size"],
        "context": f["max_position_embeddings"],
        "layers": f["num_hidden_layers"],
        "width": f["hidden_size"],
        "heads": f["num_attention_heads"],
        "kv_heads": f["num_key_value_heads"],
        # Left out where it is the usual one, so that configs compare equal to those written by hand.
        "head_width": None if head is None or head * f["num_attention_heads"] == f["hidden_size"] else head,
        "mlp_width": f["intermediate_size"],
        "norm_eps": f["rms_norm_eps"],
        "tied": f["tie_word_embeddings"],
        "windows": _windows(f),
    }
    form: dict[str, Any] = {"position": "rope", "norm": "rmsnorm", "mlp": "swiglu", "bias": False}
    return GPT(**fields | form | _rope(f) | own)


def _rope(f: Fields) -> dict[str, Any]:
    """Rotary wavelengths, of the fields of transformers 4 or of 5 (`rope_parameters`)."""
    given: Mapping[str, Any] = f.get("rope_scaling") or f.get("rope_parameters") or {}
    kind = given.get("rope_type", given.get("type", "default"))
    f.note(kind in ("default", "linear", "llama3"), "rope_type", kind, "'default', 'linear' or 'llama3'")
    partial = given.get("partial_rotary_factor", f.get("partial_rotary_factor"))
    f.note(partial in (None, 1), "partial_rotary_factor", partial, "1.0")
    fields: dict[str, Any] = {"rope_theta": float(given.get("rope_theta", f["rope_theta"]))}
    if kind == "linear":
        fields["rope_scaling"] = RopeScaling(form="linear", factor=float(given["factor"]))
    elif kind == "llama3":
        fields["rope_scaling"] = RopeScaling(
            factor=float(given["factor"]),
            low_frequency=float(given["low_freq_factor"]),
            high_frequency=float(given["high_freq_factor"]),
            original_context=given.get("original_max_position_embeddings", f["max_position_embeddings"]),
        )
    return fields


def _windows(f: Fields) -> tuple[int, ...]:
    """The shortest pattern of windows that repeats, of `layer_types`, or of `sliding_window` for all."""
    size, layers = f.get("sliding_window"), f["num_hidden_layers"]
    types = f.get("layer_types") or [SLIDING] * layers
    fine = len(types) == layers and set(types) <= {FULL, SLIDING}
    f.note(fine, "layer_types", types, f"one {FULL!r} or {SLIDING!r} a layer")
    sizes = [size if size and kind == SLIDING else 0 for kind in types]
    if not any(sizes):
        return ()
    for period in range(1, layers):
        if all(s == sizes[i % period] for i, s in enumerate(sizes)):
            return tuple(sizes[:period])
    return tuple(sizes)


def write(model: GPT, **own: Any) -> dict[str, Any]:
    """The inverse of `read`: fields of config.json, with the family's own."""
    scaling, rope = model.rope_scaling, None
    if scaling is not None:
        rope = {"rope_type": scaling.form, "factor": scaling.factor}
        if scaling.form == "llama3":
            rope |= {
                "low_freq_factor": scaling.low_frequency,
                "high_freq_factor": scaling.high_frequency,
                "original_max_position_embeddings": scaling.original_context,
            }
    return {
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.context,
        "num_hidden_layers": model.layers,
        "hidden_size": model.width,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.groups,
        "head_dim": model.head,
        "intermediate_size": model.hidden,
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tied,
        "hidden_act": "silu",
        "rope_theta": model.rope_theta,
        "rope_scaling": rope,
    } | own


def window(model: GPT) -> int | None:
    """The size of the windows of those layers that have one."""
    return max(model.windows, default=0) or None


def layer_types(model: GPT) -> list[str]:
    """Which layers have a window."""
    sizes = model.windows or (0,)
    return [SLIDING if sizes[i % len(sizes)] else FULL for i in range(model.layers)]
