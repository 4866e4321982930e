"""The two tiny models that the tests share, their batches, and how to train them for a few steps.

Shapes: B rows, T tokens per row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxgpt.batch import Batch
from jaxgpt.config import GPT, Compute, Run, Text
from jaxgpt.models import abstract_model, init_params
from jaxgpt.objectives import make_objective
from jaxgpt.sharding import batch_sharding, make_mesh, param_shardings, replicated
from jaxgpt.target import Target
from jaxgpt.text.vocabulary import Vocabulary
from jaxgpt.train.state import Program, State, init_state, make_program
from jaxgpt.train.step import train_step

V, T = 64, 16
FLOAT32 = Compute(dtype="float32", attention="xla")
HERE = Target.of(jax.devices())
"""What programs of the tests are built for, where nothing else is said."""
GPT2 = GPT(vocab_size=V, context=T, layers=2, width=32, heads=4)
MODERN = GPT(
    vocab_size=V,
    context=T,
    layers=2,
    width=32,
    heads=8,
    kv_heads=4,
    position="rope",
    norm="rmsnorm",
    mlp="swiglu",
    bias=False,
    qk_norm=True,
    tied=False,
    logit_softcap=10.0,
    windows=(4, 0),
)
MODELS = {"gpt2": GPT2, "modern": MODERN}
ONE = {"data": 1, "fsdp": 1, "tensor": 1, "expert": 1}
MIXED = {"data": 2, "fsdp": 2, "tensor": 2, "expert": 1}
MESHES = {
    "data=8": ONE | {"data": 8},
    "fsdp=8": ONE | {"fsdp": 8},
    "tensor=4,data=2": ONE | {"tensor": 4, "data": 2},
    "fsdp=2,tensor=2,data=2": MIXED,
}
VOCABULARY = Vocabulary.plain(V)


def mesh(sizes: Mapping[str, int]) -> jax.sharding.Mesh:
    """A mesh on the first devices, as many as it takes."""
    return make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])


def sharp_params(model: GPT) -> dict:
    """Random parameters large enough that attention is not flat, none of them 0 or 1.

    The arrays are made once and shared; the dict around them is the caller's to change.
    """
    return jax.tree.map(lambda leaf: leaf, _sharp_params(model))


@cache
def _sharp_params(model: GPT) -> dict:
    shapes = jax.eval_shape(lambda: init_params(model, FLOAT32, HERE, jax.random.key(0)))
    random = np.random.default_rng(1)

    def one(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        middle = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.float32(middle + 0.12 * random.standard_normal(leaf.shape))

    return jax.tree.map_with_path(one, shapes)


def packed(lengths: Iterable[Iterable[int]], seed: int = 0, length: int = T) -> Batch:
    """Rows of documents of the given lengths, packed as the loader packs them."""
    random, rows = np.random.default_rng(seed), []
    for documents in lengths:
        row = {n: np.zeros(length, np.int32) for n in ("tokens", "targets", "segments", "positions")}
        row["weights"] = np.zeros(length, np.float32)
        at = 0
        for number, size in enumerate(documents, 1):
            here = slice(at, at + size)
            document = random.integers(1, V, size)
            row["tokens"][here], row["targets"][here] = document, np.roll(document, -1)
            row["weights"][here] = np.arange(size) < size - 1
            row["segments"][here], row["positions"][here] = number, np.arange(size)
            at += size
        rows.append(row)
    columns = ("tokens", "targets", "weights", "segments", "positions")
    return Batch(**{f"{n}_BT": jnp.asarray(np.stack([r[n] for r in rows])) for n in columns})


def plain(tokens_BT: jax.Array) -> Batch:
    """Rows of one document each, for a forward pass."""
    ones_BT, places_T = jnp.ones_like(tokens_BT), jnp.arange(tokens_BT.shape[1])
    places_BT = jnp.broadcast_to(places_T, tokens_BT.shape)
    return Batch(tokens_BT, tokens_BT, ones_BT.astype(jnp.float32), ones_BT, places_BT)


def text_batches(count: int, rows: int, seed: int = 0) -> list[Batch]:
    """Batches of rows cut into documents at random places."""
    random = np.random.default_rng(seed)
    cuts = random.integers(2, T - 2, (count, rows))
    return [packed([(c, T - c) for c in batch], seed * 1000 + i) for i, batch in enumerate(cuts)]


def model_of(model: GPT, compute: Compute = FLOAT32) -> Callable[[dict], Any]:
    """Parameters to a model around them, for traced code."""
    graphdef = abstract_model(model, compute, HERE)[0]
    return lambda params: nnx.merge(graphdef, params)


def place(model: GPT, params: dict, sizes: Mapping[str, int]) -> tuple[jax.sharding.Mesh, dict]:
    """Parameters laid out on a mesh of these sizes."""
    on = mesh(sizes)
    return on, jax.device_put(params, param_shardings(abstract_model(model, FLOAT32, HERE)[1], on))


def make_run(model: GPT = GPT2, **parts: Any) -> Run:
    """A run without data, for tests that feed the step themselves."""
    return Run(**({"name": "tiny", "model": model, "data": Text(path="none"), "compute": FLOAT32} | parts))


def compile_step(run: Run, program: Program, *, donate: bool = False) -> Callable[..., Any]:
    """The jitted training step as the loop makes it."""
    objective = make_objective(run.objective, VOCABULARY)
    step = partial(train_step, program, objective, run.train.accumulate, run.train.seed)
    out = (program.shardings, replicated(program.mesh))
    return jax.jit(step, donate_argnums=0 if donate else (), out_shardings=out)


def steps(run: Run, sizes: Mapping[str, int], batches: Iterable[Batch]) -> tuple[State, list[dict]]:
    """Train on these batches on a mesh; the last state and each step's numbers."""
    program = make_program(run, mesh(sizes))
    state, step, seen = init_state(run, program), compile_step(run, program, donate=True), []
    layout = batch_sharding(program.mesh)
    with jax.set_mesh(program.mesh):
        for batch in batches:
            state, metrics = step(state, jax.device_put(batch, layout))
            seen.append({name: float(value) for name, value in metrics.items()})
    return state, seen


def assert_close(a: Any, b: Any, relative: float) -> None:
    """Equal trees up to a share of each leaf's largest value.

    What is nothing beside the largest leaf is rounding alone, as a key bias's gradient, which is 0.
    """
    assert jax.tree.structure(a) == jax.tree.structure(b)
    floor = 1e-2 * max(float(np.abs(np.asarray(x)).max()) for x in jax.tree.leaves(a))
    for (path, x), (_, y) in zip(jax.tree.leaves_with_path(a), jax.tree.leaves_with_path(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        error = np.abs(x - y).max() / max(np.abs(x).max(), floor)
        assert error <= relative, f"{jax.tree_util.keystr(path)} differs by {error:.1e} of its largest"


def assert_same(a: Any, b: Any) -> None:
    """Bitwise equal trees."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), (_, y) in zip(jax.tree.leaves_with_path(a), jax.tree.leaves_with_path(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), jax.tree_util.keystr(path))
