"""`Run`, which holds all parts of an experiment and checks that they fit."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from jaxgpt.config import code
from jaxgpt.config.architecture import Architecture
from jaxgpt.config.check import check_types, from_json
from jaxgpt.config.data import Chat, Data, Dialogues, Labelled, Mix, Pairs, Prompts, Rated, Tagged, Text
from jaxgpt.config.gpt import GPT
from jaxgpt.config.grpo import check_rewarded
from jaxgpt.config.measures import Measure, check_measures
from jaxgpt.config.models import Bert, Classifier, Headed, RewardModel, TransformerXL
from jaxgpt.config.objectives import (
    PREFERENCES,
    BradleyTerry,
    CausalLM,
    Classification,
    Distillation,
    MaskedLM,
    Objective,
)
from jaxgpt.config.replay import Replay, replayed
from jaxgpt.config.tasks import Task
from jaxgpt.config.training import ROW_AXES, Compute, Mesh, Optim, Train
from jaxgpt.config.tune import Full, Tune, keeps_base
from jaxgpt.errors import UserError, require, require_known, shown
from jaxgpt.files import read_json

MOST_NAME = 200
"""Bytes of a run's name: file systems allow 255, and files beside a folder have names made of its own."""
_INHERITED: Any = None


@dataclass(frozen=True, kw_only=True)
class Run:
    """One experiment: everything that `jaxgpt train` needs, and nothing that it finds elsewhere."""

    name: str
    """Name of the run's folder."""
    model: GPT | Bert | TransformerXL | Classifier | RewardModel | Architecture = _INHERITED
    """The architecture; unspecified means that of the run named by init_from, else GPT-2 124M. The
    backbone of a Classifier or RewardModel may be left out in the same way."""
    data: Data = field(default_factory=lambda: Text(path="data/text"))
    replay: Replay | None = None
    """Earlier data to be mixed in against forgetting; it becomes part of data."""
    tune: Tune = field(default_factory=Full)
    """What of the model that init_from names is trained: all, or what a parameter-efficient method adds or
    chooses."""
    objective: Objective = field(default_factory=CausalLM)
    measures: tuple[Measure, ...] = ()
    """What is done against overfitting and forgetting; see docs/measures.md."""
    optim: Optim = field(default_factory=Optim)
    train: Train = field(default_factory=Train)
    mesh: Mesh = field(default_factory=Mesh)
    compute: Compute = field(default_factory=Compute)
    init_from: str = ""
    """A run folder whose best parameters this one starts from, and whose model it has unless one is given."""
    runs: str = "runs"
    """Folder that holds the folder of this run."""

    inherits: ClassVar[str] = ""
    """What was left out: `model`, `backbone` or nothing (of one object: `replace` gives what was found)."""

    def __post_init__(self) -> None:
        left = "model" if self.model is None else "backbone" if _is_headless(self.model) else ""
        object.__setattr__(self, "inherits", left)
        object.__setattr__(self, "model", self._resolved_model())
        check_types(self, "")
        self._resolve_replay()
        require(
            self.name not in ("", ".", "..")
            and len(self.name.encode()) <= MOST_NAME
            and self.name.isprintable()
            and not self.name.startswith("-")
            and not set(self.name) & set("/\\ "),
            f"name is {shown(self.name)}; a run's name is a folder's name: letters, digits, -, _ and dots, "
            f"at most {MOST_NAME} bytes, without spaces or slashes, and not beginning with -.",
        )
        virtual = f" and tune.tokens {self.virtual}" if self.virtual else ""
        require(
            self.length <= self.documents * (self.model.context - self.virtual),
            f"data.length {self.length}{virtual} is more than {'twice ' * (self.documents > 1)}model.context "
            f"{self.model.context}; lower the one or raise the other (with init_from too, unless "
            "model.position is 'learned').",
        )
        self._check_tune()
        self._check_task()
        self._check_scores()
        check_measures(self)
        require(
            self.optim.warmup_steps <= self.train.steps or self.train.epochs is not None,
            f"optim.warmup_steps {self.optim.warmup_steps} is more than train.steps {self.train.steps}; "
            "warm up for fewer steps.",
        )

    def _resolved_model(self) -> Any:
        """The model that is given, completed by that of `init_from`."""
        given: Any = self.model
        if getattr(given, "backbone", given) is not None:
            return given
        require(
            given is None or bool(self.init_from),
            "model.backbone is missing; name one, or in init_from a run whose model it shall be.",
        )
        if not self.init_from:
            return GPT()
        base: Any = read_run(Path(self.init_from) / "config.json", f"init_from {self.init_from!r}").model
        return base if given is None else replace(given, backbone=getattr(base, "backbone", base))

    def _resolve_replay(self) -> None:
        """Make the data the mixture that `replay` asks for."""
        if self.replay is None:
            return
        name = self.replay.run
        path, where = Path(name) / "config.json", f"replay.run {name!r}"
        earlier = self.replay.data or read_run(path, where).data
        object.__setattr__(self, "data", replayed(self.data, earlier, self.replay.share))
        object.__setattr__(self, "replay", None)

    def _check_tune(self) -> None:
        """Refuse a method without a model to tune."""
        if isinstance(self.tune, Full):
            return
        name = type(self.tune).__name__
        require(
            bool(self.init_from),
            f"tune is {name} but init_from is empty; name the run whose model it tunes.",
        )
        require(
            not getattr(self.model, "frozen", False),
            f"model.frozen is True and tune is {name}, which says itself what is trained; set it to False.",
        )

    def _check_task(self) -> None:
        """Refuse a model, data and objective that do not belong together."""
        model, data, objective = self.model, self.data, self.objective
        if isinstance(model, Classifier):
            words = "words, which Tagged data have" if model.pool == "token" else "texts, as Labelled data do"
            require(
                isinstance(data, Tagged if model.pool == "token" else Labelled),
                f"data is {type(data).__name__} but a Classifier with model.pool {model.pool!r} labels "
                f"{words}; change data or model.pool (token; first, last, mean).",
            )
            require(
                isinstance(objective, Classification),
                f"objective is {type(objective).__name__}() but a Classifier predicts labels; "
                "set objective=Classification().",
            )
            return
        for name, part in (("data", data), ("objective", objective)):
            require(
                not isinstance(part, Tagged | Labelled | Classification),
                f"{name} is {type(part).__name__} but model is {type(model).__name__}, which has no labels; "
                "set model=Classifier(backbone=..., labels=(...)).",
            )
        rewards = isinstance(model, RewardModel), isinstance(objective, BradleyTerry)
        require(
            rewards[0] == rewards[1],
            f"objective is {type(objective).__name__}() and model {type(model).__name__}(...); a RewardModel "
            "is trained by BradleyTerry(), and nothing else is: set both.",
        )
        check_rewarded(self)
        self._check_preferences()
        self._check_teacher()
        if isinstance(objective, MaskedLM):
            require(
                not model.causal,
                "objective MaskedLM() predicts a hidden token from both sides, but this model is causal "
                "and sees only what is before it; use Bert() or GPT(causal=False), or CausalLM().",
            )
            require(
                model.vocab_size >= 2,
                "model.vocab_size is 1; objective=MaskedLM() needs a mask and a token to hide: at least 2.",
            )
            require(
                all(isinstance(source, Text) for source in self.sources),
                "objective MaskedLM() reads plain text; set data to Text(...).",
            )
            return
        if rewards[0]:
            return
        require(
            model.causal,
            "model.causal is False but the objective predicts the next token, which such a model "
            "would see; set model.causal=True, or objective=MaskedLM().",
        )
        recurrent = isinstance(model, TransformerXL) and model.memory > 0
        contiguous = isinstance(data, Text) and data.contiguous
        require(
            recurrent == contiguous,
            "a TransformerXL with a memory reads rows that go on from batch to batch: "
            "set data=Text(..., contiguous=True)."
            if recurrent
            else "data.contiguous is True but this model has no memory to carry; set it to False.",
        )
        require(
            not (isinstance(model, GPT) and model.prefix) or self.templated,
            "model.prefix is True but plain text has no prompts; set it to False, or data to Chat(...) "
            "with a template.",
        )

    def _check_teacher(self) -> None:
        """Refuse a student without a teacher, or one that a teacher's distribution does not fit."""
        if not isinstance(self.objective, Distillation):
            return
        require(
            bool(self.objective.teacher),
            "objective.teacher is empty; name the run of the larger model that Distillation learns from.",
        )
        require(
            isinstance(self.model, GPT) and not isinstance(self.data, Pairs | Rated),
            f"objective Distillation() teaches a GPT on text, dialogues or tasks, but model is "
            f"{type(self.model).__name__} and data {type(self.data).__name__}; set model=GPT(...).",
        )

    def _check_scores(self) -> None:
        """Refuse scores of tasks where there are none, or a metric that no task has."""
        if not self.train.eval_examples:
            return
        require(
            bool(self.tasks),
            f"train.eval_examples is {self.train.eval_examples} but data hold no task; set it to 0, or data "
            "to a "
            "task (docs/tasks.md).",
        )
        by = self.train.best_by
        known = [f"{name}:{metric}" for name, task in self.tasks.items() for metric in task.metric_names]
        if ":" in by:
            require_known(by, known, f"train.best_by is {by!r}")

    def _check_preferences(self) -> None:
        """Refuse preferences and an objective that do not belong together, and one without its reference."""
        data, objective = self.data, self.objective
        wanted = PREFERENCES.get(type(objective))
        name = type(objective).__name__
        fits = [kind.__name__ for kind, reads in PREFERENCES.items() if isinstance(data, reads)]
        require(
            wanted is None or isinstance(data, wanted),
            f"data is {type(data).__name__} but objective {name}() learns from preferences; set data to "
            f"{wanted.__name__ if wanted else ''}(...).",
        )
        require(
            wanted is not None or not fits,
            f"objective is {name}() but {type(data).__name__} data hold preferences; set it to one of: "
            f"{', '.join(f'{fit}()' for fit in fits)}.",
        )
        require(
            not hasattr(objective, "reference") or bool(self.init_from),
            f"objective {name}() compares with the model that it starts from, but init_from is empty; name "
            "a run (tuned on dialogues, as a rule).",
        )
        require(
            getattr(objective, "reference", "") != "frozen" or keeps_base(self.tune),
            f"objective.reference is 'frozen' but tune is {type(self.tune).__name__}(...), which changes "
            "parameters of the model itself; set it to 'stored', or tune to LoRA(), DoRA(), PromptTuning(), "
            "PrefixTuning(), IA3() or BottleneckAdapters(norms=False).",
        )

    @property
    def length(self) -> int:
        """Tokens per row."""
        return self.data.length or self.row

    @property
    def row(self) -> int:
        """Tokens per row where the data do not say."""
        return self.documents * max(2, min(self.model.row, self.model.context - self.virtual))

    @property
    def virtual(self) -> int:
        """Positions that virtual tokens take before every document."""
        return getattr(self.tune, "tokens", 0)

    @property
    def documents(self) -> int:
        """Documents of an example, which share a row; each takes 1 / documents of it at most."""
        return 2 if isinstance(self.data, Pairs | Rated) else 1

    @property
    def task(self) -> Classifier | None:
        """The model, where it tells labels apart."""
        return self.model if isinstance(self.model, Classifier) else None

    @property
    def headed(self) -> Headed | None:
        """The model, where it is a head on another one."""
        return self.model if isinstance(self.model, Headed) else None

    @property
    def writes(self) -> bool:
        """Whether its model writes text."""
        return self.headed is None and self.model.causal

    @property
    def templated(self) -> bool:
        """Whether it reads dialogues by a chat template, so that its model answers turns."""
        return any(
            isinstance(source, Dialogues | Prompts) and source.template != "none" for source in self.sources
        )

    @property
    def sources(self) -> tuple[Text | Chat | Prompts | Pairs | Rated | Tagged | Labelled | Task, ...]:
        """What is mixed, or the one source of the data."""
        return self.data.sources if isinstance(self.data, Mix) else (self.data,)

    @property
    def tasks(self) -> dict[str, Task]:
        """The tasks among the sources, by their names."""
        if isinstance(self.data, Mix):
            pairs = zip(self.data.source_names, self.data.sources, strict=True)
            return {name: source for name, source in pairs if isinstance(source, Task)}
        return {self.data.name: self.data} if isinstance(self.data, Task) else {}

    @property
    def typed(self) -> bool:
        """Whether batches tell two texts of one input apart."""
        return isinstance(self.data, Labelled) and bool(self.data.pair)

    @property
    def folder(self) -> Path:
        """Where this run keeps its checkpoints, metrics and report."""
        return Path(self.runs) / self.name

    def with_steps(self, epoch_rows: int) -> Run:
        """The run with the number of steps that `train.epochs` comes to, if it is set.

        Args:
          epoch_rows: rows of one pass over the training data.

        Raises:
          UserError: the steps are given too and are others, or fewer than those of the warm-up.
        """
        train = self.train
        if train.epochs is None:
            return self
        steps = max(1, math.ceil(train.epochs * epoch_rows / train.batch_size - 1e-9))
        default = Train.__dataclass_fields__["steps"].default
        require(
            train.steps in (default, steps),
            f"train.steps is {train.steps} but train.epochs {train.epochs:g} come to {steps}; drop one.",
        )
        require(
            self.optim.warmup_steps <= steps,
            f"optim.warmup_steps {self.optim.warmup_steps} is more than the {steps} steps that train.epochs "
            f"{train.epochs:g} come to; warm up for fewer steps.",
        )
        return replace(self, train=replace(train, steps=steps))

    def check_mesh(self, devices: int) -> dict[str, int]:
        """Axis sizes for this number of devices; `UserError` where model or batch do not divide."""
        sizes = self.mesh.resolve(devices)
        rows = math.prod(sizes[axis] for axis in ROW_AXES)
        micro = self.train.batch_size // self.train.accumulate
        require(
            micro % rows == 0,
            f"train.batch_size {self.train.batch_size} over accumulate {self.train.accumulate} gives "
            f"microbatches of {micro} rows, not divisible by data x fsdp x expert = {rows} devices; "
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
        for name in ("width", "shared_width"):
            value = getattr(self.model.moe, name, None) or 0
            require(
                value % sizes["tensor"] == 0,
                f"model.moe.{name} {value} is not divisible by mesh.tensor {sizes['tensor']}; "
                f"use a multiple of {sizes['tensor']} or a smaller tensor axis.",
            )
        experts = self.model.moe.experts if self.model.moe else 1
        require(
            experts % sizes["expert"] == 0,
            f"model.moe.experts {experts} is not divisible by mesh.expert {sizes['expert']}; lower the axis.",
        )
        return sizes


def _is_headless(model: Any) -> bool:
    return getattr(model, "backbone", model) is None


def read_run(path: Path, where: str) -> Run:
    """The run of a config.json.

    Args:
      path: the file.
      where: what names it, in messages.

    Raises:
      UserError: it is missing, damaged, or of something else.
    """
    require(
        path.is_file(),
        f"{where} is no run folder: {path} does not exist; name a run that was trained or imported.",
    )
    record = read_json(path, dict[str, Any], "restore it or start a new run")
    require(
        "model_type" not in record,
        f"{where} is a Hugging Face folder; first `jaxgpt import {path.parent} runs/NAME` makes a run of it.",
    )
    try:
        return from_json(Run, record.get("run", record), folder=path.parent / code.FOLDER)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


_SHOWN = {"groups": "kv_heads", "hidden": "mlp_width"}
