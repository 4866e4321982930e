"""How a run is computed, optimised, spread over devices and trained."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Literal

from jaxgpt.config.bounds import (
    Bounds,
    Decay,
    Layers,
    Parts,
    Positive,
    Rows,
    Seed,
    Steps,
    StepsOr0,
    Tokens,
    Weight,
)
from jaxgpt.config.check import check_types
from jaxgpt.errors import require


@dataclass(frozen=True, kw_only=True)
class Compute:
    """How a model is computed. None of this changes what a checkpoint holds."""

    dtype: Literal["auto", "float32", "bfloat16"] = "bfloat16"
    """Activations and matrix products; parameters, norms, softmax and losses stay float32. auto measures once
    which is faster on this machine; config.json then stores the type, and a run keeps it wherever it goes
    on."""
    remat: Literal["none", "full", "dots"] = "none"
    """What the backward pass recomputes: nothing, each layer, or all but the matrix products."""
    attention: Literal["auto", "xla", "cudnn", "cudnn_packed", "splash", "tokamax"] = "auto"
    """Attention kernel; auto logs and uses the fastest one that runs here (tokamax must be named)."""
    strict: bool = False
    """Raise instead of falling back to a slower attention kernel."""
    cache: Literal["float", "int8"] = "float"
    """How keys and values are held while text is written: in dtype, or in 8 bits with a scale for each token
    and head. A server says so by its own --cache."""
    loss_chunk: Tokens = 8192
    """Number of tokens per device whose logits the loss holds at a time."""
    unroll: Layers | None = None
    """Layers unrolled per iteration of the scan; None means all on a CPU, one elsewhere."""

    def __post_init__(self) -> None:
        check_types(self, "compute")


@dataclass(frozen=True, kw_only=True)
class Optim:
    """The optimizer and its learning-rate schedule."""

    name: Literal["adamw", "muon"] = "adamw"
    """AdamW for all parameters, or Muon for the matrices in the layers and AdamW for the rest."""
    peak_lr: Annotated[float, Bounds(1e-30, 1e6)] = 6e-4
    """Learning rate after the warm-up."""
    final_lr: Weight = 6e-5
    """Learning rate at the last step."""
    schedule: Literal["cosine", "linear", "wsd", "constant", "range"] = "cosine"
    """How the learning rate falls from its peak; wsd holds the peak and decays at the end. Of range it rises
    exponentially from final_lr to the peak, as `jaxgpt lr-find` needs."""
    warmup_steps: StepsOr0 = 100
    """Number of steps over which the learning rate rises to its peak."""
    decay_fraction: Annotated[float, Bounds(1e-6, 1)] = 0.2
    """Share of all steps, at the end, over which wsd (MiniCPM, section 4) decays."""
    b1: Decay = 0.9
    """AdamW's decay rate of the mean gradient."""
    b2: Decay = 0.95
    """AdamW's decay rate of the mean squared gradient."""
    eps: Positive = 1e-8
    """Added to AdamW's denominator."""
    weight_decay: Weight = 0.1
    """Weight decay, on matrices and tables only: never on norms or biases."""
    clip_norm: Annotated[float, Bounds(0, 1e30)] = 1.0
    """Global gradient norm above which gradients are scaled down; 0 turns it off."""
    muon_lr: Annotated[float, Bounds(1e-30, 1e6)] = 0.02
    """Peak learning rate of Muon (Jordan et al. 2024), for the matrices that it updates."""

    def __post_init__(self) -> None:
        check_types(self, "optim")
        require(
            self.final_lr <= self.peak_lr,
            f"optim.final_lr is {self.final_lr}; it must be between 0 and optim.peak_lr {self.peak_lr}.",
        )
        require(
            self.schedule != "range" or self.final_lr > 0,
            "optim.final_lr is 0 but optim.schedule 'range' begins there and rises by a factor per step; set "
            "it "
            "above 0.",
        )


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """Number of devices along each axis; -1 on one axis means all devices that the others leave."""

    data: Parts = -1
    """Data parallelism: copies of the model, each on its own rows."""
    fsdp: Parts = 1
    """Fully sharded data parallelism: parts of parameters and optimizer; rows are spread over it too."""
    tensor: Parts = 1
    """Tensor parallelism: parts of heads, MLP and vocabulary."""
    expert: Parts = 1
    """Expert parallelism: parts of a mixture's experts; rows are spread over it too."""

    def __post_init__(self) -> None:
        check_types(self, "mesh")
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            require(size != 0, f"mesh.{name} is 0; it must be -1 or at least 1.")
        require(list(sizes.values()).count(-1) <= 1, f"mesh {sizes} has more than one -1; keep one.")

    def resolve(self, devices: int) -> dict[str, int]:
        """Axis sizes for this number of devices; `UserError` when they do not multiply to it."""
        sizes = dataclasses.asdict(self)
        known = 1
        for size in sizes.values():
            known *= max(size, 1)
        free = [name for name, size in sizes.items() if size == -1]
        fits = devices % known == 0 if free else devices == known
        require(
            fits,
            f"mesh {sizes} takes {'a multiple of ' if free else ''}{known} devices but {devices} "
            "are here; change mesh.data, mesh.fsdp, mesh.tensor or mesh.expert.",
        )
        return sizes | dict.fromkeys(free, devices // known)


ONE_DEVICE = Mesh(data=1)
"""What a command that uses a trained run takes, unless it is told otherwise."""


ROW_AXES = ("data", "fsdp", "expert")
"""The mesh axes that rows of a batch are spread over."""


@dataclass(frozen=True, kw_only=True)
class Train:
    """The training loop: its length, how often it logs, evaluates and saves, and what it keeps."""

    steps: Steps = 1000
    """Number of training steps; with epochs, it is found from them."""
    epochs: Annotated[float, Bounds(1e-6, 1e6)] | None = None
    """Number of passes over the training data, in place of steps; of a mixture, over the source that takes
    longest. Rows of packed dialogues are counted in the first pass."""
    batch_size: Rows = 32
    """Batch size: rows per step over all devices and microbatches."""
    accumulate: Rows = 1
    """Gradient accumulation: microbatches per step. The result equals one full batch, except that experts
    are balanced within each microbatch."""
    seed: Seed = 0
    """Seed of the initial parameters, of dropout and of the order of the data."""
    log_every: Steps = 10
    """Steps between log records of training loss and speed."""
    eval_every: Steps = 100
    """Steps between evaluations on the validation data."""
    eval_batches: StepsOr0 = 0
    """Validation batches per evaluation; 0 means all of them."""
    samples: Annotated[int, Bounds(0, 64)] = 0
    """Number of validation texts (or dialogues) that are continued at each evaluation, for the report; 0
    turns it off. It holds the parameters once more. A run of several processes makes none."""
    save_every: Steps = 500
    """Steps between checkpoints; the best and the last are always saved."""
    keep: Steps = 2
    """Number of newest checkpoints to keep, besides the best."""
    eval_examples: StepsOr0 = 0
    """Validation samples of each task that are answered and scored by its metrics at each evaluation; 0 turns
    it off. It holds the parameters once more."""
    best_by: str = "loss"
    """What makes a checkpoint the best: the lowest validation loss or error (rate; suits labels), or
    SOURCE:METRIC, a metric of a task, with eval_examples; of GRPO it is the highest mean reward, whatever
    this says."""
    best_holds: Literal["all", "params"] = "all"
    """What the best checkpoint holds: the whole state, or only the parameters (a third of the size)."""
    noise_scale: bool = False
    """Log the gradient noise scale in rows: up to about that batch size, more rows per step save steps
    (McCandlish et al. 2018, appendix A). It compares microbatches, so it needs accumulate > 1."""
    patience: StepsOr0 = 0
    """Early stopping: evaluations without improvement before the run stops; 0 turns it off."""
    max_bad_steps: Steps = 10
    """Consecutive skipped updates (NaN or Inf) before the run aborts."""
    track: tuple[Literal["tensorboard", "wandb"], ...] | None = None
    """Trackers that get the numbers too (extra `track`); None means TensorBoard where it is installed."""

    def __post_init__(self) -> None:
        check_types(self, "train")
        require(
            self.batch_size % self.accumulate == 0,
            f"train.batch_size {self.batch_size} is not divisible by train.accumulate {self.accumulate}; "
            "every microbatch holds the same number of rows.",
        )
        require(
            not self.noise_scale or self.accumulate > 1,
            "train.noise_scale is True but train.accumulate is 1, and it is found by comparing microbatches; "
            "set accumulate to 2 or more.",
        )
        require(
            self.best_by in ("loss", "error") or ":" in self.best_by,
            f"train.best_by is {self.best_by!r}; allowed: loss, error, or SOURCE:METRIC of a task.",
        )
        require(
            ":" not in self.best_by or self.eval_examples > 0,
            f"train.best_by is {self.best_by!r} but train.eval_examples is 0, so nothing is answered; set it "
            "to "
            "the number of samples to answer, such as 200.",
        )
        names = self.track or ()
        require(len(set(names)) == len(names), f"train.track is {names}; name every tracker once.")
