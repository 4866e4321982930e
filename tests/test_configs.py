"""Every shipped experiment says what it is for, loads, and builds without an array being made."""

from __future__ import annotations

import ast
import gc
import math
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import pytest
from flax import nnx
from tiny import mesh

from jaxgpt.batch import Batch
from jaxgpt.config import GPT, GRPO, PREFERENCES, Mesh, Run, load, load_sweep, override
from jaxgpt.models import parameter_counts
from jaxgpt.objectives import extra_columns, make_objective
from jaxgpt.plan import cost
from jaxgpt.sweep import split_only
from jaxgpt.text.vocabulary import Vocabulary
from jaxgpt.train.state import make_program
from jaxgpt.train.step import train_step

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "configs").rglob("*.py"))
ABLATIONS = sorted((ROOT / "configs/ablations").glob("*.py"))
SWEEPS = [path for path in FILES if "\ndef sweep(" in path.read_text("utf-8")]
DEVICES, ALL_DEVICES = 4, 8
A_FEW_CONSTANTS = 2**21  # bytes: a table over the vocabulary, keys; every matrix of a model is larger

BUILT = [path for path in FILES if path.parent.name != "ablations" or path.stem == "base"]  # one config()
BASE = (264 + 128) * 128 + 4 * (2 * 128 + (4 + 8) * 128**2) + 128
every_config = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)

COUNTS = {
    # GPT-2's published sizes and the 47 rows that pad the vocabulary of 50,257.
    "gpt2_124m": 124_439_808 + 47 * 768,
    "instruct_alpaca": 124_439_808 + 47 * 768,
    "lora_alpaca": 124_439_808 + 47 * 768,
    "gpt2_xl": 1_557_611_200 + 47 * 1600,
    # As published, by the checkpoints' authors or by counting them.
    "llama3_8b": 8_030_261_248,
    "llama31_8b": 8_030_261_248,
    "mistral_7b": 7_241_732_096,
    "qwen25_05b": 494_032_768,
    "qwen3_06b": 596_049_920,
    "gemma2_2b": 2_614_341_888,
    "gemma3_1b": 999_885_952,
    "smollm2_135m": 134_515_008,
    "mixtral_8x7b": 46_702_792_704,
    "bert_base": 109_514_298,
    "gpt3": (50_304 + 2048) * 768 + 12 * (12 * 768**2 + 13 * 768) + 2 * 768,
    # Tables; norms, attention and MLP of each layer; the last norm. No biases.
    "shakespeare_char": (264 + 64) * 128 + 4 * (2 * 128 + (4 + 8) * 128**2) + 128,
    "distill": (264 + 64) * 128 + 2 * (2 * 128 + (4 + 8) * 128**2) + 128,
    "quickstart_pretrain": 2048 * 160 + 4 * (2 * 160 + 2 * 40 + 4 * 160**2 + 3 * 160 * 448) + 160,
    # Table, gates and their biases; square matrices, norms and MLP of each layer; u and v.
    "transformer_xl_wt103": (267_735 + 3) * 411 + 16 * (5 * 410**2 + 4 * 410 + 2 * 410 * 2100 + 2510) + 820,
    # Table and output bias; the same of each layer; u and v; the last norm.
    "transformer_xl_shakespeare": 264 * 129 + 4 * (5 * 128**2 + 4 * 128 + 2 * 128 * 448 + 576) + 256 + 256,
}
_ENCODER = 3200 * 128 + 3 * (12 * 128**2 + 2 * 128) + 128
COUNTS["classify_sst2"] = 4096 * 128 + 2 * (12 * 128**2 + 2 * 128) + 128 + 2 * 128 + 2
COUNTS["recommend_movielens"] = 4096 * 192 + 4 * (12 * 192**2 + 2 * 192) + 192
COUNTS["customer_service"] = COUNTS["instruct_alpaca"]
COUNTS |= {"dpo": COUNTS["instruct_alpaca"], "reward_model": COUNTS["instruct_alpaca"] + 768}
COUNTS |= {"mlm_zh": _ENCODER, "ner_resume": _ENCODER + 17 * 128 + 17}
COUNTS["mixture"] = COUNTS["continual"] = 264 * 256 + 6 * (12 * 256**2 + 9 * 256 + 2 * 256) + 256
COUNTS["multitask"] = COUNTS["mixture"] + (8192 - 264) * 256
COUNTS |= dict.fromkeys(("quickstart_tune", "grpo_skills"), COUNTS["quickstart_pretrain"])
# Table; norms, attention and MLP of each layer with their biases; the last norm.
_SUMS = 264 * 96 + 3 * (12 * 96**2 + 9 * 96 + 2 * 96) + 96
COUNTS |= dict.fromkeys(("sums", "grpo_arithmetic"), _SUMS)
COUNTS |= dict.fromkeys((path.stem for path in ABLATIONS), BASE)

SWEPT = {  # parameters more than the first run's
    "positions": {"learned": 0, **dict.fromkeys(("rope", "alibi", "none"), -128 * 128)}
    | {"relative": -128 * 128 + 4 * 32 * 4},
    "norms": {"layernorm_pre": 0, "rmsnorm_pre": 0, "layernorm_post": -128, "rmsnorm_both": 4 * 2 * 128}
    | {"qk_norm": 4 * 2 * 32},
    "mlps": {"gelu": 0, "relu": 0, "relu2": 0} | dict.fromkeys(("swiglu", "geglu"), -4 * 128),
    "attention": {"full": 0, "window": 0, "alternating": 0, "softcap": 0}
    | {"grouped": -4 * 2 * 128 * 64, "multi_query": -4 * 2 * 128 * 96},
}

GPT3 = {  # Brown et al. 2020, table 2.1: millions of parameters; layers, width, tokens per step in 2^19, rate
    "125m": (125, 12, 768, 1, 6.0e-4),
    "350m": (350, 24, 1024, 1, 3.0e-4),
    "760m": (760, 24, 1536, 1, 2.5e-4),
    "1.3b": (1300, 24, 2048, 2, 2.0e-4),
    "2.7b": (2700, 32, 2560, 2, 1.6e-4),
    "6.7b": (6700, 32, 4096, 4, 1.2e-4),
    "13b": (13_000, 40, 5140, 4, 1.0e-4),
    "175b": (175_000, 96, 12_288, 6.25, 0.6e-4),
}


def commands(path: Path) -> list[tuple[str, str, list[str]]]:
    """The command, file and flags of each `jaxgpt train`, `info` and `sweep` of a config's docstring."""
    words = (ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "").replace("\\\n", " ")
    found = re.findall(r"jaxgpt (train|info|sweep) (\S+?\.py)([^`#\n]*)", words)
    return [(command, file, flags.split()) for command, file, flags in found]


@every_config
def test_a_config_says_its_question_its_command_and_what_to_expect(path: Path) -> None:
    words = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    assert words.split("\n\n")[0].endswith("?")
    assert "Expected: " in words
    assert commands(path)


@every_config
def test_the_commands_in_its_docstring_fit_it(path: Path) -> None:
    for command, file, flags in commands(path):
        assert ROOT / file == path
        flags, only = split_only(flags)
        run = override(load(path), flags)
        if command == "info":
            cost(run)
            continue
        axes = {axis: max(1, size) for axis, size in vars(run.mesh).items()}  # -1 takes what there is
        replace(run, mesh=Mesh(**axes)).check_mesh(math.prod(axes.values()))
        assert command == "train" or set(only) <= set(load_sweep(path))
        assert command == "sweep" or not only


@pytest.mark.parametrize("path", BUILT, ids=lambda path: path.stem)
def test_a_config_builds_without_arrays(path: Path) -> None:
    run = load(path)
    gc.collect()
    before = {id(array) for array in jax.live_arrays()}
    on = mesh(run.check_mesh(DEVICES))
    if run.compute.dtype == "auto":  # what a machine chooses
        run = replace(run, compute=replace(run.compute, dtype="bfloat16"))
    program = make_program(run, on)
    batch = Batch.abstract(run.train.batch_size, run.length, extra=extra_columns(run))
    objective = make_objective(run.objective, Vocabulary.plain(run.model.vocab_size))
    step = partial(train_step, program, objective, run.train.accumulate, 0)
    with jax.set_mesh(on):
        state, metrics = jax.eval_shape(step, program.abstract, batch, program.base)
    allocated = sum(array.nbytes for array in jax.live_arrays() if id(array) not in before)
    assert allocated < A_FEW_CONSTANTS

    def shapes(tree: object) -> object:
        return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)

    assert shapes(state) == shapes(program.abstract)  # a step's result can be the next one's input
    names = {"loss", "nll", "accuracy", "weight", "bytes", "grad_norm", "bad_steps"}
    rewarded = isinstance(run.objective, GRPO)
    names -= {"accuracy"} if rewarded else set()
    own = set(shapes(metrics)) - names
    sides = {f"{name}_{side}" for name in ("reward", "length") for side in ("chosen", "rejected")}
    if rewarded:
        assert own == {"entropy", "clip_share", "kl_rollout", "logprob_gap"}
    elif type(run.objective) in PREFERENCES:
        assert own - {"chosen_nll"} == sides | {"margin"}
    else:
        assert own == ({"expert_rounds", "expert_fill"} if run.model.moe else set())
    assert names <= set(shapes(metrics))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(program.abstract.params)} == {"float32"}
    for leaf in jax.tree.leaves(program.abstract):
        leaf.sharding.shard_shape(leaf.shape)  # raises where an axis does not divide


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_run_of_a_sweep_lies_on_its_mesh_and_has_a_loss(path: Path) -> None:
    """Of `config()` the whole step is traced; here the forward pass, which takes a third of the time."""
    for name, run in load_sweep(path).items():
        on = mesh(run.check_mesh(ALL_DEVICES))
        program = make_program(run, on)
        for leaf in jax.tree.leaves(program.abstract):
            leaf.sharding.shard_shape(leaf.shape)
        objective = make_objective(run.objective, Vocabulary.plain(run.model.vocab_size))
        batch, key = Batch.abstract(run.train.batch_size, run.length), jax.random.key(0)
        if path.stem == "gpt3" and name != "175b":
            continue  # alike but for their sizes

        def loss(params: dict, batch: Batch, graph=program.graphdef, of=objective, key=key) -> jax.Array:
            return of(nnx.merge(graph, params), batch, key).loss

        with jax.set_mesh(on):
            assert jax.eval_shape(loss, program.abstract.params, batch).shape == ()


@every_config
def test_a_config_has_the_parameters_it_should(path: Path) -> None:
    run = load(path)
    assert parameter_counts(run.model)["total"] == COUNTS[path.stem]


@pytest.mark.parametrize("name", SWEPT)
def test_the_runs_of_an_ablation_have_equal_parameters_where_they_can_and_equal_data(name: str) -> None:
    runs = load_sweep(ROOT / f"configs/ablations/{name}.py")
    base = load(ROOT / "configs/ablations/base.py")
    counts = {key: parameter_counts(run.model)["total"] for key, run in runs.items()}
    assert {key: count - BASE for key, count in counts.items()} == SWEPT[name]
    for run in runs.values():
        assert replace(run, model=base.model) == base  # the same data, order, steps and rates


def test_gpt3_is_the_papers_table() -> None:
    runs = load_sweep(ROOT / "configs/gpt3.py")
    assert list(runs) == list(GPT3)
    for name, (millions, layers, width, batch, peak_lr) in GPT3.items():
        run, model, optim = runs[name], runs[name].model, runs[name].optim
        assert isinstance(model, GPT)
        assert (model.layers, model.width, optim.peak_lr) == (layers, width, peak_lr)
        assert optim.final_lr == pytest.approx(peak_lr / 10)
        tokens = run.train.batch_size * run.length
        assert tokens == batch * 2**19
        assert tokens * run.train.steps == pytest.approx(300e9, rel=1e-4)
        assert tokens * optim.warmup_steps == pytest.approx(375e6, rel=0.01)
        # Attention's four matrices and biases, the MLP's two; norms; tables; the last norm.
        inner = model.heads * model.head
        layer = 4 * width * inner + 3 * inner + width + 8 * width**2 + 5 * width + 4 * width
        count = layers * layer + (50_304 + 2048) * width + 2 * width
        assert parameter_counts(model)["total"] == count
        assert count / 1e6 == pytest.approx(millions, rel=0.01 if name in EXACT else 0.02)
        # Dense and banded in turns, the first dense: a band sees 256 tokens of 2048.
        assert [model.window(i) for i in range(layers)] == [2048, 256] * (layers // 2)


EXACT = ("125m", "760m", "6.7b", "13b", "175b")
"""Sizes that the paper does not name by less than two digits of what their shape gives."""


def test_names_are_those_of_the_files_and_differ() -> None:
    runs: dict[str, Run] = {path.stem: load(path) for path in FILES if path.stem not in SWEPT}
    folders = {run.folder for run in runs.values()}
    assert len(folders) == len(runs)
    names = {"base": "ablation_base", "continual": "first", "gpt3": "gpt3_125m"}
    for stem, run in runs.items():
        assert names.get(stem, stem) in (run.name, f"quickstart_{run.name}")
        assert run.init_from in {"", *map(str, folders)}


def test_an_ablation_varies_the_base() -> None:
    assert [path.stem for path in ABLATIONS] == ["attention", "base", *sorted({*SWEPT} - {"attention"})]
    for path in ABLATIONS:
        assert load(path) == load(ROOT / "configs/ablations/base.py")
