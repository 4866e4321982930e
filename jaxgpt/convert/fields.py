"""What a config.json may hold: the schema of the fields that we read, of all families at once."""

from __future__ import annotations

from typing import Annotated, Any, TypedDict

import msgspec

Size = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
Layers = Annotated[int, msgspec.Meta(ge=1, le=4096)]
Id = Annotated[int, msgspec.Meta(ge=-1, le=2**31 - 1)]
"""Of a token; -1 is none. The tokenizer decides which ids there are."""
Flag = bool | None


class Rope(TypedDict, total=False):
    """`rope_scaling` of transformers 4, `rope_parameters` of 5."""

    rope_type: str | None
    type: str | None
    rope_theta: float
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: Size
    partial_rotary_factor: float | None


class Ropes(Rope, total=False):
    """The same, or one for each kind of layers (Gemma 3)."""

    full_attention: Rope | None
    sliding_attention: Rope | None


class Config(TypedDict, total=False):
    """A config.json; what is not here is not read, or compared with the values we allow alone."""

    model_type: str
    torch_dtype: str | None
    dtype: str | None
    eos_token_id: Id | list[Id] | None
    bos_token_id: Id | list[Id] | None
    text_config: dict[str, Any]
    # Sizes.
    vocab_size: Size
    hidden_size: Size
    n_embd: Size
    num_hidden_layers: Layers
    n_layer: Layers
    num_attention_heads: Size
    n_head: Size
    num_key_value_heads: Size | None
    head_dim: Size | None
    intermediate_size: Size
    n_inner: Size | None
    max_position_embeddings: Size
    n_positions: Size
    type_vocab_size: Size
    # Experts.
    num_experts: Size | None
    num_local_experts: Size | None
    num_experts_per_tok: Size
    moe_intermediate_size: Size
    shared_expert_intermediate_size: Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
    router_aux_loss_coef: float
    norm_topk_prob: bool
    # Windows.
    sliding_window: Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)] | None
    layer_types: Annotated[list[str], msgspec.Meta(max_length=4096)] | None
    use_sliding_window: Flag
    max_window_layers: Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)] | None
    sliding_window_pattern: Size | None
    _sliding_window_pattern: Size | None
    # Positions.
    rope_theta: float
    rope_local_base_freq: float
    rope_scaling: Ropes | None
    rope_parameters: Ropes | None
    partial_rotary_factor: float | None
    # The rest.
    hidden_act: str
    activation_function: str
    attention_bias: Flag
    mlp_bias: Flag
    qkv_bias: bool
    tie_word_embeddings: Flag
    rms_norm_eps: float
    layer_norm_eps: float
    layer_norm_epsilon: float
    hidden_dropout_prob: float
    resid_pdrop: float
    query_pre_attn_scalar: float
    attn_logit_softcapping: float | None
    final_logit_softcapping: float | None
