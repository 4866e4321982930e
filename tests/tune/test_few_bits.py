"""Training through the rounding, and what is saved of weights in few bits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import FLOAT32, HERE, MIXED, assert_same, sharp_params
from tiny_tune import BATCHES, LATEST, logits_of, tuned

from jaxgpt.checkpoint.checksum import measure
from jaxgpt.config import Quantization, QuantizationAware
from jaxgpt.errors import UserError
from jaxgpt.sharding import param_shardings
from jaxgpt.tune import make_tuning
from jaxgpt.tune.base import flatten
from jaxgpt.tune.few_bits import _packed, _unpacked, whole_params

PATH = ("blocks", "mlp", "down", "weight")


def tuning(tune):
    return make_tuning(tune, LATEST, FLOAT32, HERE)


@pytest.mark.parametrize("form", ["int4", "fp8"])
def test_the_gradient_passes_the_rounding_unchanged(form) -> None:
    """At the rounded weights: that of the loss there, and so for weights that are not rounded."""
    own, params = tuning(QuantizationAware(to=form, skip=("blocks.attention.k",))), sharp_params(LATEST)
    batch = BATCHES[0]

    def loss(params):
        return jnp.mean(jnp.square(logits_of(LATEST, params, batch)))

    rounded = own.enter(params, {}, None)
    wanted = jax.grad(loss)(rounded)
    got = jax.grad(lambda p: loss(own.enter(p, {}, None)))(params)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    flat, exact = flatten(rounded), flatten(params)
    assert (flat[PATH] != exact[PATH]).any()
    np.testing.assert_array_equal(flat[("blocks", "attention", "k", "weight")],
                                  exact[("blocks", "attention", "k", "weight")])  # fmt: skip
    # As `jaxgpt quantize` rounds them.
    few = tuning(Quantization(to=form, skip=("blocks.attention.k",)))
    held = few.init(jax.random.key(0), params)
    np.testing.assert_allclose(flat[PATH], flatten(few.merge(held, {}))[PATH], atol=1e-6)


def test_training_through_the_rounding_learns() -> None:
    case = tuned(QuantizationAware(to="int4"), LATEST)
    state, seen = case.train(BATCHES * 4)
    assert seen[-1]["loss"] < seen[2]["loss"]  # of the same batch
    assert case.base == {}
    own = flatten(case.program.tuning.enter(state.params, {}, None))[PATH]
    assert len(np.unique(np.asarray(own[0, :, 0]).round(6))) <= 32  # 16 values for each 64 of 128 inputs


@pytest.mark.parametrize("form", ["int8", "nf4"])
def test_what_is_saved_comes_back(form) -> None:
    own, params = tuning(Quantization(to=form)), sharp_params(LATEST)
    held = own.init(jax.random.key(0), params)
    abstract = {path: (v.shape, v.dtype) for path, v in nnx.to_flat_state(own.learned)}
    assert {path: (x.shape, x.dtype) for path, x in flatten(held).items()} == abstract
    assert all(leaf.bad == 0 for leaf in measure(held).values())
    entered = own.enter(held, {}, None)
    assert_same(own.merge(held, {}), whole_params(entered))
    close = logits_of(LATEST, entered, BATCHES[0]) - logits_of(LATEST, whole_params(entered), BATCHES[0])
    assert float(jnp.abs(close).max()) < 1e-4


@pytest.mark.parametrize("form", ["int4", "nf4"])
@pytest.mark.parametrize("shape", [(3, 8, 5), (3, 7, 5)])
def test_two_codes_are_a_byte_along_an_even_axis(form, shape) -> None:
    kind = jnp.int4 if form == "int4" else jnp.uint4
    low = -8 if form == "int4" else 0
    codes = jax.random.randint(jax.random.key(0), shape, low, low + 16).astype(kind)
    packed = _packed(codes, 1)
    assert packed.dtype == jnp.uint8
    assert packed.size == (codes.size // 2 if shape[1] % 2 == 0 else codes.size)
    again = _unpacked(packed, 1, form, shape)
    assert again.dtype == kind
    np.testing.assert_array_equal(again.astype(jnp.int8), codes.astype(jnp.int8))


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_it_is_spread_over_a_mesh(form) -> None:
    case = tuned(QuantizationAware(to=form), LATEST, MIXED)
    own = tuning(Quantization(to=form))
    layout = param_shardings(own.learned, case.program.mesh)
    with jax.set_mesh(case.program.mesh):
        spread = jax.device_put(own.init(jax.random.key(0), sharp_params(LATEST)), layout)
        got = jax.jit(lambda p: logits_of(LATEST, own.enter(p, {}, None), BATCHES[0]))(spread)
    want = logits_of(LATEST, own.merge(jax.tree.map(jnp.asarray, jax.device_get(spread)), {}), BATCHES[0])
    np.testing.assert_allclose(got, want, atol=2e-4)
    codes = flatten(spread)[(*PATH, "codes")]
    assert len({str(s.index) for s in codes.addressable_shards}) > 1


def test_what_cannot_be() -> None:
    with pytest.raises(UserError, match="skip leaves no linear layer"):
        tuning(Quantization(skip=("*",)))
    with pytest.raises(UserError, match="need 'int8' in both"):
        Quantization(to="fp8", activations="int8")
