"""What is inside a forward pass, as the programs of accelerators have it, not the CPU's alone."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import FLOAT32, GPT2, HERE, MIXED, MODERN, ONE, T, V, mesh, packed, place, plain, sharp_params

from jaxgpt.config import Compute
from jaxgpt.evals.features import Wanted, _observe
from jaxgpt.layers.tape import Tape, recording
from jaxgpt.models import abstract_model
from jaxgpt.target import Target

ALL = Wanted(logits=True, states=(0, 1, 2), maps=(0, 1), pooling="mean")
TPU = Target("tpu", "TPU v5p", interpret=True)
GPU = Target("gpu", "NVIDIA H100 80GB HBM3", interpret=True)
SPLASH = replace(FLOAT32, attention="splash", strict=True)
CUDNN = replace(FLOAT32, attention="xla")
HALF = Compute(dtype="bfloat16", attention="xla")


def batch():
    tokens = np.random.default_rng(0).integers(1, V, (4, T)).astype(np.int32)
    return plain(jnp.asarray(tokens))


@pytest.mark.parametrize(
    ("target", "compute", "error"), [(TPU, SPLASH, 2e-4), (GPU, CUDNN, 2e-4), (GPU, HALF, 0.05)]
)
def test_an_accelerators_program_shows_the_same(target: Target, compute: Compute, error: float) -> None:
    """Scanned parameters, another kernel, a bfloat16 stream: each number against float32 on the CPU."""
    params = sharp_params(MODERN)
    with jax.set_mesh(mesh(ONE)):
        wanted = _observe(MODERN, FLOAT32, HERE, ALL, params, batch())
    # XLA's CPU backend cannot compile collectives of bfloat16: one device there, eight in float32.
    on, spread = place(MODERN, params, ONE if compute is HALF else MIXED)
    with jax.set_mesh(on):
        made = _observe(MODERN, compute, target, ALL, spread, batch())
    for path, value in jax.tree.leaves_with_path(made):
        assert value.dtype == jnp.float32, path
    for a, b in zip(jax.tree.leaves(wanted), jax.tree.leaves(made), strict=True):
        assert np.abs(np.asarray(a) - np.asarray(b)).max() <= error * np.abs(np.asarray(a)).max()
    # Only what is seen by a kernel's mask has a share: windows of 4, then everything before.
    back_TT = np.arange(T)[:, None] - np.arange(T)
    near_HTT, far_HTT = np.asarray(made["attention"])[0]
    assert ((near_HTT > 0) == ((back_TT >= 0) & (back_TT < 4))).all()
    assert ((far_HTT > 0) == (back_TT >= 0)).all()
    np.testing.assert_allclose(made["attention"].sum(-1), 1, atol=1e-5)


@pytest.mark.parametrize("model", [GPT2, MODERN], ids=["gpt2", "modern"])
def test_what_is_shown_is_what_the_scan_computes(model) -> None:
    """Features with the tape open are those of the scanned program, of packed documents too."""
    rows, params = packed([(9, 7), (3, 13)]), sharp_params(model)
    graph = abstract_model(model, FLOAT32, GPU)[0]

    def features(params: dict, seen: Tape | None) -> jax.Array:
        module = nnx.merge(graph, params)
        if seen is None:
            return module.hidden(rows).x_BTD
        with recording(seen):
            return module.hidden(rows).x_BTD

    closed = jax.jit(lambda p: features(p, None))(params)
    opened = jax.jit(lambda p: features(p, Tape((1,), (0,))))(params)
    np.testing.assert_allclose(closed, opened, atol=2e-5)
    before = str(jax.make_jaxpr(lambda p: features(p, None))(params))
    assert "scan" in before and "scan" not in str(jax.make_jaxpr(lambda p: features(p, Tape()))(params))
