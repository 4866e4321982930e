"""A training step's instructions say which part of the model they come from (`jaxgpt.profile` reads it)."""

from __future__ import annotations

import re
from typing import Any

import pytest
from tiny import FLOAT32, mesh

from jaxgpt.batch import Batch
from jaxgpt.config import GPT, Bert, MaskedLM, MoE, Run, Text, Train, TransformerXL
from jaxgpt.objectives import make_objective
from jaxgpt.sharding import batch_sharding
from jaxgpt.text.vocabulary import Vocabulary
from jaxgpt.train.state import make_program
from jaxgpt.train.step import jit_train_step

SIZES: dict[str, Any] = {"vocab_size": 64, "context": 16, "layers": 2, "width": 32, "heads": 4}
PARTS = ("embedding", "layers", "attention", "mlp", "norm", "loss", "optimizer")


@pytest.mark.parametrize(
    ("model", "parts", "more"),
    [
        (GPT(**SIZES), (*PARTS, "scores", "softmax", "values"), {}),
        (GPT(**SIZES, moe=MoE(experts=4, width=16, shared_width=8)), (*PARTS, "experts"), {}),
        (Bert(**SIZES, mlp_width=64), PARTS, {"objective": MaskedLM()}),
        (TransformerXL(**SIZES, segment=8, memory=0, head_width=8, mlp_width=64), PARTS, {}),
    ],
    ids=["gpt", "moe", "bert", "transformer-xl"],
)
def test_every_part_of_a_step_is_named(model: Any, parts: tuple[str, ...], more: dict[str, Any]) -> None:
    train = Train(steps=200, batch_size=4)
    run = Run(name="r", model=model, data=Text(path="d", length=8), train=train, compute=FLOAT32, **more)
    program = make_program(run, mesh({"data": 1, "fsdp": 1, "tensor": 1}))
    step = jit_train_step(run, program, make_objective(run.objective, Vocabulary.plain(64)))
    batch = Batch.abstract(4, 8, batch_sharding(program.mesh), types=run.typed)
    text = step.trace(program.abstract, batch).lower().as_text(debug_info=True)
    for part in parts:
        assert re.search(rf"[\"/(]{part}[/)]", text), part
