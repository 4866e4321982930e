"""What of a model is trained: all of it, or what a parameter-efficient method adds or chooses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from jaxgpt.config.bounds import Bounds, Decay
from jaxgpt.config.check import check_types
from jaxgpt.errors import require

Rank = Annotated[int, Bounds(1, 2**16)]
Count = Annotated[int, Bounds(1, 2**16)]
Factor = Annotated[float, Bounds(1e-6, 1e6)]
Form = Literal["int8", "int4", "nf4", "fp8"]
LINEAR = ("blocks.*",)
"""All linear layers of the blocks (of a mixture of experts without its routers)."""


@dataclass(frozen=True, kw_only=True)
class Full:
    """Train all parameters."""


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """Train a product of two thin matrices beside each weight (Hu et al. 2022): W + alpha / rank * A B."""

    rank: Rank = 8
    """Columns of A and rows of B."""
    alpha: Factor = 16.0
    """The product is scaled by alpha / rank."""
    dropout: Decay = 0.0
    """Dropout rate of the adapter's input."""
    targets: tuple[str, ...] = LINEAR
    """Linear layers that get an adapter, as patterns over their names (`blocks.attention.q`, `blocks.mlp.*`).
    By default all linear layers of the blocks, as `all-linear` of peft: neither embeddings, the output
    projection nor routers."""
    rank_stabilized: bool = False
    """Scale by alpha / sqrt(rank) instead (rsLoRA; Kalajdzievski 2023)."""
    lr_ratio: Factor = 1.0
    """The learning rate of B over that of A (LoRA+; Hayou et al. 2024, who use 16)."""
    init: Literal["zero", "pissa"] = "zero"
    """`zero`: A is random and B zero, so that nothing changes at first. `pissa`: both hold the largest
    singular values and vectors of the weight, which is reduced by their product (PiSSA; Meng et al. 2024)."""
    base: Literal["float", "int8", "int4", "nf4"] = "float"
    """How the frozen weights that have an adapter are held: as they are, or quantized (QLoRA; Dettmers et al.
    2023)."""

    def __post_init__(self) -> None:
        check_types(self, "tune")
        require(
            len(self.targets) > 0,
            "tune.targets is empty; name linear layers, such as 'blocks.attention.*'.",
        )

    @property
    def scale(self) -> float:
        """Factor of the product A B."""
        return self.alpha / (self.rank**0.5 if self.rank_stabilized else self.rank)


@dataclass(frozen=True, kw_only=True)
class DoRA(LoRA):
    """LoRA for the direction of each weight's columns, and a trained magnitude for each (Liu et al. 2024)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.init == "zero",
            "tune.init is 'pissa' but DoRA begins with the weight's own direction; set it to 'zero'.",
        )


@dataclass(frozen=True, kw_only=True)
class PromptTuning:
    """Train embeddings of virtual tokens before every document (Lester et al. 2021)."""

    tokens: Count = 20
    """Number of virtual tokens."""
    init: Literal["vocabulary", "random", "text"] = "vocabulary"
    """Their first embeddings: of tokens drawn from the vocabulary, normal, or of the tokens of `text`."""
    text: str = ""
    """The text of init='text', repeated or cut to the number of tokens."""

    def __post_init__(self) -> None:
        check_types(self, "tune")
        require(
            (self.init == "text") == bool(self.text),
            f"tune.init is {self.init!r} and tune.text {self.text!r}; init='text' needs a text, and no other "
            "has one.",
        )


@dataclass(frozen=True, kw_only=True)
class PrefixTuning:
    """Train keys and values, in every layer, that all tokens attend to (Li and Liang 2021)."""

    tokens: Count = 20
    """Number of keys and values per layer."""
    projection: Annotated[int, Bounds(0, 2**20)] = 0
    """Hidden size of an MLP that makes them from embeddings while they are trained (section 4.3 of the
    paper); 0 trains them directly."""
    init: Literal["vocabulary", "random"] = "vocabulary"
    """What they are at first, without a projection: those of tokens drawn from the vocabulary, as the model
    computes them, or normal."""

    def __post_init__(self) -> None:
        check_types(self, "tune")


@dataclass(frozen=True, kw_only=True)
class BottleneckAdapters:
    """Train small MLPs inside the layers, with a residual connection around each."""

    size: Count = 64
    """Hidden size of the MLP."""
    place: Literal["houlsby", "pfeiffer", "parallel"] = "houlsby"
    """After attention and after the MLP (Houlsby et al. 2019), after the MLP alone (Pfeiffer et al. 2021), or
    beside the MLP, on its input (He et al. 2022)."""
    activation: Literal["gelu", "relu"] = "gelu"
    """Between the two projections."""
    scale: Factor = 1.0
    """Factor of the output (He et al. use 4 beside the MLP)."""
    norms: bool = True
    """Train the scales and biases of the norms in the layers too (Houlsby et al., section 2.1)."""

    def __post_init__(self) -> None:
        check_types(self, "tune")


@dataclass(frozen=True, kw_only=True)
class IA3:
    """Train factors of the keys, the values and the MLP's hidden features (Liu et al. 2022)."""

    def __post_init__(self) -> None:
        check_types(self, "tune")


@dataclass(frozen=True, kw_only=True)
class BitFit:
    """Train the biases alone (Ben Zaken et al. 2022)."""

    def __post_init__(self) -> None:
        check_types(self, "tune")


@dataclass(frozen=True, kw_only=True)
class LastLayers:
    """Train the last layers, and what follows them."""

    layers: Annotated[int, Bounds(0, 2**16)] = 1
    """Number of layers; 0 trains what follows them alone: the last norm and the output projection where it is
    not the embedding, or the head over labels."""

    def __post_init__(self) -> None:
        check_types(self, "tune")


@dataclass(frozen=True, kw_only=True)
class Quantization(Full):
    """Nothing is trained: matrices are held in few bits. `jaxgpt quantize` writes such a run."""

    to: Form = "int8"
    """How a weight is held: in 8 bits with a scale for each output, or in 4 (`int4`, or `nf4` of QLoRA) with
    a scale for each 64 inputs of an output; `fp8` is float8_e4m3fn."""
    method: Literal["rtn", "gptq", "awq", "smoothquant"] = "rtn"
    """How weights were rounded: each to the nearest value (`rtn`), making up for the errors of those before
    (`gptq`; Frantar et al. 2023), with inputs scaled by how large they are (`awq`; Lin et al. 2024), or with
    outliers of the inputs moved into the weights (`smoothquant`; Xiao et al. 2023)."""
    activations: Literal["float", "int8"] = "float"
    """`int8` rounds the inputs of each product too; the weights must be int8."""
    skip: tuple[str, ...] = ()
    """Linear layers that stay as they are, as patterns over their names (`blocks.mlp.down`)."""

    def __post_init__(self) -> None:
        check_types(self, "tune")
        require(
            self.activations == "float" or self.to == "int8",
            f"tune.activations is 'int8' but tune.to {self.to!r}; products of integers need 'int8' in both.",
        )
        require(
            self.method != "smoothquant" or self.activations == "int8",
            "tune.method is 'smoothquant', which is for inputs in int8; set tune.activations to 'int8' too.",
        )


@dataclass(frozen=True, kw_only=True)
class QuantizationAware(Full):
    """Train all parameters through the rounding that `jaxgpt quantize` does later (Jacob et al. 2018).

    The gradient passes the rounding unchanged (a straight-through estimator; Bengio et al. 2013).
    """

    to: Form = "int4"
    """How weights will be held; see Quantization."""
    skip: tuple[str, ...] = ()
    """Linear layers that are not rounded, as patterns over their names."""

    def __post_init__(self) -> None:
        check_types(self, "tune")


def keeps_base(tune: object) -> bool:
    """Whether all of the model that is tuned is still there, frozen, beside what is trained."""
    if isinstance(tune, LoRA):
        return tune.init == "zero"
    return isinstance(tune, PromptTuning | PrefixTuning | IA3) or (
        isinstance(tune, BottleneckAdapters) and not tune.norms
    )


Tune = (
    Full
    | LoRA
    | DoRA
    | PromptTuning
    | PrefixTuning
    | BottleneckAdapters
    | IA3
    | BitFit
    | LastLayers
    | QuantizationAware
    | Quantization
)
