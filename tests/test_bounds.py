"""Any number in any field is refused in one sentence, or builds without an array in a few seconds."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import inspect
import time
import typing
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import ONE, mesh

from jaxgpt import config
from jaxgpt.batch import Batch
from jaxgpt.cli import COMMANDS
from jaxgpt.config import GPT, Bert, Classifier, MoE, Optim, RopeScaling, Run, Tagged, Text, TransformerXL
from jaxgpt.config.bounds import Bounds
from jaxgpt.config.load import KINDS
from jaxgpt.errors import UserError
from jaxgpt.objectives import make_objective
from jaxgpt.sample.settings import Asked
from jaxgpt.text.vocabulary import Vocabulary
from jaxgpt.train.state import make_program
from jaxgpt.train.step import jit_train_step

SECONDS = 10
SIZES: dict[str, Any] = {"vocab_size": 64, "context": 16, "layers": 2, "width": 32, "heads": 4}
TRAIN = config.Train(steps=200, batch_size=4)
TEXT = Text(path="d", length=8)
FULL = GPT(
    **SIZES,
    kv_heads=2,
    head_width=8,
    windows=(4, 0),
    attention_softcap=5.0,
    attention_scalar=8.0,
    position="rope",
    rope_local_theta=1e4,
    rope_scaling=RopeScaling(),
    mlp_width=64,
    moe=MoE(experts=4, width=16, shared_width=8),
    tied=False,
    logit_softcap=10.0,
    dropout=0.1,
)
XL = TransformerXL(
    **SIZES, segment=8, memory=8, eval_memory=4, head_width=8, mlp_width=64, cutoffs=(16, 32), div=2
)
BASES = [
    Run(name="r", model=FULL, data=TEXT, train=TRAIN, optim=Optim(name="muon", schedule="wsd")),
    Run(name="r", model=Bert(**SIZES, mlp_width=64), data=TEXT, train=TRAIN, objective=config.MaskedLM()),
    Run(name="r", model=XL, data=replace(TEXT, contiguous=True), train=TRAIN),
    Run(
        name="r",
        model=Classifier(backbone=GPT(**SIZES), labels=("O", "B-X", "I-X")),
        data=Tagged(train=("a",), validation=("b",), length=8),
        objective=config.Classification(),
        train=TRAIN,
    ),
]


def bounds_of(hint: Any) -> list[Bounds]:
    """The bounds in an annotation."""
    return [hint] if isinstance(hint, Bounds) else [b for a in typing.get_args(hint) for b in bounds_of(a)]


def is_number(hint: Any) -> bool:
    """Whether an annotation lets a number through."""
    return hint in (int, float) or any(map(is_number, typing.get_args(hint)))


@cache
def hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind, include_extras=True)


def numbers(part: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Path and annotation of every number in a tree of config classes."""
    for field in dataclasses.fields(part):
        value, here = getattr(part, field.name), (*path, field.name)
        if dataclasses.is_dataclass(value):
            yield from numbers(value, here)
        elif is_number(hints(type(part))[field.name]):
            yield here, hints(type(part))[field.name]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_number_of_a_config_has_bounds(kind: type) -> None:
    for name, hint in hints(kind).items():
        assert bounds_of(hint) or not is_number(hint), name


def commands() -> dict[str, Callable[..., Any]]:
    """The functions of the commands that parse no config."""
    plain = {name: about for name, about in COMMANDS.items() if not about.config}
    return {name: getattr(importlib.import_module(c.module), c.function) for name, c in plain.items()}


def test_every_number_of_a_command_has_bounds_and_is_named_by_its_flag() -> None:
    count = 0
    for command in commands().values():
        for name, hint in hints(command).items():
            if name == "return" or not is_number(hint):
                continue
            assert len(bounds_of(hint)) == 1, (command.__name__, name)
            (bounds,) = bounds_of(hint)
            for value in (bounds.least - 1, 2 * bounds.most + 1, float("nan")):
                with pytest.raises(
                    UserError, match=f"^--{name.replace('_', '-')} is .*; it must be between "
                ):
                    needed = {
                        n: "x"
                        for n, p in inspect.signature(command).parameters.items()
                        if p.default is p.empty
                    }
                    command(**needed | {name: value})
            count += 1
    assert count > 12
    for name in hints(Asked):  # of `sample` and `chat`: one place for all who sample
        for value in (-1000, 10**30, float("nan")):
            given: Any = {3: value} if name == "logit_bias" else value
            with pytest.raises(UserError, match=f"^{name} (of 3 )?is .*; it must be between "):
                Asked(**{name: given})


def built(run: Run) -> None:
    """The model, its optimizer and the step as shapes."""
    here = mesh(ONE)
    program, objective = (
        make_program(run, here),
        make_objective(run.objective, Vocabulary.plain(run.model.vocab_size)),
    )
    batch = Batch.abstract(run.train.batch_size, run.length, types=run.typed)
    with jax.set_mesh(here):
        jax.eval_shape(jit_train_step(run, program, objective), program.abstract, batch)


def edges(bounds: Bounds, whole: bool) -> st.SearchStrategy[Any]:
    """Numbers on, around and between the bounds, and those that nobody would write."""
    near = [bounds.least, bounds.most, bounds.least - 1, bounds.most + 1, -bounds.most, 2 * bounds.most]
    if whole:
        return (
            st.sampled_from([int(v) for v in near])
            | st.integers(int(bounds.least), int(bounds.most))
            | st.sampled_from([0, -1, 2**31, 2**32, 2**63, 2**64, 10**400, 10**5000])
        )
    return (
        st.sampled_from([float(v) for v in near])
        | st.floats(bounds.least, bounds.most)
        | st.floats()
        | st.sampled_from([10**400, 1e-45, 0.0, 1.0])
    )


@st.composite
def changes(draw: st.DrawFn) -> dict[str, Any]:
    """A run's JSON with up to four of its numbers replaced."""
    base = draw(st.sampled_from(BASES))
    tree = copy.deepcopy(config.to_json(base))
    for path, hint in draw(st.lists(st.sampled_from(list(numbers(base))), min_size=1, max_size=4)):
        (bounds,) = bounds_of(hint)
        value = draw(edges(bounds, "int" in str(hint)))
        part = tree
        for name in path[:-1]:
            part = part[name]
        part[path[-1]] = [value] if "tuple" in str(hint) else value
    return tree


@pytest.mark.filterwarnings("ignore:overflow encountered")
@settings(max_examples=40, deadline=None, derandomize=True)
@given(changes())
def test_any_number_is_refused_in_one_sentence_or_builds_in_time(tree: dict[str, Any]) -> None:
    began = time.monotonic()
    try:
        built(config.from_json(Run, tree))
    except UserError as error:
        assert "\n" not in str(error) and str(error).endswith("."), error
        assert len(str(error)) < 400, error
    assert time.monotonic() - began < SECONDS


@pytest.mark.parametrize("base", BASES, ids=lambda run: type(run.model).__name__)
def test_the_bases_build(base: Run) -> None:
    built(base)


def test_a_model_of_the_largest_sizes_is_counted_by_hand() -> None:
    """Nothing of 5e16 parameters is made to tell that they are so many: `jaxgpt info` asks the same."""
    largest = GPT(vocab_size=2**24, context=2**24, layers=4096, width=2**20, heads=2**14, bias=False)
    run = Run(name="r", model=largest, data=Text(path="d", length=8), train=TRAIN)
    began = time.monotonic()
    built(run)
    assert time.monotonic() - began < SECONDS
