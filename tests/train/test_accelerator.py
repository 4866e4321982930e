"""The accelerator's own program, built and run on a CPU: its stream in bfloat16, its layers scanned.

Its gradients are compared with those of float32, on data where sums are long: ids of Zipf's law, of
which the commonest stands at a tenth of all places, and a cotangent whose mean is not zero.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.tree_util import keystr

from jaxgpt.batch import Batch
from jaxgpt.config import GPT, Bert, CausalLM, Compute, MaskedLM, MoE, TransformerXL
from jaxgpt.models import abstract_model, init_memory, init_params
from jaxgpt.objectives import make_objective
from jaxgpt.target import Target
from jaxgpt.text.vocabulary import Vocabulary

T = 256
HALF = Compute(dtype="bfloat16", attention="xla", remat="full")
SINGLE = Compute(dtype="float32", attention="xla")
GPU = Target("gpu", "NVIDIA H100 80GB HBM3", interpret=True)
WHOLE, PART = (8192, 64), (1024, 16)
"""Ids and rows: of GPT-2, and of the others, which have fewer to save time."""
SIZES = {"vocab_size": PART[0], "context": T, "layers": 2, "width": 64}
MODELS = {
    "gpt2": GPT(**SIZES | {"vocab_size": WHOLE[0]}, heads=4),
    "modern": GPT(
        **SIZES, heads=4, kv_heads=2, position="rope", norm="rmsnorm", mlp="swiglu", bias=False,
        qkv_bias=True, qk_norm=True, tied=False, windows=(64, 0),
    ),
    "bert": Bert(**SIZES, heads=4, dropout=0.0),
    "transformer_xl": TransformerXL(
        **SIZES,
        heads=4,
        mlp_width=256,
        segment=T,
        memory=32,
        dropout=0.0,
        norm_at="pre",
    ),
    "experts": GPT(
        **SIZES, heads=4, position="rope", mlp="swiglu", bias=False, moe=MoE(experts=4, shared_width=64)
    ),
}  # fmt: skip
OPTIONS = {
    "xla_allow_excess_precision": False,  # what is rounded in the program is rounded
    "xla_backend_optimization_level": 3,  # the tests' own setting is for tiny programs
    "xla_llvm_disable_expensive_passes": False,
}
LIMIT = 0.02
"""Relative L2 error of a leaf's gradient."""
FLOORS: dict[str, dict[str, float]] = {}
"""Leaves that cannot reach it, with what was measured."""


@cache
def batch(V: int, B: int) -> Batch:
    """Rows of two documents each."""
    random = np.random.default_rng(0)
    ids = np.minimum(random.zipf(1.3, (B, T + 1)), V) - 1
    segments = np.broadcast_to(np.where(np.arange(T) < 100, 1, 2), (B, T))
    positions = np.where(np.arange(T) < 100, np.arange(T), np.arange(T) - 100)
    return Batch(
        tokens_BT=jnp.asarray(ids[:, :-1], jnp.int32),
        targets_BT=jnp.asarray(ids[:, 1:], jnp.int32),
        weights_BT=jnp.ones((B, T)),
        segments_BT=jnp.asarray(segments, jnp.int32),
        positions_BT=jnp.asarray(np.broadcast_to(positions, (B, T)), jnp.int32),
    )


def gradients(name: str, compute: Compute, target: Target, params: dict) -> dict:
    """Of the loss and of the features under a cotangent of mean 1, by parameter."""
    model, (V, B) = MODELS[name], WHOLE if name == "gpt2" else PART
    graphdef, _ = abstract_model(model, compute, target)
    kind = CausalLM() if model.causal else MaskedLM()
    objective = make_objective(kind, Vocabulary.plain(V))
    cotangent = jnp.asarray(1 + np.random.default_rng(1).standard_normal((B, T, model.width)), jnp.float32)

    def total(params: dict, batch: Batch) -> jax.Array:
        module = nnx.merge(graphdef, params)
        features = module.hidden(batch).x_BTD
        return objective(module, batch, None).loss + jnp.sum(features * cotangent) / 64

    rows = replace(batch(V, B), memory=init_memory(model, compute, target, B))
    step = jax.jit(jax.grad(total)).lower(params, rows)
    return step.compile(OPTIONS)(params, rows)


def errors(ours: dict, plain: dict) -> dict[str, float]:
    """Relative L2 error of every leaf; of a key's bias against the norm of the query's.

    The true gradient of a key's bias is zero where no rotation tells keys apart: softmax does not
    change when all scores of a query do.
    """
    flat = {keystr(path): np.asarray(leaf, np.float64) for path, leaf in jax.tree.leaves_with_path(plain)}
    found = {}
    for path, leaf in jax.tree.leaves_with_path(ours):
        name = keystr(path)
        against = flat[name.replace("['k']['bias']", "['q']['bias']")]
        found[name] = float(
            np.linalg.norm(np.asarray(leaf, np.float64) - flat[name]) / np.linalg.norm(against)
        )
    return found


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_the_accelerators_program_are_those_of_float32(name: str) -> None:
    here = Target.of(jax.devices())
    params = init_params(MODELS[name], SINGLE, here, jax.random.key(0))
    plain = gradients(name, SINGLE, here, params)
    found = errors(gradients(name, HALF, GPU, params), plain)
    floors = FLOORS.get(name, {})
    wrong = {leaf: round(error, 4) for leaf, error in found.items() if error > floors.get(leaf, LIMIT)}
    assert not wrong, wrong
