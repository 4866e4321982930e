"""The decoder as data: what it is, with nothing about how it is computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from jaxgpt.config.bounds import Bounds, Decay, Layers, Positive, Tokens, TokensOr0, Weight, Width
from jaxgpt.config.check import check_types
from jaxgpt.errors import require

MOST_KINDS = 64
"""Of layers or clusters of one model: each is traced by itself."""
Context = Annotated[int, Bounds(2, 2**24)]
Heads = Annotated[int, Bounds(1, 2**14)]
Scale = Annotated[float, Bounds(1e-6, 1e6)]
Activation = Literal["gelu", "gelu_exact", "relu", "relu2", "swiglu", "geglu"]


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary wavelengths are stretched for contexts longer than those pretrained on."""

    form: Literal["linear", "llama3"] = "llama3"
    """All by the factor (Chen et al. 2023), or only the long ones (Llama 3.1)."""
    factor: Scale = 8.0
    """Scaling factor."""
    low_frequency: Scale = 1.0
    """llama3: wavelengths above original_context / this are stretched in full."""
    high_frequency: Scale = 4.0
    """llama3: wavelengths below original_context / this are left."""
    original_context: Tokens = 8192
    """llama3: context length in pretraining."""

    def __post_init__(self) -> None:
        check_types(self, "model.rope_scaling")
        require(
            self.form != "llama3" or self.low_frequency < self.high_frequency,
            f"model.rope_scaling.low_frequency {self.low_frequency} is not below high_frequency "
            f"{self.high_frequency}; exchange them.",
        )


@dataclass(frozen=True, kw_only=True)
class MoE:
    """A mixture of expert MLPs in every layer, no token dropped (Mixtral; Qwen-MoE with shared_width)."""

    experts: Annotated[int, Bounds(1, 2**16)] = 8
    """Number of experts per layer."""
    per_token: Annotated[int, Bounds(1, 2**16)] = 2
    """Number of experts per token."""
    width: Width | None = None
    """Hidden size of one expert; None means model.mlp_width."""
    normalise: bool = True
    """Weigh the chosen experts by a softmax over them alone (Mixtral), not over all (Qwen2-MoE)."""
    shared_width: Annotated[int, Bounds(0, 2**20)] = 0
    """Hidden size of a gated shared expert that every token passes; 0 for none."""
    balance: Weight = 0.01
    """Weight of the load-balancing loss (Switch Transformers, equation 4)."""

    def __post_init__(self) -> None:
        check_types(self, "model.moe")
        require(
            self.per_token <= self.experts,
            f"model.moe.per_token {self.per_token} is more than model.moe.experts {self.experts}; lower it.",
        )


@dataclass(frozen=True, kw_only=True)
class GPT:
    """A decoder. The defaults are GPT-2 124M (Radford et al. 2019); other fields give today's form."""

    # sizes
    vocab_size: Tokens = 50_304
    """Vocabulary size: at least the tokenizer's, divisible by the mesh's tensor axis."""
    context: Context = 1024
    """Maximum sequence length in tokens; the rows of a learned position table."""
    layers: Layers = 12
    """Number of layers (attention and MLP)."""
    width: Width = 768
    """Hidden size: features per token in the residual stream."""

    # attention
    heads: Heads = 12
    """Number of attention heads (of the queries)."""
    kv_heads: Heads | None = None
    """Number of key-value heads (grouped-query attention; Ainslie et al. 2023); None means heads."""
    head_width: Width | None = None
    """Head size; None means width / heads."""
    windows: tuple[TokensOr0, ...] = ()
    """Sliding-window sizes in tokens, repeated over the layers; 0 in it means full attention."""
    qkv_bias: bool | None = None
    """Biases of queries, keys and values; None means as bias (Qwen2 has only these)."""
    qk_norm: bool = False
    """RMS-normalise queries and keys per head before the rotation (Henry et al. 2020)."""
    attention_softcap: Positive | None = None
    """Cap attention scores to (-c, c) by c * tanh(scores / c) (Gemma 2, section 2)."""
    attention_scalar: Positive | None = None
    """Attention scores are divided by its square root; None means head_width (Gemma sets it)."""
    causal: bool = True
    """False gives bidirectional attention, which a next-token objective refuses."""
    prefix: bool = False
    """Bidirectional over a prompt, causal over its answer (prefix LM; Raffel et al. 2020, section 3.2)."""

    # positions
    position: Literal["learned", "rope", "alibi", "relative", "none"] = "learned"
    """A learned table (GPT-2), rotary (Llama), or a bias on the scores: ALiBi's slopes, T5's buckets."""
    rope_theta: Positive = 10_000.0
    """Base of the rotary wavelengths; larger for longer contexts."""
    rope_local_theta: Positive | None = None
    """Base in the layers with a window, which are then never scaled (Gemma 3); None means rope_theta."""
    rope_scaling: RopeScaling | None = None
    """Stretches the rotary wavelengths (Llama 3.1); None leaves them."""

    # norms
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """LayerNorm (GPT-2) or RMSNorm (today's choice)."""
    norm_at: Literal["pre", "post", "both"] = "pre"
    """On a branch's input (GPT-2), on the sum after it (BERT), or on its input and output (Gemma 2)."""
    norm_eps: Positive = 1e-5
    """Added to the variance in every norm."""
    zero_centered_norm: bool = False
    """Norms multiply by 1 + scale (Gemma)."""

    # MLP
    mlp: Activation = "gelu"
    """Activation of the MLP: GELU (GPT-2), or gated SwiGLU (Llama) or GeGLU (Gemma)."""
    mlp_width: Width | None = None
    """Hidden size of the MLP; None means 4 x width, or if gated 8/3 x width rounded up to 64s."""
    moe: MoE | None = None
    """Experts in place of the MLP; None for a dense model."""

    # all projections
    bias: bool = True
    """Biases in the projections and in LayerNorm."""

    # embedding and output
    embed_scale: bool = False
    """Multiply embeddings by the square root of the width (Vaswani et al. 2017, section 3.4; Gemma)."""
    tied: bool = True
    """Use the embedding as the output projection."""
    logit_softcap: Positive | None = None
    """Cap logits to (-c, c) by c * tanh(logits / c) (Gemma 2, section 2)."""

    # regularisation
    dropout: Decay = 0.0
    """Dropout rate, after the embedding and on both residual branches."""

    def __post_init__(self) -> None:
        check_types(self, "model")
        require(
            self.head_width is not None or self.width % self.heads == 0,
            f"model.width {self.width} is not divisible by model.heads {self.heads}; "
            "change one of them or set model.head_width.",
        )
        require(
            self.heads % self.groups == 0,
            f"model.heads {self.heads} is not divisible by model.kv_heads {self.groups}; "
            "every key-value head serves a whole number of query heads.",
        )
        require(
            self.position != "rope" or self.head == 2 * (self.head // 2),
            f"model.head_width is {self.head}; rotary positions need an even one: change it or model.heads.",
        )
        require(
            len(self.windows) <= MOST_KINDS,
            f"model.windows has {len(self.windows)} sizes; it must have at most {MOST_KINDS}, which repeat.",
        )
        require(
            self.causal or not any(self.windows),
            f"model.windows is {self.windows} but model.causal is False; "
            "a sliding window looks back only: set causal=True or windows=().",
        )
        require(
            self.causal or not self.prefix,
            "model.prefix is True but model.causal is False; a prefix LM is causal after its prefix: "
            "set causal=True.",
        )
        require(
            not (self.prefix and any(self.windows)),
            f"model.prefix is True and model.windows is {self.windows}; a prefix is seen whole: drop one.",
        )

    @property
    def groups(self) -> int:
        """Number of key-value heads."""
        return self.kv_heads or self.heads

    @property
    def head(self) -> int:
        """Width of one attention head."""
        return self.head_width or self.width // self.heads

    @property
    def hidden(self) -> int:
        """Hidden width of the MLP."""
        gated = self.mlp in ("swiglu", "geglu")
        default = 64 * -(-8 * self.width // (3 * 64)) if gated else 4 * self.width
        return self.mlp_width or default

    @property
    def row(self) -> int:
        """Number of tokens per training row, unless the data say otherwise."""
        return self.context

    def window(self, layer: int) -> int:
        """Tokens a query of this layer sees, itself included (the whole context where full)."""
        size = self.windows[layer % len(self.windows)] if self.windows else 0
        return size or self.context

    def frequency(self, layer: int) -> tuple[float, RopeScaling | None]:
        """Base and stretching of this layer's rotary wavelengths."""
        if self.rope_local_theta and self.window(layer) < self.context:
            return self.rope_local_theta, None
        return self.rope_theta, self.rope_scaling
