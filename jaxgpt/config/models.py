"""The other architectures as data: one class for each, with nothing about how it is computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from jaxgpt.config.architecture import Architecture, Blocks
from jaxgpt.config.bounds import Bounds, Decay, Layers, Positive, Tokens, TokensOr0, Width
from jaxgpt.config.check import check_types
from jaxgpt.config.gpt import GPT, MOST_KINDS, Context, Heads
from jaxgpt.errors import require


@dataclass(frozen=True, kw_only=True)
class Bert(Blocks):
    """A bidirectional encoder with a masked-LM head (Devlin et al. 2019). The defaults are BERT-base."""

    vocab_size: Tokens = 30_522
    """Vocabulary size: at least the tokenizer's."""
    context: Context = 512
    """Maximum sequence length in tokens; the rows of the position table."""
    layers: Layers = 12
    """Number of layers (attention and MLP)."""
    width: Width = 768
    """Hidden size: features per token in the residual stream."""
    heads: Heads = 12
    """Number of attention heads."""
    mlp_width: Width | None = None
    """Hidden size of the MLP; None means 4 x width."""
    mlp: Literal["gelu", "gelu_exact", "relu"] = "gelu_exact"
    """Activation of the MLP and of the head."""
    types: Annotated[int, Bounds(1, 2**16)] = 2
    """Segment embeddings: kinds of text in one input, such as a question and its passage."""
    norm_eps: Positive = 1e-12
    """Added to the variance in every norm."""
    dropout: Decay = 0.1
    """Dropout rate, after the embedding and on both residual branches."""

    def __post_init__(self) -> None:
        check_types(self, "model")
        _ = self.blocks  # checks the rest

    @property
    def blocks(self) -> GPT:
        """The config of its layers."""
        return GPT(
            **{name: getattr(self, name) for name in _SHARED},
            mlp=self.mlp,
            norm_eps=self.norm_eps,
            norm_at="post",
            causal=False,
        )

    @property
    def causal(self) -> bool:
        """Whether later tokens are hidden."""
        return False

    @property
    def tied(self) -> bool:
        """Whether the embedding is the output projection."""
        return True


_SHARED = ("vocab_size", "context", "layers", "width", "heads", "mlp_width", "dropout")


@dataclass(frozen=True, kw_only=True)
class TransformerXL(Blocks):
    """A decoder with segment-level recurrence (Dai et al. 2019). The defaults are its WikiText-103 base."""

    vocab_size: Tokens = 50_304
    """Vocabulary size: at least the tokenizer's."""
    context: Context = 4096
    """Maximum number of tokens that the sampler writes; training rows have `segment` tokens."""
    segment: Tokens = 150
    """Number of tokens per training row (tgt_len)."""
    memory: TokensOr0 = 150
    """Earlier tokens whose features every layer keeps from segment to segment (mem_len)."""
    eval_memory: TokensOr0 | None = None
    """The memory's length in evaluation and sampling; None means memory."""
    same_length: bool = False
    """Let every token see exactly `memory` tokens, itself included, also late in a segment."""
    clamp: TokensOr0 = 0
    """Distances above it count as it (clamp_len); 0 clamps none."""
    layers: Layers = 16
    """Number of layers (attention and MLP)."""
    width: Width = 410
    """Hidden size: features per token in the residual stream."""
    heads: Heads = 10
    """Number of attention heads."""
    head_width: Width | None = None
    """Head size; None means width / heads."""
    mlp_width: Width | None = 2100
    """Hidden size of the MLP; None means 4 x width."""
    mlp: Literal["gelu", "gelu_exact", "relu", "relu2"] = "relu"
    """Activation of the MLP."""
    norm_at: Literal["pre", "post"] = "post"
    """On a branch's input, or on the sum after it (the paper's)."""
    norm_eps: Positive = 1e-5
    """Added to the variance in every norm."""
    shared_biases: bool = False
    """One pair of learned biases u and v for all layers (the paper's text), not one pair per layer."""
    cutoffs: tuple[Tokens, ...] = ()
    """Adaptive embedding and softmax (Grave et al. 2017; Baevski & Auli 2019): first id of each later
    cluster, ids being in order of frequency; empty for a plain one."""
    div: Annotated[int, Bounds(1, 1024)] = 1
    """Each cluster's embedding is this many times narrower than the one before (div_val)."""
    tied: bool = True
    """Use the embedding as the output projection."""
    dropout: Decay = 0.1
    """Dropout rate, after the embedding and on both residual branches."""

    def __post_init__(self) -> None:
        check_types(self, "model")
        require(
            self.memory > 0 or not self.eval_memory,
            f"model.eval_memory is {self.eval_memory} but model.memory is 0; training needs one too.",
        )
        require(
            self.width % 2 == 0,
            f"model.width is {self.width}; the sinusoids of relative positions need an even one.",
        )
        require(
            not self.same_length or self.memory > 0,
            "model.same_length is True but model.memory is 0; give it a memory or set same_length=False.",
        )
        require(
            len(self.cutoffs) < MOST_KINDS,
            f"model.cutoffs has {len(self.cutoffs)} ids; it must have fewer than {MOST_KINDS}.",
        )
        require(
            list(self.cutoffs) == sorted({c for c in self.cutoffs if 0 < c < self.vocab_size}),
            f"model.cutoffs is {self.cutoffs}; they must rise between 0 and vocab_size {self.vocab_size}.",
        )
        require(
            self.div == 1 or self.width // self.div ** len(self.cutoffs) >= 1,
            f"model.div {self.div} leaves no width for the last of {len(self.cutoffs) + 1} clusters.",
        )
        _ = self.blocks  # checks the rest

    @property
    def blocks(self) -> GPT:
        """The config of its layers."""
        return GPT(
            **{name: getattr(self, name) for name in (*_SHARED, "head_width", "mlp", "norm_at", "norm_eps")},
            position="none",
        )

    @property
    def row(self) -> int:
        """Number of tokens per training row, unless the data say otherwise."""
        return self.segment

    @property
    def causal(self) -> bool:
        """Whether later tokens are hidden."""
        return True


_INHERITED: Any = None


@dataclass(frozen=True, kw_only=True)
class Headed(Blocks):
    """What models have that are a head on another one, their backbone."""

    backbone: GPT | Bert | TransformerXL | Architecture = _INHERITED
    """The model under the head; unspecified means that of the run named by init_from."""
    head_dropout: Decay = 0.1
    """Dropout rate on the features that the head reads."""
    frozen: bool = False
    """Train only the head."""

    def __post_init__(self) -> None:
        check_types(self, "model")

    @property
    def blocks(self) -> GPT:
        """The config of the backbone's layers."""
        return self.backbone if isinstance(self.backbone, GPT) else self.backbone.blocks

    @property
    def vocab_size(self) -> int:
        return self.backbone.vocab_size

    @property
    def context(self) -> int:
        return self.backbone.context

    @property
    def layers(self) -> int:
        return self.backbone.layers

    @property
    def width(self) -> int:
        return self.backbone.width

    @property
    def heads(self) -> int:
        return self.backbone.heads

    @property
    def causal(self) -> bool:
        return self.backbone.causal

    @property
    def row(self) -> int:
        return self.backbone.context


@dataclass(frozen=True, kw_only=True)
class Classifier(Headed):
    """A backbone with a linear head over labels: of every token, or of the whole text."""

    labels: tuple[str, ...]
    """The labels, such as ("O", "B-PER", "I-PER"), in the order of the head's outputs."""
    pool: Literal["token", "first", "last", "mean"] = "token"
    """What is labelled: each token (tagging), or a text by its first token, last token or mean."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(len(self.labels) >= 2, f"model.labels is {self.labels}; name at least two.")
        require(
            len(set(self.labels)) == len(self.labels),
            f"model.labels is {self.labels}; every label is named once.",
        )


@dataclass(frozen=True, kw_only=True)
class RewardModel(Headed):
    """A backbone with a linear head that says how good a dialogue's last answer is, at its last token."""

    head_dropout: Decay = 0.0
    """Dropout rate on the features that the head reads."""


Model = GPT | Bert | TransformerXL | Classifier | RewardModel | Architecture
"""The registry of architectures; `jaxgpt.models.MODULES` has the module of each in the package."""
