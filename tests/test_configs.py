"""Every shipped experiment says what it is for, loads, and builds without an array being made."""

from __future__ import annotations

import ast
import gc
import re
from functools import partial
from pathlib import Path

import jax
import pytest
from tiny import mesh

from jaxgpt.batch import Batch
from jaxgpt.config import Run, load, override
from jaxgpt.data.vocabulary import Vocabulary
from jaxgpt.models import parameter_counts
from jaxgpt.objectives import make_objective
from jaxgpt.plan import cost
from jaxgpt.train.state import make_program
from jaxgpt.train.step import train_step

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "configs").glob("*.py"))
DEVICES = 4
A_FEW_CONSTANTS = 2**21  # bytes: a table over the vocabulary (of 267,735 ids at most), keys

every_config = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)

COUNTS = {
    # GPT-2's published sizes and the 47 rows that pad the vocabulary of 50,257.
    "gpt2_124m": 124_439_808 + 47 * 768,
    "instruct_alpaca": 124_439_808 + 47 * 768,
    "gpt2_xl": 1_557_611_200 + 47 * 1600,
    "llama3_8b": 8_030_261_248,
    # Tables; norms, attention and MLP of each layer; the last norm. No biases.
    "shakespeare_char": (264 + 64) * 128 + 4 * (2 * 128 + (4 + 8) * 128**2) + 128,
    "quickstart_pretrain": 2048 * 160 + 4 * (2 * 160 + 2 * 40 + 4 * 160**2 + 3 * 160 * 448) + 160,
    # Table, gates and their biases; square matrices, norms and MLP of each layer; u and v.
    "transformer_xl_wt103": (267_735 + 3) * 411 + 16 * (5 * 410**2 + 4 * 410 + 2 * 410 * 2100 + 2510) + 820,
    # Table and output bias; the same of each layer; u and v; the last norm.
    "transformer_xl_shakespeare": 264 * 129 + 4 * (5 * 128**2 + 4 * 128 + 2 * 128 * 448 + 576) + 256 + 256,
}
COUNTS["quickstart_tune"] = COUNTS["quickstart_pretrain"]


def commands(path: Path) -> list[tuple[str, list[str]]]:
    """The file and the flags of each `jaxgpt train` and `jaxgpt info` of a config's docstring."""
    words = (ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "").replace("\\\n", " ")
    found = re.findall(r"jaxgpt (?:train|info) (\S+?\.py)([^`#\n]*)", words)
    return [(file, flags.split()) for file, flags in found]


@every_config
def test_a_config_says_its_question_its_command_and_what_to_expect(path: Path) -> None:
    words = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    assert words.split("\n\n")[0].endswith("?")
    assert "Expected: " in words
    assert commands(path)


@every_config
def test_the_commands_in_its_docstring_fit_it(path: Path) -> None:
    for file, flags in commands(path):
        assert file == f"configs/{path.name}"
        cost(override(load(ROOT / file), flags))


@every_config
def test_a_config_builds_without_arrays(path: Path) -> None:
    run = load(path)
    gc.collect()
    before = {id(array) for array in jax.live_arrays()}
    on = mesh(run.check_mesh(DEVICES))
    program = make_program(run, on)
    batch = Batch.abstract(run.train.batch_size, run.length)
    objective = make_objective(run.objective, Vocabulary.plain(run.model.vocab_size))
    step = partial(train_step, program, objective, run.train.accumulate, 0)
    with jax.set_mesh(on):
        state, metrics = jax.eval_shape(step, program.abstract, batch)
    allocated = sum(array.nbytes for array in jax.live_arrays() if id(array) not in before)
    assert allocated < A_FEW_CONSTANTS

    def shapes(tree: object) -> object:
        return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)

    assert shapes(state) == shapes(program.abstract)  # a step's result can be the next one's input
    assert set(shapes(metrics)) == {"loss", "nll", "accuracy", "weight", "bytes", "grad_norm", "bad_steps"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(program.abstract.params)} == {"float32"}
    for leaf in jax.tree.leaves(program.abstract):
        leaf.sharding.shard_shape(leaf.shape)  # raises where an axis does not divide


@every_config
def test_a_config_has_the_parameters_it_should(path: Path) -> None:
    run = load(path)
    assert parameter_counts(run.model)["total"] == COUNTS[path.stem]


def test_names_are_those_of_the_files_and_differ() -> None:
    runs: dict[str, Run] = {path.stem: load(path) for path in FILES}
    folders = {run.folder for run in runs.values()}
    assert len(folders) == len(runs)
    for stem, run in runs.items():
        assert stem in (run.name, f"quickstart_{run.name}")
        assert run.init_from in {"", *map(str, folders)}
