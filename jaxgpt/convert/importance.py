"""How much layers, heads and hidden units of a decoder matter on a text, and a decoder without some of them.

Shapes: R rows, B rows at a time, T tokens of a row, D hidden size, F hidden size of the MLP, H heads, G
key-value heads, K head size, L layers.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.batch import Batch
from jaxgpt.config import GPT, Compute
from jaxgpt.convert import calibrate
from jaxgpt.layers.tape import Tape, recording
from jaxgpt.models import abstract_model, assemble
from jaxgpt.sample.load import Trained
from jaxgpt.target import Target
from jaxgpt.tune.base import Path, flatten, unflatten
from jaxgpt.tune.ia3 import Scaled

_FLOAT32 = Compute(dtype="float32", attention="xla")
_OUT: Path = ("blocks", "attention", "out", "weight")
_DOWN: Path = ("blocks", "mlp", "down", "weight")


def of_layers(trained: Trained, rows_RT: np.ndarray) -> np.ndarray:
    """Block influence of each layer [L]: 1 - cosine of its input and output, a mean over tokens (ShortGPT;
    Men et al. 2024, equation 1).
    """
    model: Any = trained.run.model

    def influence(params: dict, tokens_BT: jax.Array) -> jax.Array:
        seen = Tape(states=range(model.layers + 1))
        with recording(seen):
            _module(trained, params).hidden(_batch(tokens_BT))
        states = [seen.hidden_BTD[i].astype(jnp.float32) for i in range(model.layers + 1)]
        return jnp.stack([jnp.mean(1 - _cosine(a, b)) for a, b in itertools.pairwise(states)])

    return _mean(trained, influence, rows_RT)


def of_heads(trained: Trained, rows_RT: np.ndarray) -> np.ndarray:
    """Importance of each layer's groups of heads [L, G]: the size of the loss's slope by a mask on them, a
    mean over rows (Michel et al. 2019, equation 2), summed over query heads that share keys and values.
    """
    model: Any = trained.run.model
    L, H, G, K = model.layers, model.heads, model.groups, model.head

    def slopes(params: dict, tokens_BT: jax.Array) -> jax.Array:
        def loss(mask_LH: jax.Array) -> jax.Array:
            flat = flatten(params)
            into_LHK = jnp.broadcast_to(mask_LH[..., None], (L, H, K))
            flat[_OUT] = Scaled(flat[_OUT], into=into_LHK)
            module, batch = _module(trained, unflatten(flat)), _batch(tokens_BT)
            sums = module.losses(module.hidden(batch).x_BTD, batch.targets_BT, batch.weights_BT)
            return sums.loss / jnp.sum(batch.weights_BT)

        return jnp.abs(jax.grad(loss)(jnp.ones((L, H))))

    return _mean(trained, slopes, rows_RT).reshape(L, G, H // G).sum(-1)


def of_units(trained: Trained, rows_RT: np.ndarray) -> np.ndarray:
    """Importance of each layer's hidden units [L, F]: the mean size of a unit, times the norm of what it adds
    to the stream (activations as in Minitron, Muralidharan et al. 2024, section 2.2).
    """
    span = (0, trained.run.model.layers)
    seen = calibrate.observe(trained, trained.params, [_DOWN], rows_RT, ("sizes",), span)[_DOWN]
    sizes_LF = np.stack([np.asarray(layer["sizes"]) for layer in seen]) / rows_RT.size
    return sizes_LF * np.linalg.norm(np.asarray(flatten(trained.params)[_DOWN], np.float32), axis=-1)


def _cosine(a_BTD: jax.Array, b_BTD: jax.Array) -> jax.Array:
    size_BT = jnp.linalg.norm(a_BTD, axis=-1) * jnp.linalg.norm(b_BTD, axis=-1)
    return jnp.sum(a_BTD * b_BTD, -1) / jnp.maximum(size_BT, 1e-9)


def _module(trained: Trained, params: dict) -> Any:
    return assemble(abstract_model(trained.run.model, _FLOAT32, Target.of(trained.mesh))[0], params)


def _batch(tokens_BT: jax.Array) -> Batch:
    """Rows of one document each, every token but the last with its next as target."""
    ones_BT, T = jnp.ones_like(tokens_BT), tokens_BT.shape[1]
    weights_BT = ones_BT.astype(jnp.float32).at[:, -1].set(0)
    positions_BT = jnp.broadcast_to(jnp.arange(T), tokens_BT.shape)
    return Batch(tokens_BT, jnp.roll(tokens_BT, -1, 1), weights_BT, ones_BT, positions_BT)


def _mean(trained: Trained, function: Any, rows_RT: np.ndarray) -> np.ndarray:
    """The mean of a function of (params, one row)."""
    step, total = jax.jit(function), 0.0
    with jax.set_mesh(trained.mesh):
        for row_T in rows_RT:
            total = total + np.asarray(step(trained.params, row_T[None]), np.float64)
    return np.asarray(total) / len(rows_RT)


# ---------------------------------------------------------------------------------------- what stays


def most(scores: np.ndarray, count: int) -> np.ndarray:
    """Indices of the highest scores along the last axis [..., count], in their old order."""
    return np.sort(np.argsort(-scores, axis=-1, kind="stable")[..., :count], axis=-1)


def without_layers(model: GPT, params: dict, kept_N: np.ndarray) -> tuple[GPT, dict]:
    """The model with these layers alone."""
    windows = tuple(model.windows[i % len(model.windows)] for i in kept_N) if model.windows else ()
    flat = flatten(params)
    made = {path: leaf[kept_N] if path[0] == "blocks" else leaf for path, leaf in flat.items()}
    return replace(model, layers=len(kept_N), windows=windows), unflatten(made)


def without_heads(model: GPT, params: dict, kept_LN: np.ndarray) -> tuple[GPT, dict]:
    """The model with these groups of heads of each layer: key-value heads, and the query heads of each."""
    per = model.heads // model.groups
    queries_LM = (kept_LN[..., None] * per + np.arange(per)).reshape(len(kept_LN), -1)
    cuts = {
        ("q", "weight"): (queries_LM, 2),
        ("q", "bias"): (queries_LM, 1),
        ("out", "weight"): (queries_LM, 1),
    }
    for name in ("k", "v"):
        cuts |= {(name, "weight"): (kept_LN, 2), (name, "bias"): (kept_LN, 1)}
    groups = kept_LN.shape[1]
    smaller = replace(model, heads=groups * per, kv_heads=groups, head_width=model.head)
    return smaller, _taken(params, ("blocks", "attention"), cuts)


def without_units(model: GPT, params: dict, kept_LN: np.ndarray) -> tuple[GPT, dict]:
    """The model with these hidden units of each layer's MLP."""
    cuts = {("down", "weight"): (kept_LN, 1)}
    for name in ("up", "gate"):
        cuts |= {(name, "weight"): (kept_LN, 2), (name, "bias"): (kept_LN, 1)}
    return replace(model, mlp_width=kept_LN.shape[1]), _taken(params, ("blocks", "mlp"), cuts)


def _taken(params: dict, module: Path, cuts: Mapping[Path, tuple[np.ndarray, int]]) -> dict:
    """Of each of these weights of a module, what each layer keeps along an axis."""
    flat = flatten(params)
    for path, (kept_LN, axis) in cuts.items():
        if (leaf := flat.get((*module, *path))) is not None:
            index = kept_LN.reshape(len(kept_LN), *(1,) * (axis - 1), -1, *(1,) * (leaf.ndim - axis - 1))
            flat[(*module, *path)] = jnp.take_along_axis(leaf, jnp.asarray(index), axis)
    return unflatten(flat)
