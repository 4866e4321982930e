"""An experiment as data: `Run` and its parts, checked, loaded, overridden, written as strict JSON.

Nothing here imports jax, so that `jaxgpt train --help` answers at once (docs/adr/0001).
Every class is a frozen dataclass; a variant is `dataclasses.replace(run, ...)`.
"""

from jaxgpt.config.architecture import Architecture
from jaxgpt.config.batching import Batching
from jaxgpt.config.check import changed_fields, from_json, to_json
from jaxgpt.config.data import Chat, Labelled, Mix, Pairs, Prompts, Rated, Tagged, Text
from jaxgpt.config.decoding import MBR, Beam, BestOf, Contrastive, Decoding, Sampling
from jaxgpt.config.gpt import GPT, MoE, RopeScaling
from jaxgpt.config.grpo import GRPO
from jaxgpt.config.knowledge import Knowledge
from jaxgpt.config.load import load, load_module, load_run, load_suite, load_sweep, override, parse_args
from jaxgpt.config.measures import (
    EMA,
    EWC,
    FGM,
    L2SP,
    PGD,
    FreeLB,
    LabelSmoothing,
    LayerDecay,
    Measure,
    NEFTune,
    RDrop,
    TokenDropout,
    TokenSwaps,
)
from jaxgpt.config.models import Bert, Classifier, Headed, Model, RewardModel, TransformerXL
from jaxgpt.config.objectives import (
    DPO,
    IPO,
    KTO,
    ORPO,
    PREFERENCES,
    BradleyTerry,
    CausalLM,
    Classification,
    Distillation,
    MaskedLM,
    SimPO,
)
from jaxgpt.config.replay import Replay
from jaxgpt.config.run import Run
from jaxgpt.config.suite import Suite
from jaxgpt.config.tasks import Sample, Task
from jaxgpt.config.training import ONE_DEVICE, ROW_AXES, Compute, Mesh, Optim, Train
from jaxgpt.config.tune import (
    IA3,
    BitFit,
    BottleneckAdapters,
    DoRA,
    Full,
    LastLayers,
    LoRA,
    PrefixTuning,
    PromptTuning,
    Quantization,
    QuantizationAware,
)

__all__ = [
    "DPO",
    "EMA",
    "EWC",
    "FGM",
    "GPT",
    "GRPO",
    "IA3",
    "IPO",
    "KTO",
    "L2SP",
    "MBR",
    "ONE_DEVICE",
    "ORPO",
    "PGD",
    "PREFERENCES",
    "ROW_AXES",
    "Architecture",
    "Batching",
    "Beam",
    "Bert",
    "BestOf",
    "BitFit",
    "BottleneckAdapters",
    "BradleyTerry",
    "CausalLM",
    "Chat",
    "Classification",
    "Classifier",
    "Compute",
    "Contrastive",
    "Decoding",
    "Distillation",
    "DoRA",
    "FreeLB",
    "Full",
    "Headed",
    "Knowledge",
    "LabelSmoothing",
    "Labelled",
    "LastLayers",
    "LayerDecay",
    "LoRA",
    "MaskedLM",
    "Measure",
    "Mesh",
    "Mix",
    "MoE",
    "Model",
    "NEFTune",
    "Optim",
    "Pairs",
    "PrefixTuning",
    "PromptTuning",
    "Prompts",
    "Quantization",
    "QuantizationAware",
    "RDrop",
    "Rated",
    "Replay",
    "RewardModel",
    "RopeScaling",
    "Run",
    "Sample",
    "Sampling",
    "SimPO",
    "Suite",
    "Tagged",
    "Task",
    "Text",
    "TokenDropout",
    "TokenSwaps",
    "Train",
    "TransformerXL",
    "changed_fields",
    "from_json",
    "load",
    "load_module",
    "load_run",
    "load_suite",
    "load_sweep",
    "override",
    "parse_args",
    "to_json",
]
