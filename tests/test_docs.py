"""The code of the documents runs, and does what they say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tiny import FLOAT32, HERE, T, packed, plain

from jaxgpt.config import CausalLM
from jaxgpt.models import MODULES, abstract_model, flops_per_token, init_params, parameter_counts
from jaxgpt.objectives import causal_lm
from jaxgpt.text.vocabulary import Vocabulary

DOCS = Path(__file__).parents[1] / "docs"


def test_the_model_of_add_a_model_builds_learns_and_looks_back_only() -> None:
    """In a process of its own, where types are not checked: the page's class is in no union."""
    line = [sys.executable, "-W", "error:::jaxgpt", "-c", "import test_docs; test_docs.check()"]
    paths = os.pathsep.join(map(str, (DOCS.parent / "tests", DOCS.parent)))
    made = subprocess.run(line, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr


def check() -> None:
    words = (DOCS / "add-a-model.md").read_text("utf-8")
    space: dict = {"__name__": "add_a_model"}
    sys.modules["add_a_model"] = types.ModuleType("add_a_model")  # dataclasses look their module up
    for code in re.findall(r"```python\n(.*?)```", words, re.DOTALL):
        exec(compile("from __future__ import annotations\n" + code, "add-a-model.md", "exec"), space)
        sys.modules["add_a_model"].__dict__.update(space)
    model = space["Averager"](vocab_size=64, context=T, width=16)
    MODULES[space["Averager"]] = space["AveragerModule"]
    assert parameter_counts(model)["total"] == 64 * 16 + 2 * (3 * 16 + 2 * 4 * 16 * 16) + 16
    assert flops_per_token(model, T) > 0
    graphdef, _ = abstract_model(model, FLOAT32, HERE)
    params = init_params(model, FLOAT32, HERE, jax.random.key(0))
    objective = causal_lm(CausalLM(), Vocabulary.plain(64))
    batch = packed([(9, 7)] * 4)

    @jax.jit
    def step(params: dict) -> tuple[jax.Array, dict]:
        def loss(params: dict) -> jax.Array:
            sums = objective(nnx.merge(graphdef, params), batch, None)
            return sums.loss / sums.weight

        value, grads = jax.value_and_grad(loss)(params)
        return value, jax.tree.map(lambda p, g: p - 0.5 * g, params, grads)

    losses = []
    for _ in range(30):
        value, params = step(params)
        losses.append(float(value))
    assert losses[-1] < losses[0] - 0.3

    @jax.jit
    def logits(tokens_BT: jax.Array) -> jax.Array:
        module = nnx.merge(graphdef, params)
        return module.logits(module.hidden(plain(tokens_BT)).x_BTD)

    tokens_BT = batch.tokens_BT
    moved = np.abs(np.asarray(logits(tokens_BT.at[:, 5].set(0)) - logits(tokens_BT))).max((0, 2)) > 1e-6
    assert not moved[:5].any() and moved[5:].all()
    packed_BTD = nnx.merge(graphdef, params).hidden(batch).x_BTD
    alone = jnp.pad(batch.tokens_BT[:, 9:], ((0, 0), (0, 9)))
    apart_BTD = nnx.merge(graphdef, params).hidden(plain(alone)).x_BTD
    np.testing.assert_allclose(packed_BTD[:, 9:], apart_BTD[:, :7], atol=1e-5)
