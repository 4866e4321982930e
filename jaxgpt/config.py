"""An experiment as data: `Run` and its parts, checked, loaded, overridden, written as strict JSON.

Nothing here imports jax, so that `jaxgpt train --help` answers at once (docs/adr/0001).
Every class is a frozen dataclass; a variant is `dataclasses.replace(run, ...)`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import importlib.util
import io
import itertools
import json
import math
import re
import traceback
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

T = TypeVar("T")


class UserError(ValueError):
    """A mistake its user can mend: the command line prints it as one sentence, with no traceback."""


def nearest(name: str, allowed: typing.Iterable[str]) -> str:
    """A hint such as `; did you mean 'width'?`, or the list of what is allowed when nothing is near."""
    names = sorted(allowed)
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; allowed: {', '.join(names)}"


def require(condition: bool, message: str) -> None:
    """Raise `UserError(message)` unless the condition holds."""
    if not condition:
        raise UserError(message)


def require_known(name: Any, allowed: typing.Collection[Any], message: str) -> None:
    """Raise `UserError(message)` with a hint unless the name is allowed; the hint is slow to find."""
    if name not in allowed:
        raise UserError(f"{message}{nearest(str(name), map(str, allowed))}")


def check_types(part: Any, where: str) -> None:
    """Raise `UserError` where a field of a config class holds what its type does not allow.

    Every `__post_init__` begins with it: comparing the number 0 with the text "3e-4" would otherwise
    stop with Python's words, which name no field.
    """
    for name, hint in _hints(type(part)).items():
        _parse(hint, to_json(getattr(part, name)), f"{where}.{name}" if where else name)


# --------------------------------------------------------------------------------------- the parts


@dataclass(frozen=True, kw_only=True)
class GPT:
    """A decoder. The defaults are GPT-2 124M (Radford et al. 2019); other fields give today's form."""

    vocab_size: int = 50_304
    """Rows of the embedding; at least the tokenizer's size, divisible by the mesh's tensor axis."""
    context: int = 1024
    """Longest sequence in tokens; the rows of a learned position table."""
    layers: int = 12
    """Blocks of attention and MLP."""
    width: int = 768
    """Features of a token between the blocks."""
    heads: int = 12
    """Attention heads (of the queries)."""
    kv_heads: int | None = None
    """Grouped-query attention (Ainslie et al. 2023): key and value heads; None means as many as heads."""
    head_width: int | None = None
    """Width of one head; None means width / heads."""
    mlp_width: int | None = None
    """Hidden width of the MLP; None means 4 x width, or for swiglu 8/3 x width up to a multiple of 64."""
    position: Literal["learned", "rope"] = "learned"
    """A learned table (GPT-2), or rotary positions (today's choice)."""
    rope_theta: float = 10_000.0
    """Base of the rotary wavelengths; larger for longer contexts."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """LayerNorm (GPT-2) or RMSNorm (today's choice)."""
    norm_eps: float = 1e-5
    """Added to the variance in every norm."""
    mlp: Literal["gelu", "swiglu"] = "gelu"
    """Activation of the MLP: GELU (GPT-2) or gated SwiGLU (today's choice)."""
    bias: bool = True
    """Biases in the projections and in LayerNorm."""
    qk_norm: bool = False
    """RMS-normalise queries and keys per head before the rotation (Henry et al. 2020)."""
    tied: bool = True
    """Use the embedding as the output projection."""
    logit_softcap: float | None = None
    """Cap logits to (-c, c) by c * tanh(logits / c) (Gemma 2, section 2)."""
    dropout: float = 0.0
    """Rate after the embedding and on both residual branches."""
    windows: tuple[int, ...] = ()
    """Sliding-window sizes in tokens, repeated over the layers; 0 in it means full attention."""
    causal: bool = True
    """False gives bidirectional attention, which a next-token objective refuses."""

    def __post_init__(self) -> None:
        check_types(self, "model")
        for name in ("vocab_size", "context", "layers", "width", "heads"):
            value = getattr(self, name)
            require(value >= 1, f"model.{name} is {value}; it must be at least 1.")
        for name in ("kv_heads", "head_width", "mlp_width", "logit_softcap", "rope_theta", "norm_eps"):
            value = getattr(self, name)
            require(value is None or value > 0, f"model.{name} is {value}; it must be above 0.")
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
        require(0 <= self.dropout < 1, f"model.dropout is {self.dropout}; it must be in [0, 1).")
        require(
            all(w >= 0 for w in self.windows),
            f"model.windows is {self.windows}; each must be 0 (full attention) or a number of tokens.",
        )
        require(
            self.causal or not any(self.windows),
            f"model.windows is {self.windows} but model.causal is False; "
            "a sliding window looks back only: set causal=True or windows=().",
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
        default = 64 * -(-8 * self.width // (3 * 64)) if self.mlp == "swiglu" else 4 * self.width
        return self.mlp_width or default

    def window(self, layer: int) -> int:
        """Tokens a query of this layer sees, itself included (the whole context where full)."""
        size = self.windows[layer % len(self.windows)] if self.windows else 0
        return size or self.context


@dataclass(frozen=True, kw_only=True)
class Compute:
    """How a model is computed: none of this changes what a checkpoint holds."""

    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Activations and matrix products; parameters, norms, softmax and losses stay float32."""
    remat: Literal["none", "full", "dots"] = "none"
    """What the backward pass recomputes: nothing, each layer, or all but the matrix products."""
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    """Attention kernel; auto takes the fastest one that can run here and says which."""
    strict: bool = False
    """Raise instead of falling back to a slower attention kernel."""
    loss_chunk: int = 8192
    """Tokens (over the whole batch) whose logits are held at a time in the loss."""
    unroll: int | None = None
    """Layers unrolled in one turn of the scan; None means all on a CPU, one elsewhere."""

    def __post_init__(self) -> None:
        check_types(self, "compute")
        for name in ("loss_chunk", "unroll"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"compute.{name} is {value}; it must be at least 1.")


@dataclass(frozen=True, kw_only=True)
class Text:
    """Pretraining text: a folder written by `jaxgpt data prepare`, packed by concat-then-split."""

    path: str
    """The folder."""
    length: int | None = None
    """Tokens a row; None means model.context."""
    workers: int = 0
    """Processes that read ahead; 0 reads in threads of this process."""

    def __post_init__(self) -> None:
        check_types(self, "data")
        require(bool(self.path), "data.path is empty; give a folder made by `jaxgpt data prepare`.")
        _check_reading(self)


@dataclass(frozen=True, kw_only=True)
class Chat:
    """Instruction data: JSON or JSONL files of dialogues, packed first-fit, loss on answers only."""

    train: tuple[str, ...]
    """Files, folders or globs."""
    validation: tuple[str, ...] = ()
    """As train; when empty, validation_fraction of the training examples is held out."""
    validation_fraction: float = 0.05
    """Share of the dialogues held out where validation names no files."""
    tokenizer: str = ""
    """A tokenizer folder; empty means that of the run named by init_from."""
    length: int | None = None
    """Tokens a row; None means model.context. Longer dialogues are cut, and counted."""
    bins: int = 64
    """Rows that first-fit packing keeps open at a time."""
    workers: int = 0
    """Processes that read ahead; 0 reads in threads of this process."""

    def __post_init__(self) -> None:
        check_types(self, "data")
        require(len(self.train) > 0, "data.train is empty; name at least one JSON or JSONL file.")
        require(
            0 < self.validation_fraction < 1,
            f"data.validation_fraction is {self.validation_fraction}; it must be between 0 and 1.",
        )
        require(self.bins >= 1, f"data.bins is {self.bins}; it must be at least 1.")
        _check_reading(self)


def _check_reading(data: Text | Chat) -> None:
    require(data.length is None or data.length >= 2, f"data.length is {data.length}; it must be at least 2.")
    require(data.workers >= 0, f"data.workers is {data.workers}; it must be at least 0.")


@dataclass(frozen=True, kw_only=True)
class CausalLM:
    """Next-token prediction; on Chat data the weights make it the instruction objective."""

    z_loss: float = 0.0
    """Weight of the squared log-partition (PaLM, section 5), which keeps logits near zero."""

    def __post_init__(self) -> None:
        check_types(self, "objective")
        require(self.z_loss >= 0, f"objective.z_loss is {self.z_loss}; it must be at least 0.")


@dataclass(frozen=True, kw_only=True)
class Optim:
    """The optimizer and its learning-rate schedule."""

    name: Literal["adamw", "muon"] = "adamw"
    """AdamW for all, or Muon for the matrices of the layers and AdamW for the rest."""
    peak_lr: float = 6e-4
    """Learning rate after the warm-up."""
    final_lr: float = 6e-5
    """Learning rate at the last step."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """How it falls from the peak; wsd stays there and falls at the end."""
    warmup_steps: int = 100
    """Steps in which it rises to the peak."""
    decay_fraction: float = 0.2
    """Warmup-stable-decay (MiniCPM, section 4): the last share of the steps, in which it decays."""
    b1: float = 0.9
    """AdamW's decay of the mean gradient."""
    b2: float = 0.95
    """AdamW's decay of the mean squared gradient."""
    eps: float = 1e-8
    """AdamW's floor of the denominator."""
    weight_decay: float = 0.1
    """On matrices only: never on norms, biases or position-wise vectors."""
    clip_norm: float = 1.0
    """Global gradient norm above which gradients are scaled down; 0 turns it off."""
    muon_lr: float = 0.02
    """Peak learning rate of the matrices that Muon updates (Jordan et al. 2024)."""

    def __post_init__(self) -> None:
        check_types(self, "optim")
        for name in ("peak_lr", "muon_lr", "eps"):
            value = getattr(self, name)
            require(value > 0, f"optim.{name} is {value}; it must be above 0.")
        for name in ("b1", "b2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optim.{name} is {value}; it must be in [0, 1).")
        require(
            0 <= self.final_lr <= self.peak_lr,
            f"optim.final_lr is {self.final_lr}; it must be between 0 and peak_lr {self.peak_lr}.",
        )
        for name in ("warmup_steps", "weight_decay", "clip_norm"):
            value = getattr(self, name)
            require(value >= 0, f"optim.{name} is {value}; it must be at least 0.")
        require(
            0 < self.decay_fraction <= 1,
            f"optim.decay_fraction is {self.decay_fraction}; it must be in (0, 1].",
        )


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """Devices along each axis; -1 on one of them means all that the others leave."""

    data: int = -1
    """Copies of the model, each on its own rows."""
    fsdp: int = 1
    """Parts that parameters and optimizer are split into; rows are spread over it too."""
    tensor: int = 1
    """Parts that heads, MLP and vocabulary are split into."""

    def __post_init__(self) -> None:
        check_types(self, "mesh")
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            require(size >= 1 or size == -1, f"mesh.{name} is {size}; it must be -1 or at least 1.")
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
            "are here; change mesh.data, mesh.fsdp or mesh.tensor.",
        )
        return sizes | dict.fromkeys(free, devices // known)


@dataclass(frozen=True, kw_only=True)
class Train:
    """The loop: how long, how often it looks, what it keeps."""

    steps: int = 1000
    """Updates of the whole run."""
    batch_size: int = 32
    """Rows a step over all devices and microbatches."""
    accumulate: int = 1
    """Microbatches a step; the result equals one full batch."""
    seed: int = 0
    """Of the initial parameters, dropout and the order of the data."""
    log_every: int = 10
    """Steps between two records of training loss and speed."""
    eval_every: int = 100
    """Steps between two measurements of the validation loss."""
    eval_batches: int = 0
    """Validation batches an evaluation; 0 means all of them once."""
    save_every: int = 500
    """Steps between two checkpoints; the best and the last are saved in any case."""
    keep: int = 2
    """Newest checkpoints kept besides the best."""
    patience: int = 0
    """Evaluations without a better validation loss before the run stops; 0 never stops early."""
    max_bad_steps: int = 10
    """Skipped updates (NaN or Inf) in a row before the run aborts."""

    def __post_init__(self) -> None:
        check_types(self, "train")
        for name in (
            "steps",
            "batch_size",
            "accumulate",
            "log_every",
            "eval_every",
            "save_every",
            "keep",
            "max_bad_steps",
        ):
            value = getattr(self, name)
            require(value >= 1, f"train.{name} is {value}; it must be at least 1.")
        for name in ("seed", "eval_batches", "patience"):
            value = getattr(self, name)
            require(value >= 0, f"train.{name} is {value}; it must be at least 0.")
        require(
            self.batch_size % self.accumulate == 0,
            f"train.batch_size {self.batch_size} is not divisible by train.accumulate {self.accumulate}; "
            "every microbatch holds the same number of rows.",
        )


@dataclass(frozen=True, kw_only=True)
class Run:
    """One experiment: everything that `jaxgpt train` needs, and nothing that it finds elsewhere."""

    name: str
    """Name of the run's folder."""
    model: GPT = field(default_factory=GPT)
    data: Text | Chat = field(default_factory=lambda: Text(path="data/text"))
    objective: CausalLM = field(default_factory=CausalLM)
    optim: Optim = field(default_factory=Optim)
    train: Train = field(default_factory=Train)
    mesh: Mesh = field(default_factory=Mesh)
    compute: Compute = field(default_factory=Compute)
    init_from: str = ""
    """A run folder whose best parameters this one starts from."""
    runs: str = "runs"
    """Folder that holds the folder of this run."""

    def __post_init__(self) -> None:
        check_types(self, "")
        require(
            bool(self.name) and not set(self.name) & set("/\\ "),
            f"name is {self.name!r}; a run's name is a folder's name: no slash, no space, not empty.",
        )
        require(
            self.length <= self.model.context,
            f"data.length {self.data.length} is longer than model.context {self.model.context}; "
            "shorten the rows or lengthen the context.",
        )
        require(
            self.model.causal,
            "model.causal is False but the objective predicts the next token, which such a model "
            "would see; set model.causal=True.",
        )
        require(
            self.optim.warmup_steps <= self.train.steps,
            f"optim.warmup_steps {self.optim.warmup_steps} is more than train.steps {self.train.steps}; "
            "warm up for fewer steps.",
        )

    @property
    def length(self) -> int:
        """Tokens a row."""
        return self.data.length or self.model.context

    @property
    def folder(self) -> Path:
        """Where this run keeps its checkpoints, metrics and report."""
        return Path(self.runs) / self.name

    def check_mesh(self, devices: int) -> dict[str, int]:
        """Axis sizes for this number of devices; `UserError` where model or batch do not divide."""
        sizes = self.mesh.resolve(devices)
        rows, micro = sizes["data"] * sizes["fsdp"], self.train.batch_size // self.train.accumulate
        require(
            micro % rows == 0,
            f"train.batch_size {self.train.batch_size} over accumulate {self.train.accumulate} gives "
            f"microbatches of {micro} rows, not divisible by data x fsdp = {rows} devices; "
            f"use a batch_size that is a multiple of {rows * self.train.accumulate}.",
        )
        divisions = {
            "tensor": ("heads", "groups", "hidden", "vocab_size"),
            "fsdp": ("width",),
        }
        for axis, names in divisions.items():
            for name in names:
                value, shown = getattr(self.model, name), _SHOWN.get(name, name)
                require(
                    value % sizes[axis] == 0,
                    f"model.{shown} {value} is not divisible by mesh.{axis} {sizes[axis]}; "
                    f"use a multiple of {sizes[axis]} or a smaller {axis} axis.",
                )
        return sizes


_SHOWN = {"groups": "kv_heads", "hidden": "mlp_width"}

# ------------------------------------------------------------------------------------- strict JSON


def to_json(value: Any) -> Any:
    """A dataclass tree as plain JSON values, each dataclass naming its class under `kind`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"kind": type(value).__name__, **fields}
    if isinstance(value, tuple | list):
        return [to_json(v) for v in value]
    return value


def from_json(kind: type[T], value: Any, where: str = "") -> T:
    """The inverse of `to_json`; an unknown key, a missing one or a wrong type is a `UserError`."""
    return _parse(kind, value, where)


def _parse(hint: Any, value: Any, where: str) -> Any:
    shown = where or "config"
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        options = [a for a in args if a is not type(None)]
        if len(options) == 1:
            return _parse(options[0], value, where)
        named = {o.__name__: o for o in options}
        require(isinstance(value, dict), f"{shown} is {value!r}; it must be a {' or a '.join(named)}.")
        kind = value.get("kind")
        require_known(kind, named, f"{shown}.kind is {kind!r}")
        return _parse(named[kind], value, where)
    if dataclasses.is_dataclass(hint):
        return _parse_dataclass(hint, value, where)
    if origin is Literal:
        require_known(value, args, f"{shown} is {value!r}")
        return value
    if origin is tuple:
        require(isinstance(value, list | tuple), f"{shown} is {value!r}; it must be a list.")
        return tuple(_parse(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    fits = isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool)
    require(fits, f"{shown} is {value!r}; it must be a value of type {hint.__name__}.")
    # JSON has neither NaN nor infinity, and no setting means anything by them.
    require(hint is not float or math.isfinite(value), f"{shown} is {value}; it must be a finite number.")
    return value


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _parse_dataclass(kind: Any, value: Any, where: str) -> Any:
    shown = where or "config"
    require(isinstance(value, dict), f"{shown} is {value!r}; it must be an object ({kind.__name__}).")
    hints = _hints(kind)
    names = {f.name for f in dataclasses.fields(kind)}
    given = dict(value)
    tag = given.pop("kind", kind.__name__)
    require(tag == kind.__name__, f"{shown}.kind is {tag!r}; it must be {kind.__name__!r}.")
    for name in given:
        require_known(name, names, f"{shown} has no field {name!r}")
    prefix = f"{where}." if where else ""
    parsed = {name: _parse(hints[name], v, prefix + name) for name, v in given.items()}
    for f in dataclasses.fields(kind):
        has_default = f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING
        require(
            f.name in parsed or has_default,
            f"{prefix}{f.name} is missing; {kind.__name__} needs it.",
        )
    return kind(**parsed)


# ------------------------------------------------------------------------------ files and overrides


def load(path: str | Path) -> Run:
    """The `Run` of a config file (`.py` with `config()`, or a run's `config.json`) or a run folder.

    Raises:
      UserError: naming the file and what is wrong in it.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "config.json"
    require(
        path.is_file(),
        f"config {str(path)!r} does not exist; give a .py file, a config.json or a run folder.",
    )
    if path.suffix == ".json":
        try:
            record = json.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise UserError(f"{path} is not JSON ({error}); restore it or start a new run.") from None
        try:
            return from_json(Run, record.get("run", record) if isinstance(record, dict) else record)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
    require(path.suffix == ".py", f"config {str(path)!r} must end in .py or .json.")
    with _explained(path):
        module = load_module(path)
    require(
        callable(getattr(module, "config", None)),
        f"{path} has no function config(); define `def config() -> Run`.",
    )
    with _explained(path):
        run = module.config()
    require(
        isinstance(run, Run),
        f"{path}: config() returned {type(run).__name__}; it must return a Run.",
    )
    return from_json(Run, to_json(run))  # the round trip checks every field's type


def load_module(path: Path) -> types.ModuleType:
    """Run a Python config file and return it as a module."""
    spec = importlib.util.spec_from_file_location(f"jaxgpt_config_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn whatever the code of a config file raises into a `UserError` with its line."""
    try:
        yield
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f.lineno for f in frames if Path(f.filename).resolve() == path.resolve()]
        if isinstance(error, SyntaxError) and Path(error.filename or "").resolve() == path.resolve():
            raise UserError(f"{path}, line {error.lineno}: {error.msg}.") from None
        where = f"{path}, line {lines[-1]}" if lines else str(path)
        what = str(error) if isinstance(error, UserError) else _explain_error(error)
        raise UserError(f"{where}: {what}") from None


def _explain_error(error: Exception) -> str:
    """Name the nearest field when the error is an unknown keyword of one of our classes."""
    words = str(error).split("'")
    for kind in (GPT, Compute, Text, Chat, CausalLM, Optim, Mesh, Train, Run):
        if str(error).startswith(f"{kind.__name__}.__init__") and "unexpected keyword" in str(error):
            names = [f.name for f in dataclasses.fields(kind)]
            return f"{kind.__name__} has no field {words[1]!r}{nearest(words[1], names)}"
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def override(run: Run, args: list[str], prog: str = "jaxgpt train CONFIG") -> Run:
    """`run` with fields replaced from flags such as `--optim.peak-lr 3e-4` (typed by tyro)."""
    import tyro  # imported late: it is only needed by commands that take options

    kind = tyro.conf.AvoidSubcommands[tyro.conf.FlagConversionOff[Run]]
    return from_json(Run, to_json(parse_args(kind, args, prog, default=run)))


def parse_args(kind: Any, args: list[str], prog: str, **options: Any) -> Any:
    """`tyro.cli`, which raises `UserError` with one sentence in place of printing a box and exiting."""
    import tyro

    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            value, unknown = tyro.cli(kind, args=args, prog=prog, return_unknown_args=True, **options)
    except SystemExit as error:
        if not error.code:  # --help
            raise
        raise UserError(_unboxed(box.getvalue())) from None
    if not unknown:
        return value
    if not unknown[0].startswith("-"):
        raise UserError(f"unexpected argument {unknown[0]!r}; options are written as --name value.")
    with contextlib.redirect_stdout(box), contextlib.suppress(SystemExit):
        tyro.cli(kind, args=["--help"], prog=prog, **options)
    flags = re.findall(r"(?<!\S)--[a-z][\w.-]*", box.getvalue())
    near = difflib.get_close_matches(unknown[0].partition("=")[0], flags, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"`{prog} --help` lists what there is."
    raise UserError(f"unknown option {unknown[0]!r}; {hint}")


def _unboxed(box: str) -> str:
    """What tyro says in its box, as one line and without the hints below it."""
    lines = [x.strip("│ ") for x in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()]

    def is_rule(line: str) -> bool:  # dashes where the terminal has no box characters
        return line[:3] in ("───", "╰──", "---", "")

    said = " ".join(itertools.takewhile(lambda x: not is_rule(x), itertools.dropwhile(is_rule, lines[1:])))
    return re.sub(r"^Error parsing \w+: ", "", said) or "these options do not parse."
